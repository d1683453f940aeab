"""Checks of the options of methods, which a user gives. All raise a one-line ``ValueError``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from math import isqrt
from typing import Any

# People type preferences, and write 1/3 as 0.3333.
_SUM_TOLERANCE = 1e-3
HIDDEN = "***"
LARGEST = 1e30  # so that fp32 holds what is computed with it
_LEFT_OUT = " [...] "
_USER_AND_PASSWORD = re.compile(r"(?<=//)[^/@\s]*@")


def shown(value: object, most: int = 80) -> str:
    """``value`` as an error shows it: one line of at most ``most`` characters, whatever its ``repr`` does."""
    try:
        text = repr(value)
    except Exception as error:  # such as of an integer with more digits than Python writes
        text = f"a value of type {type(value).__name__} that cannot be shown ({type(error).__name__})"
    text = " ".join(text.split()) if len(text.splitlines()) > 1 else text
    return text if len(text) <= most else text[: most - 3] + "..."


def shown_name(name: str, most: int = 40) -> str:
    """``name`` as it is if it is printable and no longer than ``most`` characters, else as ``shown`` does."""
    return name if name.isprintable() and len(name) <= most else shown(name, most)


def as_one_line(text: str, most: int = 2000) -> str:
    """``text`` as a terminal may show it, whatever names and paths are in it.

    What is no character to print, such as a line break or half of a surrogate pair, is written out. Of more
    than ``most`` characters the middle is left out: an error's beginning and end say what is wrong.
    """
    half = (most - len(_LEFT_OUT)) // 2
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else f"{text[:half]}{_LEFT_OUT}{text[-half:]}"


def divisors(number: int) -> list[int]:
    """Those of ``number`` >= 1, ascending: what a count may be that must divide it.

    Beyond 2^40 some may be missing, for which nobody has so many sequences, layers or ranks.
    """
    small = [d for d in range(1, min(isqrt(number), 1 << 20) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def without_password(text: str) -> str:
    """``text`` with user and password of every address in it hidden."""
    return _USER_AND_PASSWORD.sub(f"{HIDDEN}@", text)


def require_choice(option: str, value: object, accepted: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{option}: found {shown(value)}, accepted: {', '.join(accepted)}")


def require_bool(option: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{option}: found {shown(value)}, accepted: true, false")


def require_number(
    option: str, value: float, least: float | None = None, most: float | None = None, *, above: bool = False
) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number from ``least`` (or above it) to ``most``.

    None is larger than ``LARGEST``, whatever ``most`` is.
    """
    fits = is_number(value) and (least is None or (value > least if above else value >= least))
    too_large = is_number(value) and abs(value) > LARGEST
    if fits and not too_large and (most is None or value <= most):
        return
    limits = [] if least is None else [f"{'>' if above else '>='} {least:g}"]
    limits += [f"<= {most:g}"] if most is not None else [f"of up to {LARGEST:g}"] if too_large else []
    accepted = f"a finite number {' and '.join(limits)}".rstrip()
    raise ValueError(f"{option}: found {shown(value)}, accepted: {accepted}")


def require_preference(option: str, value: object, *, zeros: bool) -> None:
    """Raise ``ValueError`` unless ``value`` is None or one number per objective, with sum 1 within 0.001.

    ``zeros``: whether numbers may be 0; they may not be negative.
    """
    if value is None:
        return
    numbers = numbers_in(value, zeros=zeros)
    if not numbers or abs(sum(numbers) - 1.0) > _SUM_TOLERANCE:
        accepted = f"a list of numbers {'>=' if zeros else '>'} 0 with sum 1"
        raise ValueError(f"{option}: found {shown(value)}, accepted: {accepted}")


def require_weights(option: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is None or one number >= 0 per objective, not all 0."""
    if value is not None and not any(numbers_in(value, zeros=True)):
        raise ValueError(
            f"{option}: found {shown(value)}, accepted: a list of finite numbers >= 0, not all 0"
        )


def numbers_in(value: object, *, zeros: bool) -> list[float]:
    """The list ``value`` if all it holds are finite numbers > 0 (``zeros``: >= 0), else an empty one."""
    numbers: list[Any] = list(value) if isinstance(value, Sequence) else []
    fits = all(is_number(x) and (x >= 0 if zeros else x > 0) for x in numbers)
    return numbers if fits else []


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite int or float; bool and text are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN, and for integers that no float holds
