"""``sweep`` and ``compare`` inside this process: what they list, print and refuse, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gapo_mega.config.loading import load
from gapo_mega.config.sweep import SweepConfig
from gapo_mega.runs.lock import DirectoryLock
from gapo_mega.runs.sweep_points import points_of
from tests.helpers.finished_runs import UPDATES, leave_run
from tests.helpers.here import Here
from tests.helpers.run_files import write_run_file

GRID = {"method": ["p_gapo", "gapo"], "preference": [[0.2, 0.8], [0.8, 0.2]]}
SFT = """
output_dir: unused
model: {{path: {model}}}
data: {{source: {chats}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_run_file(folder)
    return folder


class Sweeps:
    """The command inside this process, on files that it writes for sweeps."""

    def __init__(self, folder: Path, call: Here) -> None:
        self.folder, self._call = folder, call

    def sweep(self, *options: str, out: str = "out", **keys: Any) -> str:
        """Standard output of a command that ends well."""
        code, output, errors = self._call("sweep", "--config", self.file(out, **keys), *options)
        assert code == 0, output + errors
        return output

    def refused(self, *options: str, out: str = "out", **keys: Any) -> str:
        """The one line that a user error prints."""
        code, _, errors = self._call("sweep", "--config", self.file(out, **keys), *options)
        assert code == 2
        (line,) = errors.strip().splitlines()
        return line.removeprefix("error: ")

    def file(self, out: str, **keys: Any) -> str:
        settings = {"base": "run.yaml", "output_dir": str(self.folder / out), "seeds": [1, 2], "grid": GRID}
        path = self.folder / f"{out}.yaml"
        path.write_text(yaml.safe_dump({**settings, **keys}))
        return str(path)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sweeps:
    monkeypatch.setenv("COLUMNS", "120")
    return Sweeps(folder, Here(monkeypatch, capsys))


def test_a_dry_run_lists_every_point_and_writes_nothing(here: Sweeps) -> None:
    output = here.sweep("--dry-run")
    assert "gapo takes no preference: one point a seed in place of 2" in output
    assert "p_gapo-0.2_0.8-seed1" in output and "gapo-seed2" in output
    assert "6 points: 6 new" in output
    assert not (here.folder / "out").exists()


def test_every_point_is_checked_as_its_run_would(here: Sweeps) -> None:
    line = here.refused("--dry-run", grid={"method": ["p_gapo"], "preference": [[0.5, 0.5], [0.2, 0.2, 0.6]]})
    assert line.startswith("point 2 (p_gapo-0.2_0.2_0.6-seed1): aggregation.options")
    assert "found 3 numbers" in line and line.endswith("; 1 more like this")
    line = here.refused("--dry-run", grid={"optimizer.lr": [1e-5], "parallel.tensor": [3]})
    assert line.startswith("point 0 (") and "parallel" in line
    line = here.refused("--dry-run", settings={"model.path": str(here.folder / "nowhere")})
    assert "model.path" in line and "point 0" in line


def test_what_the_front_needs(here: Sweeps) -> None:
    assert "front.objectives: found harmless" in here.refused("--dry-run", front={"objectives": ["harmless"]})
    line = here.refused("--dry-run", front={"reference_point": {"concise": 0.0}})
    assert "front.reference_point: found concise, accepted: one number for each of concise, plain" in line
    assert "data.heldout_prompts: found 0" in here.refused("--dry-run", settings={"data.heldout_prompts": 0})


def test_a_frozen_reference_point_does_not_move(here: Sweeps) -> None:
    frozen = {"values": {"concise": -0.5, "plain": 0.25}, "from": "elsewhere"}
    (here.folder / "frozen").mkdir()
    (here.folder / "frozen" / "results.json").write_text(json.dumps({"reference_point": frozen}))
    same = {"reference_point": {"concise": -0.5, "plain": 0.25}}
    here.sweep("--dry-run", out="frozen", front=same)
    moved = {"reference_point": {"concise": -0.5, "plain": 0.2}}
    assert "which stays" in here.refused("--dry-run", out="frozen", front=moved)
    here.sweep("--collect", out="frozen")
    found = json.loads((here.folder / "frozen" / "results.json").read_text())
    assert found["reference_point"] == frozen and found["hypervolume"] is None
    assert [point["state"] for point in found["points"]] == ["new"] * 6


def test_a_point_in_use_is_seen(here: Sweeps) -> None:
    with DirectoryLock(here.folder / "busy" / "points" / "gapo-seed1", "gapo-mega train"):
        assert "6 points: 1 running, 5 new" in here.sweep("--dry-run", out="busy")


def test_a_slurm_job_has_a_task_for_every_point(here: Sweeps) -> None:
    script = here.sweep("--slurm", "--nproc", "2", out="a sweep")
    assert "#SBATCH --array=0-5" in script and "#SBATCH --gpus-per-node=2" in script
    assert "#SBATCH --job-name=a-sweep" in script
    assert "POINT=warm_start" not in script


def test_a_point_that_is_none(here: Sweeps) -> None:
    assert "--point: found 6, accepted: 0 to 5" in here.refused("--point", "6")
    assert "--collect: found beside --point" in here.refused("--point", "1", "--collect")


def test_points_wait_for_the_warm_start(here: Sweeps) -> None:
    chats = here.folder / "chats.jsonl"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    chats.write_text((json.dumps({"messages": messages}) + "\n") * 20)
    (here.folder / "sft.yaml").write_text(SFT.format(model=here.folder / "model", chats=chats))
    warm = {
        "config": "sft.yaml",
        "settings": {"batch_size": 2, "micro_batch_size": 2, "model.max_tokens": 64},
    }
    output = here.sweep("--dry-run", out="warm", warm_start=warm)
    assert "warm_start" in output and "6 points: 6 new" in output
    assert "the warm start has not ended" in here.refused("--point", "0", out="warm", warm_start=warm)
    script = here.sweep("--slurm", out="warm", warm_start=warm)
    assert "POINT=warm_start" in script and "--dependency=afterok" in script
    wrong = {**warm, "settings": {**warm["settings"], "batch_size": 3}}
    assert here.refused("--dry-run", out="warm", warm_start=wrong).startswith("warm_start: ")


def ended_points(here: Sweeps, out: str, **keys: Any) -> list[Path]:
    """Directories of the points, which have all ended."""
    file = Path(here.file(out, **keys))
    points, _ = points_of(load(file, kind=SweepConfig), file)
    for number, point in enumerate(points):
        leave_run(point.directory, point.config, shift=0.1 * number)
    return [point.directory for point in points]


def test_what_points_were_before_they_go_on_is_not_their_result(here: Sweeps) -> None:
    """Asked for more steps, no point has ended: neither numbers nor pictures of the fewer steps stay."""
    few: dict[str, Any] = {"grid": {"method": ["p_gapo"], "preference": [[0.5, 0.5]]}}
    points = ended_points(here, "longer", settings={"steps": UPDATES}, **few)
    output = here.sweep("--collect", out="longer", settings={"steps": UPDATES}, **few)
    assert "2 points: 2 finished" in output
    results = json.loads((here.folder / "longer" / "results.json").read_text())
    assert results["front"] is not None and all("heldout" in point for point in results["points"])
    for point in points:  # as the longer run does that begins there
        (point / "summary.json").rename(point / "summary.earlier-1.json")
        about = json.loads((point / ".gapo-mega.json").read_text())
        (point / ".gapo-mega.json").write_text(json.dumps({**about, "finished": None}))
    output = here.sweep("--collect", out="longer", settings={"steps": 2 * UPDATES}, **few)
    assert "compare is now compare.earlier-1: no point has ended" in " ".join(output.split())
    assert not (here.folder / "longer" / "compare").exists()
    assert any((here.folder / "longer" / "compare.earlier-1").iterdir())
    results = json.loads((here.folder / "longer" / "results.json").read_text())
    assert results["front"] is None and not any("heldout" in point for point in results["points"])
