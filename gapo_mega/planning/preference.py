"""Which option of a run's method takes the user's preference: one number per objective."""

from __future__ import annotations

import inspect

from gapo_mega import aggregation, scalarization
from gapo_mega.aggregation import Aggregator
from gapo_mega.config import Config
from gapo_mega.registry import find
from gapo_mega.scalarization import Scalarizer
from gapo_mega.user_code import is_reference

# What the package's methods call it. Other options with a number per objective (the losses of a method that
# divides by them) say something else.
_NAMES = ("preference", "weights")


def method_of(config: Config) -> tuple[str, dict[str, object]]:
    """Name and options of what makes one step of several objectives: the scalarizer, or the aggregator."""
    chosen = config.aggregation if config.scalarization is None else config.scalarization
    return chosen.name, dict(chosen.options)


def preference_key(config: Config) -> str | None:
    """The dotted name of the setting that takes the preference; None where the method has none.

    It is an option named ``preference`` or ``weights`` that ``per_objective`` of the method names once it is
    given; of a user's own aggregator also the one that ``equal_when_left_out`` names. Raises ``ValueError``
    for a method that cannot be built.
    """
    section = "aggregation" if config.scalarization is None else "scalarization"
    name, options = method_of(config)
    equal = [1.0 / len(config.objectives)] * len(config.objectives)
    candidates = list(_NAMES)
    kind: type[Aggregator] | type[Scalarizer]
    if section == "aggregation":
        kind = aggregator = find("aggregation.name", aggregation.methods(), Aggregator, name)
        if is_reference(name) and aggregator.equal_when_left_out is not None:
            candidates.append(aggregator.equal_when_left_out)
    else:
        kind = find("scalarization.name", scalarization.scalarizers(), Scalarizer, name)
    accepted = inspect.signature(kind).parameters
    build = aggregation.build if section == "aggregation" else scalarization.build
    build(name, **options)
    for option in candidates:
        if option not in accepted:
            continue
        try:
            built = build(name, **{**options, option: equal})
        except ValueError:  # an option that these others rule out, as that of gapo without rates
            continue
        if option in built.per_objective():
            return f"{section}.options.{option}"
    return None
