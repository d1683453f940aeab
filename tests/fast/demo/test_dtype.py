"""The demo's compute type is that of the faster product, and not what a processor's flags say."""

from __future__ import annotations

import re
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


def test_a_slow_type_loses_its_turns_and_the_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that has bf16 and emulates it: the measured times decide, and few turns are taken."""
    turns = {torch.float32: 0, torch.bfloat16: 0}

    def product(kind: torch.dtype, device: torch.device) -> object:
        def run() -> float:
            turns[kind] += 1
            return 0.1 if kind == torch.bfloat16 else 0.01

        return run

    clock = iter(range(100))  # a second for every look at the clock
    monkeypatch.setattr(dtype, "_product", product)
    monkeypatch.setattr(dtype.time, "perf_counter", lambda: float(next(clock)))
    dtype.main()
    assert capsys.readouterr().out == "fp32\n"
    assert turns == {torch.float32: 2, torch.bfloat16: 2}


def test_real_products_are_timed_in_both_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert {name for name, seconds in dtype.measure(torch.device("cpu")).items() if seconds > 0} == {
        "fp32",
        "bf16",
    }
    dtype.main()
    assert capsys.readouterr().out in ("fp32\n", "bf16\n")


def test_make_demo_asks_it_unless_it_is_told() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(
        r"model\.dtype=\$\(or \$\(DTYPE\),\$\$\(\$\(BIN\)/python -m gapo_mega\.demo\.dtype\)\)", text
    )
    assert "cpuinfo" not in text
