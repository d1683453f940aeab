"""The demo's compute type is that of the faster product, and not what a processor's flags say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gapo_mega.demo import dtype

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("bf16", "expected"),
    [(0.3, "bf16"), (0.85, "bf16"), (0.95, "fp32"), (1.6, "fp32"), (40.0, "fp32")],  # of fp32's seconds
)
def test_bf16_only_where_it_is_clearly_faster(bf16: float, expected: str) -> None:
    assert dtype.choose({"fp32": 2e-3, "bf16": 2e-3 * bf16}) == expected


def test_turns_end_with_the_time_and_the_least_counts() -> None:
    """A machine that has bf16 and emulates it: few turns are taken."""
    seconds = {"fp32": iter([9.0, 0.02, 0.01, 0.03]), "bf16": iter([9.0, 0.4, 0.5, 0.3])}
    least = dtype.least_seconds({name: found.__next__ for name, found in seconds.items()})
    assert least == {"fp32": 0.01, "bf16": 0.4}  # the first of each is a warm-up; 0.51 s end the turns
    assert dtype.choose(least) == "fp32"


def test_real_products_are_timed_in_both_types(capsys: pytest.CaptureFixture[str]) -> None:
    least = dtype.least_seconds(dtype.products_on(torch.device("cpu")))
    assert set(least) == {"fp32", "bf16"} and min(least.values()) > 0
    dtype.main()
    assert capsys.readouterr().out in ("fp32\n", "bf16\n")


def test_make_demo_asks_it_unless_it_is_told() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = "model.dtype=$(or $(DTYPE),$$($(BIN)/python -m gapo_mega.demo.dtype))"
    assert asked in text and "cpuinfo" not in text
