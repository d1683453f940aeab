"""Values of all kinds for fuzz tests, and how many examples these run: some of a fixed seed, or FUZZ many."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONGEST_LINE = 2000  # characters of an error, the given text of 5,000 aside, which the command cuts
_LONG = "x" * 5000
# Of this process's processors, whatever else they do; a refusal takes milliseconds, and one that goes through
# more than there is never ends.
LONGEST_REFUSAL = 5.0


def examples(count: int) -> settings:
    """``count`` examples, the same every time; with FUZZ=N in the environment (make fuzz) N random ones."""
    wanted = os.environ.get("FUZZ")
    return settings(
        max_examples=int(wanted or count),
        derandomize=wanted is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def one_line(call: Callable[[], Any]) -> Any:
    """What ``call`` gives; None where it refuses in one line. Anything else that it raises is a failure.

    So is a refusal after more than ``LONGEST_REFUSAL`` seconds of the process.
    """
    begun = time.process_time()
    try:
        return call()
    except ValueError as error:
        taken = time.process_time() - begun
        text = str(error)
        assert taken < LONGEST_REFUSAL, f"{taken:.1f} s: {text[:LONGEST_LINE]}"
        own = text.replace(_LONG, "")
        assert text and len(text.splitlines()) == 1 and len(own) < LONGEST_LINE, text[:LONGEST_LINE]
        assert type(error) is not UnicodeEncodeError, text
        return None


NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, 2**63, -(2**63), 10**19, 10**400]),
    st.floats(),
    st.sampled_from([1e-45, 1e38, 4e38, 1e308, 0.5, 1e-8]),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "auto", "none", "fp32", "a:b", "a.py:b", "~", "/", "..", "\0", "\ud800", _LONG]
    ),
    st.text(max_size=12),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def _deep(depth: int, leaf: Any) -> Any:
    value: Any = leaf
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


VALUES = st.one_of(
    LEAVES,
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
        max_leaves=6,
    ),
    st.builds(_deep, st.sampled_from([30, 45, 120, 400, 900]), LEAVES),
)
