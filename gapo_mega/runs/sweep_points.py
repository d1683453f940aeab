"""The points of a sweep: what each one sets, what it is called, where it lies."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapo_mega.config import Config
from gapo_mega.config.sweep import METHOD, PREFERENCE, SweepConfig
from gapo_mega.evaluation.files import POINTS_FOLDER as POINTS_FOLDER
from gapo_mega.files import local
from gapo_mega.planning.methods import load
from gapo_mega.planning.preference import method_of, preference_key
from gapo_mega.runs import shared_answers
from gapo_mega.runs.directory import EXPORT_FOLDER
from gapo_mega.user_code import is_reference

WARM_START = "warm_start"
BEFORE_FOLDER = "before"  # of held-out answers before training

_LONGEST = 90  # characters of a folder's name
_UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    index: int
    name: str  # of its folder: what it sets, so that a longer grid leaves it as it is
    method: str
    preference: tuple[float, ...] | None
    seed: int
    settings: Mapping[str, Any]  # of the grid, beside method, preference and seed
    overrides: tuple[str, ...]  # of the base, output_dir last
    directory: Path
    config: Config

    @property
    def group(self) -> str:
        """The name without the seed: what the runs of several seeds share."""
        return self.name.removesuffix(f"-seed{self.seed}")


def base_file(sweep: SweepConfig, file: Path) -> Path:
    """The base's YAML file: in the working directory, or beside the sweep's file."""
    return _beside(sweep.base, file, "base")


def warm_start_file(sweep: SweepConfig, file: Path) -> Path:
    """The YAML file of the warm start, looked for as the base's is."""
    assert sweep.warm_start is not None
    return _beside(sweep.warm_start.config, file, "warm_start.config")


def warm_start_directory(sweep: SweepConfig) -> Path:
    """Where the warm start runs."""
    return local(sweep.output_dir) / WARM_START


def override(key: str, value: Any) -> str:
    """``key=value`` that ``config.loading`` reads back as it is."""
    try:
        return f"{key}={json.dumps(value, ensure_ascii=False, allow_nan=False)}"
    except (TypeError, ValueError):
        raise ValueError(f"{key}: found {value!r}, accepted: what JSON can hold") from None


def points_of(sweep: SweepConfig, file: Path) -> tuple[list[Point], list[str]]:
    """Every point in the order of the grid, seeds innermost; and notes about methods without a preference.

    A method that takes no preference has one point in place of one for each.

    Args:
        sweep: what ``file`` holds.
        file: of the sweep; the base may lie beside it.

    Raises ``ValueError`` for settings that no run can have, with the point's name where it is one point's.
    """
    base = base_file(sweep, file)
    found: list[Point] = []
    without: dict[str, None] = {}
    taken = False
    seen: set[str] = set()
    for chosen in _combinations(sweep.grid):
        values = dict(chosen)
        settings = _settings(sweep, values)
        preference = values.pop(PREFERENCE, None)
        method = values.pop(METHOD, None)
        config = load(base, settings)
        if preference is not None:
            key = preference_key(config)
            if key is None:
                without[method_of(config)[0]] = None
                preference = None
            elif key in {*sweep.settings, *values}:
                raise ValueError(f"grid.preference: found beside {key}, accepted: one of them")
            else:
                taken = True
                settings = [*settings, override(key, preference)]
        for seed in sweep.seeds or [config.seed]:
            name = _name(config, method, preference, values, seed)
            if name in seen:  # of a method without a preference, once more
                continue
            seen.add(name)
            directory = local(sweep.output_dir) / POINTS_FOLDER / name
            overrides = [*settings, override("seed", seed), override("output_dir", str(directory))]
            if config.checkpoint.export_to is not None:
                overrides.append(override("checkpoint.export_to", f"{config.checkpoint.export_to}/{name}"))
            try:
                complete = load(base, overrides)
            except ValueError as error:
                raise ValueError(f"point {len(found)} ({name}): {error}") from error
            found.append(
                Point(
                    index=len(found),
                    name=name,
                    method=_label(config, method),
                    preference=None if preference is None else tuple(map(float, preference)),
                    seed=seed,
                    settings=values,
                    overrides=tuple(overrides),
                    directory=directory,
                    config=complete,
                )
            )
    if PREFERENCE in sweep.grid and not taken:
        raise ValueError(
            f"grid.preference: found {len(sweep.grid[PREFERENCE])}, but {', '.join(without)} takes no "
            "preference; accepted: a method that does, such as p_gapo or weighted_sum"
        )
    notes = [
        f"{name} takes no preference: one point a seed in place of {len(sweep.grid[PREFERENCE])}"
        for name in without
    ]
    return found, notes


def _beside(path: str, file: Path, parameter: str) -> Path:
    candidates = list(dict.fromkeys([local(path).absolute(), (file.parent / local(path)).absolute()]))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    places = " or ".join(map(str, candidates))
    raise ValueError(f"{parameter}: file {places} not found; accepted: a YAML file")


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    # Methods outermost, then preferences: the order in which people read a table.
    keys = sorted(grid, key=lambda key: (key != METHOD, key != PREFERENCE))
    for values in itertools.product(*(grid[key] for key in keys)):
        yield tuple(zip(keys, values, strict=True))


def _settings(sweep: SweepConfig, values: Mapping[str, Any]) -> list[str]:
    chosen = {**sweep.settings, **{key: value for key, value in values.items() if key != PREFERENCE}}
    chosen.setdefault(shared_answers.PARAMETER, str((local(sweep.output_dir) / BEFORE_FOLDER).absolute()))
    if sweep.warm_start is not None:
        chosen["model.path"] = str((warm_start_directory(sweep) / EXPORT_FOLDER).absolute())
    return [override(key, value) for key, value in chosen.items()]


def _label(config: Config, method: object) -> str:
    """The method's name, with the options that the grid gives it."""
    name, _ = method_of(config)
    short = name.rpartition(":")[2]
    options = method.get("options") if isinstance(method, dict) else None
    if not options:
        return short
    return f"{short}({', '.join(f'{key}={_text(value)}' for key, value in options.items())})"


def _name(
    config: Config, method: object, preference: Sequence[float] | None, values: Mapping[str, Any], seed: int
) -> str:
    parts = [_label(config, method)]
    parts += [] if preference is None else ["_".join(_text(number) for number in preference)]
    parts += [f"{key}={_text(value)}" for key, value in sorted(values.items())]
    plain = "-".join(parts)
    safe = _UNSAFE.sub("_", plain)
    if safe != plain or len(safe) > _LONGEST or is_reference(method_of(config)[0]):
        # What was cut or replaced still tells points apart.
        exact = json.dumps([plain, method_of(config)[0]], ensure_ascii=False)
        digest = hashlib.sha256(exact.encode("utf-8", "backslashreplace")).hexdigest()[:8]
        safe = f"{safe[:_LONGEST].rstrip('._-')}-{digest}"
    return f"{safe}-seed{seed}"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return json.dumps(value, sort_keys=True, default=str)
