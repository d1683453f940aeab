"""A file of examples/paper dry-runs by command, without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from gapo_mega.config import Config
from tests.helpers.environment import ROOT, environment


def test_dry_run_offline(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gapo_mega.cli", "train", "--dry-run", "--world", "8"]
    command += ["--config", "examples/paper/p_gapo.yaml", "aggregation.options.preference=[0.4,0.6]"]
    offline = environment() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    config = Config.model_validate(yaml.safe_load(done.stdout))
    assert config.aggregation.options == {"preference": [0.4, 0.6]}
    assert "# model.path: HuggingFaceH4/mistral-7b-sft-beta is not on this machine" in done.stdout
