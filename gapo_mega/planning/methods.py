"""One name for how a run makes one step of several objectives: ``method: NAME`` in a configuration.

The names are those of ``gapo_mega/aggregation`` and of ``gapo_mega/scalarization``; no name is in both. A
name sets its own section with default options and takes the other one away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gapo_mega import aggregation, scalarization
from gapo_mega.aggregation import Aggregator
from gapo_mega.config import Config, loading
from gapo_mega.registry import unknown
from gapo_mega.scalarization import Scalarizer
from gapo_mega.user_code import CLASS_FORMS, is_reference, load_class, resolve

# The direction of a method changes with its name, and not the length of its steps: with a learning rate and
# a norm to clip to that were found for one, the others are compared at the same length.
DEFAULT_OPTIONS = {"scale": "mean_norm"}

KEYS = ("name", "options")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The training configuration in ``path`` as ``config.loading.load`` reads it, with ``method`` expanded.

    Raises ``ValueError`` as that does, and for a ``method`` that does not exist.
    """
    return loading.load(path, overrides, expand=expanded)


def names() -> dict[str, str]:
    """The section that every method belongs to, by its name."""
    found = {name: "aggregation" for name in aggregation.methods()}
    for name in scalarization.scalarizers():
        assert name not in found, f"{name} names an aggregator and a scalarizer"
        found[name] = "scalarization"
    return found


def check_kind(section: str, name: str) -> None:
    """Raise ``ValueError`` for a shipped method whose section is the other one."""
    own = names().get(name, section)
    if own != section:
        kind = {"aggregation": "an aggregator", "scalarization": "a scalarizer"}[own]
        raise ValueError(
            f"{section}.name: found {name}, which is {kind}; accepted: {own}.name {name}, or method={name} "
            "in place of both sections"
        )


def expanded(method: object, folders: Sequence[Path]) -> dict[str, Any]:
    """The sections of a configuration that ``method`` stands for: ``NAME``, or a mapping with its options.

    ``folders``: where a file of the user's own may lie. Raises ``ValueError`` for a name that does not exist,
    with the nearest of both kinds, and for anything else.
    """
    given: Mapping[str, Any] = method if isinstance(method, dict) else {"name": method}
    name, options = given.get("name"), given.get("options")
    fits = isinstance(name, str) and (options is None or isinstance(options, dict))
    if not fits or not set(given) <= set(KEYS):
        raise ValueError(f"method: found {method!r}, accepted: a name, or a mapping with name and options")
    assert isinstance(name, str)
    section = _section(name, folders)
    defaults = DEFAULT_OPTIONS if section == "aggregation" else {}
    chosen = {"name": name, "options": {**defaults, **(options or {})}}
    return {"aggregation": {}, "scalarization": None} | {section: chosen}


def _section(name: str, folders: Sequence[Path]) -> str:
    if is_reference(name):
        # Of whatever kind: the section's own check says what is wrong with it.
        found = load_class("method", resolve(name, folders), object)
        for section, base in (("aggregation", Aggregator), ("scalarization", Scalarizer)):
            if issubclass(found, base):
                return section
        raise ValueError(f"method: found {name}, accepted: a class derived from Aggregator or Scalarizer")
    known = names()
    if name not in known:
        raise ValueError(unknown("method", name, sorted(known), CLASS_FORMS))
    return known[name]
