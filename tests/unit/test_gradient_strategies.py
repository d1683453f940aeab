"""Every gradient strategy in one process against transformers and torch.autograd in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from gapo_mega import aggregation
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.types import Experience
from tests.distributed import check_engine, worlds
from tests.tiny import tiny_llama

RATE = 0.05
SGD = {"name": "sgd", "distributed": False, "lr": RATE}
WHOLE, PARTS = 8, 2  # microbatch sizes: one microbatch, and four

# (gradients section, microbatch size, share of ||g_i|| ||g_j|| that the Gram matrix may be off by).
# fp32 sums in another order give 1e-7 a term, hence 1e-5; the cosines of `single` come from a difference of
# numbers near 2, each good to 1e-6. bf16 rows round every element by up to 2^-9.
FULL: list[tuple[str, dict[str, Any], int, float]] = [
    ("separate", {"forward": "separate"}, PARTS, 1e-5),
    ("shared", {"forward": "shared"}, WHOLE, 1e-5),
    ("in turns", {"forward": "shared"}, PARTS, 1e-5),
    ("bf16 rows", {"forward": "separate", "store_dtype": "bf16"}, PARTS, 2.0**-8),
    ("single", {"store": "single", "forward": "separate"}, PARTS, 1e-5),
    ("single shared", {"store": "single", "forward": "shared"}, WHOLE, 1e-5),
]
SCOPED: list[tuple[str, dict[str, Any], int, float]] = [
    ("last layer", {"scope": "last_layer", "forward": "separate"}, PARTS, 1e-5),
    ("last layer shared", {"scope": "last_layer", "forward": "shared"}, WHOLE, 1e-5),
    ("last block", {"scope": "last_block", "forward": "separate"}, PARTS, 1e-5),
    ("last block shared", {"scope": "last_block", "forward": "shared"}, WHOLE, 1e-5),
    ("layers", {"scope": [[0, 1], [2, 3]], "forward": "separate"}, PARTS, 1e-5),
    ("layers shared", {"scope": [[0, 1], [2, 3]], "forward": "shared"}, WHOLE, 1e-5),
]
CASES = [pytest.param(*case[1:], id=case[0]) for case in FULL + SCOPED]


@pytest.fixture(scope="module", autouse=True)
def one_world() -> Iterator[None]:
    yield
    worlds.leave()


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("strategies") / request.param
    tiny_llama(directory, tied=request.param == "tied")
    return directory


@contextmanager
def engine_of(
    model: Path, gradients: dict[str, Any], micro_batch: int, optimizer: dict[str, Any], **sections: Any
) -> Iterator[MegatronEngine]:
    config = check_engine.make_config(
        str(model), {}, optimizer, gradients=gradients, micro_batch_size=micro_batch, **sections
    )
    yield check_engine.build_engine(config)


class Reference:
    """Gradients by name in float64, written down anew from eqs. 15 and 16."""

    def __init__(self, directory: Path, batch: Experience) -> None:
        self.model = LlamaForCausalLM.from_pretrained(directory).double()
        self.names = [name for name, _ in self.model.named_parameters()]
        assert batch.advantages_MBT is not None
        hidden = self.model.model(input_ids=batch.tokens_BT).last_hidden_state
        head = self.model.lm_head.weight
        self._use = head.detach().clone().requires_grad_()  # the output layer's use of a tied weight
        losses = [
            self._losses(hidden @ head.t(), batch),
            self._losses(hidden.detach() @ self._use.t(), batch),
        ]
        self.losses = torch.stack(losses[0]).detach()
        parameters = list(self.model.parameters())
        self.grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses[0]]
        self.head = [torch.autograd.grad(loss, self._use, retain_graph=True)[0] for loss in losses[1]]

    @staticmethod
    def _losses(logits: Tensor, batch: Experience) -> list[Tensor]:
        assert batch.advantages_MBT is not None
        chosen = logits.log_softmax(-1)[:, :-1].gather(-1, batch.tokens_BT[:, 1:, None]).squeeze(-1)
        mask = batch.response_mask_BT[:, 1:]
        ratio = (chosen - batch.old_logprobs_BT[:, 1:].double())[mask].exp()
        return [
            -torch.min(ratio * a, ratio.clamp(0.9, 1.1) * a).mean()
            for a in (advantages_BT[:, 1:][mask] for advantages_BT in batch.advantages_MBT.double())
        ]

    def rows(self, scope: Any = "full") -> Tensor:
        """The gradients in ``scope``, flattened [M, N]."""
        wanted = [self._in_scope(name, scope) for name in self.names]
        rows = []
        for grads, head in zip(self.grads, self.head, strict=True):
            parts = [g.flatten() for g, take in zip(grads, wanted, strict=True) if take]
            rows.append(
                torch.cat([*parts, head.flatten()] if scope in ("last_layer", "last_block") else parts)
            )
        return torch.stack(rows)

    @staticmethod
    def _in_scope(name: str, scope: Any) -> bool:
        if scope == "full":
            return True
        ranges = {"last_layer": [], "last_block": [[3, 4]]}[scope] if isinstance(scope, str) else scope
        return any(f".layers.{i}." in name for first, end in ranges for i in range(first, end))


def error(gram: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of ||g_i|| ||g_j||."""
    norms = expected.diagonal().sqrt()
    return float(((gram - expected).abs() / torch.outer(norms, norms)).max())


def flat(directory: Path) -> Tensor:
    exported = LlamaForCausalLM.from_pretrained(directory).double()
    return torch.cat([p.detach().flatten() for p in exported.parameters()])


@pytest.mark.parametrize(("gradients", "micro_batch", "tolerance"), CASES)
def test_against_autograd(
    model: Path, tmp_path: Path, gradients: dict[str, Any], micro_batch: int, tolerance: float
) -> None:
    """Losses, Gram matrix and update of the first step, then the Gram matrix of the second."""
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    with engine_of(model, gradients, micro_batch, SGD) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        report = engine.update_policy(batch, check_engine.loss, aggregator)
        engine.export_hf(tmp_path / "one")
        second = engine.update_policy(batch, check_engine.loss, aggregator)
    reference = Reference(model, batch)
    scope = gradients.get("scope", "full")
    rows = reference.rows(scope)
    torch.testing.assert_close(torch.tensor(report.losses).double(), reference.losses, rtol=1e-5, atol=1e-6)
    assert error(report.gram, rows @ rows.T) <= tolerance
    start = torch.cat([p.detach().flatten() for p in reference.model.parameters()])
    expected = RATE * (aggregator(rows @ rows.T) @ reference.rows())
    difference = (flat(tmp_path / "one") - start + expected).norm() / expected.norm()
    # The weights follow the Gram matrix's error and the change is a difference of fp32 parameters.
    assert float(difference) <= 10 * tolerance + 1e-4
    after = Reference(tmp_path / "one", batch).rows(scope)
    assert error(second.gram, after @ after.T) <= 10 * tolerance
