"""A tiny policy's gradients: by the engine, and by transformers and autograd in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.types import Experience
from tests.helpers.combinations.reference import in_scope
from tests.helpers.logits import chosen_logprobs
from tests.helpers.ranks import check_engine

RATE = 0.05
SGD = {"name": "sgd", "distributed": False, "lr": RATE}
WHOLE = 8  # microbatch sizes: one microbatch
PARTS = 2  # and four


@contextmanager
def engine_of(
    model: Path, gradients: dict[str, Any], micro_batch: int, optimizer: dict[str, Any], /, **sections: Any
) -> Iterator[MegatronEngine]:
    config = check_engine.make_config(
        str(model), {}, optimizer, gradients=gradients, micro_batch_size=micro_batch, **sections
    )
    yield check_engine.build_engine(config)


class Reference:
    """Gradients by name in float64, written down anew from eqs. 15 and 16."""

    def __init__(self, directory: Path, batch: Experience) -> None:
        # The default for experts has no float64.
        model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")
        self.model = model.double()
        self.names = [name for name, _ in self.model.named_parameters()]
        assert batch.advantages_MBT is not None
        hidden = self.model.model(input_ids=batch.tokens_BT).last_hidden_state
        head = self.model.lm_head.weight
        self._use = head.detach().clone().requires_grad_()  # the output layer's use of a tied weight
        losses = [
            self.losses_from(hidden @ head.t(), batch),
            self.losses_from(hidden.detach() @ self._use.t(), batch),
        ]
        self.losses = torch.stack(losses[0]).detach()
        parameters = list(self.model.parameters())
        self.grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses[0]]
        self.head = [torch.autograd.grad(loss, self._use, retain_graph=True)[0] for loss in losses[1]]

    @staticmethod
    def losses_from(logits: Tensor, batch: Experience) -> list[Tensor]:
        assert batch.advantages_MBT is not None
        chosen = chosen_logprobs(logits, batch.tokens_BT)
        mask = batch.response_mask_BT[:, 1:]
        ratio = (chosen - batch.old_logprobs_BT[:, 1:].double())[mask].exp()
        return [
            -torch.min(ratio * a, ratio.clamp(0.9, 1.1) * a).mean()
            for a in (advantages_BT[:, 1:][mask] for advantages_BT in batch.advantages_MBT.double())
        ]

    def rows(self, scope: Any = "full") -> Tensor:
        """The gradients in ``scope``, flattened [M, N]."""
        wanted = [in_scope(name, scope) for name in self.names]
        rows = []
        for grads, head in zip(self.grads, self.head, strict=True):
            parts = [g.flatten() for g, take in zip(grads, wanted, strict=True) if take]
            rows.append(
                torch.cat([*parts, head.flatten()] if scope in ("last_layer", "last_block") else parts)
            )
        return torch.stack(rows)


def flat(directory: Path) -> Tensor:
    exported = AutoModelForCausalLM.from_pretrained(directory).double()
    return torch.cat([p.detach().flatten() for p in exported.parameters()])
