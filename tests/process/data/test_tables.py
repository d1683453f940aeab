"""A hub that cannot be reached, in a process that has not tried before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_unreachable_hub_is_said_in_one_line(tmp_path: Path) -> None:
    script = (
        "from gapo_mega.data.tables import Source, read_rows\n"
        "try: read_rows(Source('data.source', 'some/thing', 'data.split', 'train'))\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "data.source: found 'some/thing'" in done.stdout, done.stderr
    assert "accepted" in done.stdout and done.stdout.count("\n") == 1
