"""The script of the arithmetic example writes the rows that its module makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from gapo_mega.demo.arithmetic import problems
from tests.helpers.environment import environment


def test_the_script_writes_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.jsonl"
    command = [sys.executable, "-m", "gapo_mega.demo.arithmetic", str(out)]
    command += ["--count", "9", "--heldout", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (0, f"{out}: 9 problems, 2 of them held out\n")
    assert [json.loads(line) for line in out.read_text().splitlines()] == problems(9, 1, 2)
    refused = subprocess.run(
        [*command[:4], "--count", "0"], capture_output=True, text=True, env=environment()
    )
    assert refused.returncode == 2 and "--count: found 0, accepted: 1 to 2000" in refused.stderr
