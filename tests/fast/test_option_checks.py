"""What checks of options share."""

from __future__ import annotations

import time

import pytest

from gapo_mega.option_checks import as_one_line, divisors, require_number


def test_divisors_are_all_and_in_order() -> None:
    for number in range(1, 400):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 97 * (2**31 - 1), (2**31 - 1) ** 2])
def test_divisors_of_absurd_numbers_cost_nothing(number: int) -> None:
    """A refusal names them; counting to the number took minutes."""
    begun = time.process_time()
    found = divisors(number)
    assert found[0] == 1 and found[-1] == number
    assert time.process_time() - begun < 5  # a tenth of a second


def test_one_line_is_printable_and_short() -> None:
    assert (
        as_one_line("a file\n\x1b[2J of \u2028 and \ud800: é")
        == "a file\\n\\x1b[2J of \\u2028 and \\ud800: é"
    )
    cut = as_one_line("a" * 5000 + "z")
    assert len(cut) <= 2000 and cut.startswith("aaa") and cut.endswith("aaz") and " [...] " in cut


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 10**40])
def test_no_option_is_larger_than_fp32_computes_with(value: float) -> None:
    require_number("threshold", -1e30)
    with pytest.raises(ValueError, match=r"^threshold: found .*, accepted: a finite number of up to 1e\+30$"):
        require_number("threshold", value)
