"""``results.json`` as points end one after another: the reference point is fixed once, and stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import pytest
import yaml

from gapo_mega.config.loading import load
from gapo_mega.config.sweep import SweepConfig
from gapo_mega.evaluation.finished_run import FinishedRun
from gapo_mega.runs.sweep_points import Point, points_of
from gapo_mega.runs.sweep_results import check_front, point_directories, write_results
from gapo_mega.runs.sweep_states import StateName
from tests.helpers.finished_runs import NAMES, UPDATES, leave_run

BASE: dict[str, Any] = {
    "output_dir": "unused",
    "steps": UPDATES,
    "model": {"path": "model"},
    "data": {"source": "package:prompts"},
    "rollout": {"prompts_per_step": 2, "samples_per_prompt": 4},
    "objectives": [{"name": n, "function": f"gapo_mega.demo.rewards:{n}"} for n in NAMES],
}


class Sweep:
    """Two preferences with each of ``seeds``, of which some have ended."""

    def __init__(self, folder: Path, seeds: list[int], **keys: Any) -> None:
        (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
        grid = {"method": ["p_gapo"], "preference": [[0.2, 0.8], [0.8, 0.2]]}
        settings = {"base": "base.yaml", "output_dir": str(folder / "out"), "seeds": seeds, "grid": grid}
        file = folder / "sweep.yaml"
        file.write_text(json.dumps({**settings, **keys}))
        self.settings = load(file, kind=SweepConfig)
        self.points: list[Point] = points_of(self.settings, file)[0]
        self.ended: dict[str, FinishedRun] = {}

    def end(self, *seeds: int) -> None:
        for point in self.points:
            if point.seed in seeds:
                shift = 0.5 if point.preference == (0.2, 0.8) else 0.6
                self.ended[point.name] = leave_run(point.directory, point.config, shift)

    def write(self, final: bool = False) -> dict[str, Any]:
        states: dict[str, StateName] = {
            point.name: "finished" if point.name in self.ended else "new" for point in self.points
        }
        return write_results(self.settings, self.points, states, final=final)


def before(runs: dict[str, FinishedRun], preference: str) -> dict[str, float]:
    own = [run for name, run in runs.items() if preference in name]
    return {name: float(np.mean([run.summary[name].before for run in own])) for name in NAMES}


def test_the_reference_point_is_fixed_when_every_seed_has_a_point(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [1, 2])
    sweep.end(1)
    early = sweep.write()
    assert early["reference_point"] is None and early["hypervolume"] is None
    assert early["front"]["union_front"], "the front needs no reference point"
    sweep.end(2)
    whole = sweep.write()
    assert whole["reference_point"]["values"] == pytest.approx(before(sweep.ended, "0.2_0.8"))
    assert "seeds 1, 2" in whole["reference_point"]["from"]
    longer = Sweep(tmp_path, [1, 2, 3])
    longer.ended = dict(sweep.ended)
    longer.end(3)
    more = longer.write(final=True)
    assert more["reference_point"] == whole["reference_point"]
    groups = [[r.after(NAMES) for n, r in longer.ended.items() if p in n] for p in ("0.2_0.8", "0.8_0.2")]
    means = np.array([np.mean(group, axis=0) for group in groups])
    reference = [whole["reference_point"]["values"][name] for name in NAMES]
    assert more["hypervolume"] == pytest.approx(moocore.hypervolume(means, ref=reference, maximise=True))
    assert more["front"]["methods"]["p_gapo"]["hypervolume_by_seed"].keys() == {"1", "2", "3"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == more


def test_at_the_end_the_seeds_that_there_are_fix_it(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [1, 2])
    sweep.end(1)
    assert sweep.write(final=True)["reference_point"]["values"] == pytest.approx(
        before(sweep.ended, "0.2_0.8")
    )


def test_a_reference_point_of_ones_own(tmp_path: Path) -> None:
    own = {"concise": -3.0, "plain": -3.0}
    sweep = Sweep(tmp_path, [1], front={"reference_point": own})
    sweep.end(1)
    found = sweep.write()
    assert found["reference_point"] == {"values": own, "from": "front.reference_point"}
    after = np.array([run.after(NAMES) for run in sweep.ended.values()])
    assert found["hypervolume"] == pytest.approx(moocore.hypervolume(after, ref=[-3.0, -3.0], maximise=True))
    assert found["front"]["confidence_from"] == "held-out prompts"
    moved = Sweep(tmp_path, [1], front={"reference_point": {"concise": -3.0, "plain": -2.0}})
    with pytest.raises(ValueError, match="which stays"):
        check_front(moved.settings, moved.points)


def test_some_of_the_objectives_span_the_front(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [1], front={"objectives": ["plain"]})
    sweep.end(1)
    found = sweep.write(final=True)
    best = max(run.summary["plain"].after for run in sweep.ended.values())
    assert found["objectives"] == ["plain"]
    assert found["hypervolume"] == pytest.approx(best - found["reference_point"]["values"]["plain"])
    assert set(found["points"][0]["heldout"]) == set(NAMES)


def test_nothing_has_ended(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [1])
    (tmp_path / "out").mkdir()
    found = sweep.write(final=True)
    assert found["front"] is None and found["reference_point"] is None
    assert [point["state"] for point in found["points"]] == ["new", "new"]


def test_a_sweep_stands_for_its_points(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [1, 2])
    sweep.end(2)
    (sweep.points[0].directory).mkdir(parents=True)
    ended, others = point_directories([tmp_path / "out", tmp_path / "elsewhere"])
    assert ended == [*(p.directory for p in sweep.points if p.seed == 2), tmp_path / "elsewhere"]
    assert others == [sweep.points[0].directory]
