"""The finished results of a folder, a file each; what is not there is computed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.testbed import cells, preferences
from benchmarks.testbed.cells import Plan
from benchmarks.testbed.methods import METHODS, Setting

COMPUTE, FRONT = "compute", "front"  # kinds of results, which end a file's name, beside the cells
LISTS = {"": "cells", COMPUTE: "equal_compute", FRONT: "fronts"}  # where results.json has each kind


@dataclass(frozen=True)
class Store:
    """Results of one plan in a folder."""

    folder: Path
    plan: Plan

    def get(self, regime: str, name: str, kind: str = "") -> dict[str, Any]:
        """The cell, or what was measured with the setting that its tuning chose."""
        path = path_of(self.folder, regime, name, kind)
        if not kind:
            what = self.plan.told(METHODS[name])
            return self.kept(path, what, lambda: cells.measured(regime, name, self.plan))
        setting = Setting(**self.get(regime, name)["tuned"])
        what = cells.told_with(self.plan, METHODS[name], setting)
        measure = cells.at_equal_compute if kind == COMPUTE else preferences.front_of
        return self.kept(path, what, lambda: measure(regime, name, self.plan, setting))

    def finished(self, regime: str, name: str, kind: str = "") -> dict[str, Any] | None:
        """The result in the folder, None where there is none of this plan and of the method as it is."""
        found = read(path_of(self.folder, regime, name, kind))
        wanted = self.plan.told(METHODS[name])
        return found if found is not None and wanted.items() <= found["what"].items() else None

    def adopt(self, results: Path) -> int:
        """Take what another folder's ``results.json`` holds and this one does not; how many that were.

        Raises:
            ValueError: something else lies there.
        """
        taken = 0
        try:
            lists = json.loads(results.read_text(encoding="utf-8"))
            for kind, key in LISTS.items():
                for one in lists[key]:
                    path = path_of(self.folder, one["regime"], one["method"], kind)
                    here = read(path)
                    if here is None or here["what"] != one["what"]:
                        write(path, one)
                        taken += 1
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            accepted = "results.json of the test bed, with the plan of every result (what)"
            raise ValueError(f"known: found {results}, accepted: {accepted}") from error
        return taken

    def kept(self, path: Path, what: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result in a file, made and written unless one of the same ``what`` lies there."""
        found = read(path)
        if found is None or found["what"] != what:
            write(path, {**make(), "what": what})
            found = read(path)
            assert found is not None and found["what"] == what, path
        return found


def path_of(folder: Path, regime: str, method: str, kind: str) -> Path:
    """The file of a result."""
    return folder / ("--".join(filter(None, (regime, method, kind))) + ".json")


def read(path: Path) -> dict[str, Any] | None:
    """The result in a file, None where there is no file.

    Raises:
        ValueError: something else lies there.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found["what"], dict)
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"out: found {path}, accepted: a result of the test bed; remove it") from error
    return found


def write(path: Path, cell: dict[str, Any]) -> None:
    """Write the cell whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}.part")  # several processes may write the same
    whole.write_text(json.dumps(_rounded(cell)), encoding="utf-8")
    whole.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float | np.floating) else value
