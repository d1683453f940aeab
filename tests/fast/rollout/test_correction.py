"""Correction weights and the measured mismatch against numpy in float64, and what a batch does with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gapo_mega.advantages import build
from gapo_mega.config import AlgorithmConfig
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.correction import Correction, Kind, correction_of
from gapo_mega.rollout.experience import ExperienceMaker
from gapo_mega.rollout.mismatch import mismatch
from gapo_mega.types import Experience, Prompt
from tests.helpers.fake_engine import FakeEngine, FakeTokenizer
from tests.helpers.scoring import Length, no_time, scorer

# Log-probabilities are float32; a difference of two of size 10 is exact to 1e-6.
RELATIVE = 1e-5


def log_probabilities(rows: int, columns: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of trainer and rollout, and the response mask; NaN off the response, which must not matter."""
    rng = np.random.default_rng(7)
    mask = np.arange(columns) < rng.integers(0, columns + 1, size=rows)[:, None]
    rollout = -rng.gamma(2.0, 1.0, size=(rows, columns))
    trainer = rollout + spread * rng.standard_t(3, size=(rows, columns))
    return (
        torch.from_numpy(np.where(mask, trainer, np.nan)).float(),
        torch.from_numpy(np.where(mask, rollout, np.nan)).float(),
        torch.from_numpy(mask),
    )


def expected_weights(kind: Kind, trainer: np.ndarray, rollout: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weights = np.zeros(mask.shape)
    for row in range(len(mask)):
        own = mask[row]
        ratio = np.exp(trainer[row, own] - rollout[row, own])
        if kind == "tis":
            weights[row, own] = np.minimum(ratio, 2.0)
        elif kind == "mask":
            weights[row, own] = np.where((ratio >= 0.5) & (ratio <= 5.0), ratio, 0.0)
        else:
            whole = np.prod(ratio)
            weights[row, own] = whole if 0.5 <= whole <= 5.0 else 0.0
    return weights


@pytest.mark.parametrize("kind", ["tis", "mask", "sequence"])
@pytest.mark.parametrize("spread", [0.01, 0.5])
def test_weights_are_those_of_numpy(kind: Kind, spread: float) -> None:
    trainer_BT, rollout_BT, mask_BT = log_probabilities(40, 9, spread)
    found_BT = Correction(kind).weights(trainer_BT, rollout_BT, mask_BT)
    wanted = expected_weights(kind, trainer_BT.double().numpy(), rollout_BT.double().numpy(), mask_BT.numpy())
    np.testing.assert_allclose(found_BT.numpy(), wanted, rtol=RELATIVE)
    if spread == 0.5:  # the bounds are met, so that the test sees them
        assert (wanted == (2.0 if kind == "tis" else 0.0))[mask_BT.numpy()].any()


def test_bounds_are_of_the_configuration_and_belong_to_what_is_kept() -> None:
    ratio = torch.tensor([[0.25, 0.51, 1.0, 3.99, 8.0]])
    mask_BT, zeros_BT = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5)
    kept = Correction("mask", low=0.5, high=4.0).weights(ratio.log(), zeros_BT, mask_BT)
    assert (kept > 0).tolist() == [[False, True, True, True, False]]
    cut = Correction("tis", cap=0.75).weights(ratio.log(), zeros_BT, mask_BT)
    assert cut.tolist()[0] == pytest.approx([0.25, 0.51, 0.75, 0.75, 0.75])


def test_equal_distributions_have_the_weight_one_exactly() -> None:
    trainer_BT, _, mask_BT = log_probabilities(8, 5, 0.0)
    kinds: list[Kind] = ["tis", "mask", "sequence"]
    for kind in kinds:
        found_BT = Correction(kind).weights(trainer_BT, trainer_BT, mask_BT)
        assert torch.equal(found_BT, mask_BT.float())


def test_a_token_that_one_of_them_rules_out_has_a_finite_weight() -> None:
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    trainer_BT, rollout_BT = torch.tensor([[-torch.inf, 0.0]]), torch.tensor([[-1.0, -1e4]])
    assert Correction("tis").weights(trainer_BT, rollout_BT, mask_BT).tolist() == [[0.0, 2.0]]
    assert Correction("mask").weights(trainer_BT, rollout_BT, mask_BT).tolist() == [[0.0, 0.0]]


def split(ranks: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.tensor_split(ranks) for tensor in tensors), strict=True))


class Split(FakeEngine):
    """One of several ranks, whose parts are computed beforehand: all-reduce and all-gather over them."""

    def __init__(self, parts: Sequence[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._parts = parts
        self._sums: list[Tensor] = []
        self._gathered: list[Any] = []

    def mismatch(self) -> dict[str, float]:
        """Run every rank twice: once to hear what it contributes, once with the contributions of all."""
        for part in self._parts:
            with pytest.raises(_Heard) as heard:
                mismatch(_Asking(heard=[]), *part)  # type: ignore[arg-type]
            self._sums.append(heard.value.args[0])
        total = torch.stack(self._sums).sum(dim=0)
        for part in self._parts:
            with pytest.raises(_Heard) as heard:
                mismatch(_Asking(heard=[total]), *part)  # type: ignore[arg-type]
            self._gathered.append(heard.value.args[0])
        answers = [
            mismatch(_Asking(heard=[total], gathered=self._gathered), *part)  # type: ignore[arg-type]
            for part in self._parts
        ]
        assert all(answer == answers[0] for answer in answers)
        return answers[0]


class _Heard(Exception):
    """What a rank contributes to the first collective that has no answer yet."""


@dataclasses.dataclass
class _Asking:
    heard: list[Tensor]
    gathered: list[Any] | None = None

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        if not self.heard:
            raise _Heard(tensor)
        return self.heard[0]

    def gather_over_data(self, value: Any) -> list[Any]:
        if self.gathered is None:
            raise _Heard(value)
        return self.gathered


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_mismatch_is_that_of_numpy_whatever_the_ranks(rows: int, ranks: int) -> None:
    parts = log_probabilities(rows, 40, 0.5)
    found = Split(split(ranks, *parts)).mismatch()
    trainer, rollout, mask = (part.numpy() for part in parts)
    difference = (trainer.astype(np.float64) - rollout.astype(np.float64))[mask]
    size, ratio = np.abs(difference), np.exp(difference)
    assert found == pytest.approx(
        {
            "logprob_difference/mean": size.mean(),
            "logprob_difference/max": size.max(),
            "logprob_difference/p999": np.quantile(size, 0.999),
            "logprob_difference/kl": (ratio - 1 - difference).mean(),
            "logprob_difference/outside": ((ratio < 0.5) | (ratio > 5)).mean(),
        },
        rel=1e-9,  # float64 on both sides, summed in another order
    )


def test_without_a_token_nothing_differs() -> None:
    nothing = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert set(mismatch(FakeEngine(), *nothing).values()) == {0.0}


# -- which runs are corrected ----------------------------------------------------------------------------


def chosen(samples_policy: bool, exact: bool, **algorithm: Any) -> str:
    found = correction_of(AlgorithmConfig(**algorithm), samples_policy=samples_policy, exact=exact)
    return "none" if found is None else found.kind


def test_the_default_depends_on_where_rollouts_come_from() -> None:
    assert chosen(True, True) == chosen(True, False) == "none"
    assert chosen(False, False) == "tis"
    assert chosen(False, False, old_logprobs="generator") == "none"
    assert chosen(False, False, correction="none") == "none"
    assert chosen(True, False, correction="sequence") == "sequence"  # in bf16 there is a difference
    assert chosen(True, True, correction="sequence") == "none"  # in fp32 it is rounding


# -- what a batch does with it ---------------------------------------------------------------------------


def experience(correction: Correction | None, whitened: bool = False) -> tuple[Experience, dict[str, float]]:
    engine, tokenizer = FakeEngine(), FakeTokenizer()
    objectives = [Length("length"), Length("again")]
    parts: Any = (
        engine,
        Collector(engine, tokenizer, SamplingParameters(max_new_tokens=6)),  # type: ignore[arg-type]
        scorer(engine, objectives, kl_beta=0.1),
        build("group"),
        ["length", "again"],
    )
    maker = ExperienceMaker(*parts, samples=4, whitened=whitened, timer=no_time, correction=correction)
    made, facts = maker.make([Prompt(i, f"w{i}", (2 + i,)) for i in range(3)], seed=1)
    return made, facts.extra


@pytest.mark.parametrize("whitened", [False, True])
def test_every_objective_s_advantages_take_the_same_weights(whitened: bool) -> None:
    plain, _ = experience(None, whitened)
    corrected, facts = experience(Correction("tis", cap=1.1), whitened)
    assert plain.correction_BT is None and plain.advantages_MBT is not None
    # The fake generator says -0.125 of every token, and the fake trainer -0.001 times its number.
    mask = plain.response_mask_BT.numpy()
    weights = np.where(mask, np.minimum(np.exp(-0.001 * plain.tokens_BT.double().numpy() + 0.125), 1.1), 0.0)
    assert corrected.correction_BT is not None and corrected.advantages_MBT is not None
    np.testing.assert_allclose(corrected.correction_BT.numpy(), weights, rtol=RELATIVE)
    np.testing.assert_allclose(
        corrected.advantages_MBT.numpy(), plain.advantages_MBT.numpy() * weights, rtol=RELATIVE, atol=1e-7
    )
    assert facts["correction/weight"] == pytest.approx(weights[mask].mean(), rel=RELATIVE)
    assert facts["correction/held"] == pytest.approx((weights[mask] >= 1.1).mean())
