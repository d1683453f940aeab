"""Normalizations, the entropy bonus and what is measured of the policy, against transformers in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import check_policy, worlds
from tests.helpers.tiny import tiny_llama

SEPARATE, SHARED, ONE_PASS = ({"forward": kind} for kind in ("separate", "shared", "one_pass"))
CASES: list[tuple[str, float, dict[str, Any], int]] = [
    ("token_mean", 0.0, SEPARATE, 2),
    ("token_mean", 0.02, ONE_PASS, 2),
    ("sequence_mean", 0.0, ONE_PASS, 8),
    ("sequence_mean", 0.02, SHARED, 2),
    ("sequence_mean", 0.02, {"store": "single", **SEPARATE}, 2),
    ("fixed_length", 0.02, SEPARATE, 2),
    ("fixed_length", 0.0, ONE_PASS, 2),
    ("fixed_length", 0.02, {"store": "single", **SHARED}, 8),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("policy") / "model"
    tiny_llama(directory, tied=True)
    yield directory
    worlds.leave()


@pytest.mark.parametrize(("normalization", "beta", "gradients", "micro_batch"), CASES)
def test_an_update_is_that_of_the_whole_batch(
    model: Path, normalization: str, beta: float, gradients: dict[str, Any], micro_batch: int
) -> None:
    found = check_policy.run(
        {
            "model": str(model),
            "layout": {},
            "normalization": normalization,
            "entropy_beta": beta,
            "entropy": beta == 0,
            "sections": {"gradients": gradients, "micro_batch_size": micro_batch},
        }
    )
    worst = check_policy.differences(found, check_policy.expected(model, normalization, beta))
    # fp32 through four layers against float64; shares of tokens are counts.
    assert max(worst.values()) <= 1e-5, worst
    assert worst["clipped"] <= 1e-12 and "entropy" in worst


@pytest.mark.parametrize("scope", ["last_layer", "last_block"])
@pytest.mark.parametrize("forward", ["shared", "separate"])
def test_each_microbatch_is_measured_once_whatever_passes_a_scope_takes(
    model: Path, scope: str, forward: str
) -> None:
    found = check_policy.run(
        {
            "model": str(model),
            "layout": {},
            "normalization": "token_mean",
            "entropy_beta": 0.0,
            "entropy": False,
            "sections": {
                "gradients": {"scope": scope, "forward": forward},
                "micro_batch_size": 8 if forward == "shared" else 2,
            },
        }
    )
    worst = check_policy.differences(found, check_policy.expected(model, "token_mean", 0.0))
    del worst["gram"]  # of the scope only
    assert max(worst.values()) <= 1e-5, worst
    assert all(policy["entropy"] is None for policy in found["policy"])


@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("forward", ["one_pass", "shared", "separate"])
def test_rows_without_a_response_token_do_not_count(model: Path, normalization: str, forward: str) -> None:
    """Microbatches of such rows alone are among them."""
    dropped = [0, 2, 3, 5, 6]
    found = check_policy.run(
        {
            "model": str(model),
            "layout": {},
            "normalization": normalization,
            "entropy_beta": 0.02,
            "entropy": False,
            "dropped": dropped,
            "sections": {"gradients": {"forward": forward}, "micro_batch_size": 2},
        }
    )
    worst = check_policy.differences(
        found, check_policy.expected(model, normalization, 0.02, dropped=dropped)
    )
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize("forward", ["one_pass", "separate"])
def test_a_minibatch_without_a_response_token_has_no_gradient(model: Path, forward: str) -> None:
    found = check_policy.run(
        {
            "model": str(model),
            "layout": {},
            "normalization": "sequence_mean",
            "entropy_beta": 0.0,
            "entropy": True,
            "dropped": range(8),
            "sections": {"gradients": {"forward": forward}, "micro_batch_size": 2},
        }
    )
    assert found["losses"] == [[0.0] * 3] * 2 and found["gram"] == [[[0.0] * 3] * 3] * 2
    assert all(math.isnan(policy["kl"]) and math.isnan(policy["ratio_min"]) for policy in found["policy"])
