"""Two ranks save in the background and are killed: they end as a quiet run does, their model elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gapo_mega.models.checkpoint_files import fault, listing_of, read_marker
from tests.helpers.environment import environment
from tests.helpers.metrics_log import metrics
from tests.helpers.rank_runs import disturb, free_port, prepare, write_config

STEPS = 3


def torchrun(config: Path, *options: str) -> str:
    """``gapo-mega train`` on two ranks; what it said."""
    static = ["--nnodes", "1", "--rdzv-backend", "static", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *static, *options]
    done = subprocess.run(
        [*command, "-m", "gapo_mega.cli", "train", "--config", str(config)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").iterdir())


def test_saved_in_the_background_killed_and_restarted(tmp_path: Path) -> None:
    prepare(tmp_path)
    torchrun(write_config(tmp_path, "plain", STEPS))
    share = tmp_path / "share" / "model"
    settings: dict[str, Any] = {"every_steps": 1, "asynchronous": True, "export_to": f"file://{share}"}
    config = write_config(tmp_path, "run", STEPS, checkpoint=settings)
    disturb(tmp_path, rank=1, step=3, what="SIGKILL")
    said = torchrun(config, "--max-restarts", "1")
    assert (tmp_path / "disturbed").exists() and "resumed from" in said
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert metrics(run) == metrics(plain)
    assert (run / "hf" / "model.safetensors").read_bytes() == (
        plain / "hf" / "model.safetensors"
    ).read_bytes()
    assert [path.name for path in checkpoints(run)] == [path.name for path in checkpoints(plain)]
    for ours in checkpoints(run):
        listing = listing_of(read_marker(ours))
        assert listing is not None and {"__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt"} <= {
            *listing
        }
        assert [wrong for name, entry in listing.items() if (wrong := fault(ours, name, entry))] == []
    put = {path.name: path.read_bytes() for path in share.iterdir()}
    note = json.loads(put.pop("gapo-mega-export.json"))
    assert note["step"] == STEPS and put == {path.name: path.read_bytes() for path in (run / "hf").iterdir()}
