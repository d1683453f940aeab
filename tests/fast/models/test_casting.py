"""Types of weights: rounding is allowed where it is asked for, infinity is not. numpy is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gapo_mega.models.casting import cast, is_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [0.0, -1.5, float("nan"), float("inf"), float("-inf")])
def test_finite_is_what_numpy_says(dtype: torch.dtype, number: float) -> None:
    tensor = torch.linspace(-3, 3, 12, dtype=dtype).view(3, 4)
    tensor[1, 2] = number
    assert is_finite(tensor) == bool(np.isfinite(tensor.double().numpy()).all())


def test_nothing_is_finite_where_there_is_nothing() -> None:
    assert is_finite(torch.zeros(0, 4))


@pytest.mark.parametrize("number", [65504.0, 65519.0, 65520.0, -65536.0, 7e4, 1e-9])
def test_fp16_is_refused_exactly_where_numpy_overflows(number: float) -> None:
    tensor = torch.tensor([1.0, number, 3.0])
    with np.errstate(over="ignore"):
        expected = tensor.numpy().astype(np.float16)
    if np.isfinite(expected).all():
        assert np.array_equal(cast(tensor, torch.float16, "w").numpy(), expected)
    else:
        with pytest.raises(ValueError, match=r"^w: found a number of size .*, accepted: at most 6.55e\+04"):
            cast(tensor, torch.float16, "w")


def test_stored_infinity_is_not_blamed_on_the_type() -> None:
    tensor = torch.tensor([float("inf"), float("nan"), 2.0])
    assert cast(tensor, torch.float16, "w")[0] == float("inf")
    with pytest.raises(ValueError, match=r"size 1e\+05"):
        cast(torch.tensor([float("inf"), 1e5]), torch.float16, "w")
