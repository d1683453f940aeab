"""An engine without a model, for tests of what stands above engines. It keeps a record of its calls.

Its policy is one number. Responses depend on it, on the prompt and on the seed, and every update moves it, so
that two runs agree only where they did the same things in the same order.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gapo_mega.engine.base import (
    Aggregator,
    BackgroundSave,
    GradientReport,
    Layout,
    PolicyLossSum,
    SamplingParameters,
    ValueLoss,
)
from gapo_mega.models.checkpoint_files import Listing, measured
from gapo_mega.objectives.base import ScoreModelRequest, TokenScorer
from gapo_mega.types import Experience, Generation, TokenBatch

WORDS = ["<pad>", "<end>", *(f"w{i}" for i in range(40))]
END = 1


def layout(rank: int = 0, world: int = 1, data: int = 1) -> Layout:
    """``data`` replicas of ``world / data`` tensor ranks."""
    tensor = world // data
    return Layout(
        world=world,
        rank=rank,
        tensor=tensor,
        pipeline=1,
        data=data,
        data_rank=rank // tensor,
        tensor_rank=rank % tensor,
        pipeline_rank=0,
    )


class FakeTokenizer:
    """Words of ``WORDS``; the only thing that rollouts ask of a tokenizer is to decode."""

    def decode(self, tokens: Tensor, skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return " ".join(WORDS[int(token)] for token in tokens if int(token) > END)


class FakeEngine:
    """One rank of world ``layout``. ``calls`` has the name of every method that was called, in order.

    Args:
        at: by (method, how often it has been called, from 1): what else happens then.
    """

    def __init__(
        self, place: Layout | None = None, at: dict[tuple[str, int], Callable[[], object]] | None = None
    ) -> None:
        self.layout = place or layout()
        self.calls: list[str] = []
        self.prompts: list[tuple[int, ...]] = []
        self.policy = 1
        self.changes = 0
        self.looks = 1  # at a save in the background, before it is done
        self.looking: Callable[[], None] = lambda: None  # at each of them
        self.finite = True
        self.next_report: dict[str, Any] = {}
        self.kl_rows = 0  # after those of the objectives
        self.at = at or {}

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.at.get((name, self.calls.count(name)), lambda: None)()

    # -- generator: the engine is its own --------------------------------------------------------------
    @property
    def generator(self) -> FakeEngine:
        return self

    def update_weights(self) -> None:
        self._called("update_weights")

    def rest(self) -> None:
        pass

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int
    ) -> Generation:
        """Responses of 1 to ``max_new_tokens`` tokens; the last one ends them."""
        self._called("generate")
        self.prompts += [tuple(prompt) for prompt in prompts]
        rows: list[list[int]] = []
        for number, prompt in enumerate(prompts):
            draw = random.Random(f"{seed} {number} {self.policy}")
            response = draw.choices(range(END + 1, len(WORDS)), k=draw.randrange(sampling.max_new_tokens))
            rows.append([*prompt, *response, END])
        width = max(map(len, rows), default=0)
        tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
        prompt_B = torch.tensor([len(prompt) for prompt in prompts])
        length_B = torch.tensor([len(row) for row in rows])
        position_T = torch.arange(width)
        mask_BT = (position_T >= prompt_B[:, None]) & (position_T < length_B[:, None])
        finished_B = torch.ones(len(rows), dtype=torch.bool)
        return Generation(tokens_BT, prompt_B, mask_BT, -0.125 * mask_BT, finished_B)

    # -- forward passes and updates ----------------------------------------------------------------------
    def logprobs(self, batch: TokenBatch, model: Literal["policy", "reference"]) -> Tensor:
        self._called(f"logprobs {model}")
        scale = self.policy if model == "policy" else 1
        return -0.001 * scale * batch.tokens_BT * batch.response_mask_BT

    def values(self, batch: TokenBatch) -> Tensor:
        self._called("values")
        return torch.zeros(2, *batch.tokens_BT.shape)

    def score_model(self, request: ScoreModelRequest) -> TokenScorer:
        self._called("score_model")
        return lambda tokens: [float(len(row)) for row in tokens]

    def update_policy(
        self, minibatch: Experience, loss: PolicyLossSum, aggregator: Aggregator, *, audit: bool = False
    ) -> GradientReport:
        """Losses at the policy that sampled; a Gram matrix of advantages. Moves the policy.

        The "gradient" of a KL row is the drift from the reference.
        """
        self._called("update_policy")
        assert minibatch.advantages_MBT is not None
        count = len(minibatch.advantages_MBT) + self.kl_rows
        losses = [float(loss(minibatch.old_logprobs_BT, minibatch, k)) for k in range(count)]
        drift_BT = (minibatch.old_logprobs_BT - minibatch.ref_logprobs_BT) * minibatch.response_mask_BT
        parts = [minibatch.advantages_MBT, *[drift_BT[None]] * self.kl_rows]
        rows = torch.cat(parts).double().flatten(1)
        gram = rows @ rows.t() + torch.eye(count, dtype=torch.float64)
        weights = aggregator(gram)
        self.changes += 1
        self.policy = (self.policy * 31 + int(minibatch.tokens_BT.sum())) % 997
        settings: dict[str, Any] = {"gradient_norm": 1.0, "clip_factor": 1.0, "learning_rate": 0.1}
        settings |= {"seconds": {"forward_backward/0": 0.5, "aggregate": 0.25}} | self.next_report
        return GradientReport(losses=losses, gram=gram, weights=weights, **settings)

    def update_critic(self, minibatch: Experience, loss: ValueLoss) -> list[float]:
        self._called("update_critic")
        assert minibatch.values_MBT is not None
        return [float(loss(minibatch.values_MBT[k], minibatch, k)) for k in range(2)]

    def peak_memory(self) -> int:
        return 4096

    # -- communication: this rank is alone ---------------------------------------------------------------
    def sum_over_data(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def gather_over_data(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_in_replica(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass

    def gather_parameters(self) -> None:
        pass

    def is_finite(self) -> bool:
        return self.finite

    # -- persistence -------------------------------------------------------------------------------------
    def save(self, directory: Path, extra: dict[str, Any]) -> None:
        self._called("save")
        (directory / "state.json").write_text(json.dumps({"policy": self.policy, "extra": extra}))

    def save_in_background(self, directory: Path, extra: dict[str, Any]) -> BackgroundSave:
        self._called("save_in_background")
        return Writing(self, directory, json.dumps({"policy": self.policy, "extra": extra}))

    def random_states(self) -> dict[str, Any]:
        return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}

    def restore_random_states(self, states: dict[str, Any]) -> None:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])

    def load(self, directory: Path) -> dict[str, Any]:
        self._called("load")
        self.changes += 1
        state = json.loads((directory / "state.json").read_text())
        self.policy = state["policy"]
        extra: dict[str, Any] = state["extra"]
        return extra

    def export_hf(self, directory: Path) -> None:
        self._called("export_hf")
        directory.mkdir()

    def export_adapter(self, directory: Path) -> None:
        self._called("export_adapter")
        directory.mkdir()

    def close(self) -> None:
        self._called("close")


class Writing:
    """A state that is written with the last of ``engine.looks`` looks, or with the end of the wait for it."""

    def __init__(self, engine: FakeEngine, directory: Path, state: str) -> None:
        self._engine = engine
        self._directory = directory
        self._state = state
        self._looks = 0

    def is_done(self) -> bool:
        self._engine.looking()
        self._looks += 1
        return self._looks > self._engine.looks

    def wait(self, seconds: float) -> bool:
        assert seconds > 0
        return self.is_done()

    def finish(self) -> Listing:
        self._engine._called("finish_save")
        if self._looks <= self._engine.looks:
            raise OSError("its files are not written yet")
        path = self._directory / "state.json"
        path.write_text(self._state)
        return {path.name: measured(path)}


def terminate() -> None:
    """What a scheduler sends before it takes the machine away."""
    os.kill(os.getpid(), signal.SIGTERM)
