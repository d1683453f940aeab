"""What YAML can say and no file, or no type, can hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from gapo_mega.option_checks import shown

Location = tuple[int | str, ...]

_LARGEST = 2**63 - 1
# Half a character, escaped; or a byte of the command line that is no UTF-8.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def first_unusable(data: Any) -> tuple[Location, str, str] | None:
    """Where the first number of ``data`` is that no type holds, or text; what was found, what is accepted.

    Also in options, which have types of their own.
    """
    for location, value in _values(data, ()):
        if isinstance(value, float) and not math.isfinite(value):
            return location, str(value), "a finite number"
        if isinstance(value, int) and abs(value) > _LARGEST:
            return location, shown(value), "a whole number of 64 bits"
        if isinstance(value, str) and _SURROGATE.search(value):
            return location, ascii(value)[:80], "UTF-8 text"
    return None


def _values(data: Any, location: Location) -> Iterator[tuple[Location, Any]]:
    """Numbers and texts, keys included, each with its place."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield (*location, key), key
            yield from _values(value, (*location, key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from _values(value, (*location, number))
    else:
        yield location, data
