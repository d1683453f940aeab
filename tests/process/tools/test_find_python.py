"""Which Python ``make`` takes, from folders of stand-ins that answer as interpreters and pip do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
INDEX = ["--extra-index-url", "https://example.org/cpu"]
USED = (
    *("bash", "sh", "cat", "mkdir", "mktemp", "rm", "grep", "sed", "chmod", "cp"),
    *("make", "find", "getconf", "wc"),
)

STAND_IN = """#!/bin/sh
# Answers the probe (-c), -m venv FOLDER, and in there -m pip index versions.
[ "{starts}" = True ] || {{ echo "pyenv: command not found" >&2; exit 127; }}
case "$1 $2" in
  "-c "*) printf '%s\\n%s\\n' "{version}" "{headers}" ;;
  "-m venv") [ "{venv}" = True ] || exit 1; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip") echo "torch (9.9)"; echo "Available versions: 9.9, {torch}, 1.0" ;;
esac
"""


@dataclass(frozen=True)
class Fake:
    """A Python as PATH has it; ``torch``: versions that pip finds."""

    version: str
    torch: str = "2.13.0+cpu, 2.13.0"
    starts: bool = True
    headers: bool = True
    venv: bool = True
    name: str = ""


def path_with(folder: Path, fakes: list[Fake]) -> dict[str, str]:
    """An environment whose PATH has these Pythons and no other."""
    for name in USED:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    for fake in fakes:
        file = folder / (fake.name or f"python{fake.version}")
        file.write_text(STAND_IN.format(**vars(fake)))
        file.chmod(0o755)
    # Where make runs the tests, it would hand on what it was called with, such as PYTHON=.
    own = {key: value for key, value in os.environ.items() if key != "PYTHON" and not key.startswith("MAKE")}
    return {**own, "PATH": str(folder)}


def find(folder: Path, fakes: list[Fake], options: list[str] = INDEX) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "tools" / "find_python.sh"), "2.13.0", *options],
        env=path_with(folder, fakes),
        capture_output=True,
        text=True,
    )


CUDA_ONLY = "2.13.0, 2.12.1"


@pytest.mark.parametrize(
    ("fakes", "expected", "why"),
    [
        ([Fake("3.10"), Fake("3.13"), Fake("3.12")], "python3.13", "taking Python 3.13"),
        # A name of pyenv's that does not start.
        ([Fake("3.13", starts=False), Fake("3.11")], "python3.11", "taking Python 3.11"),
        ([Fake("3.13", headers=False), Fake("3.12")], "python3.12", "3.13 .*no headers"),
        ([Fake("3.13", venv=False), Fake("3.12")], "python3.12", "3.13 .*virtual environments"),
        ([Fake("3.13", torch="2.12.0+cpu"), Fake("3.12")], "python3.12", "3.13 .*finds no torch 2.13.0"),
        ([Fake("3.13", torch=CUDA_ONLY), Fake("3.11")], "python3.11", "3.13 .*no CPU build"),
        # No CPU build at all: the newest.
        ([Fake("3.12", torch=CUDA_ONLY), Fake("3.10", torch=CUDA_ONLY)], "python3.12", "no Python here has"),
        # A version that begins alike is another one.
        ([Fake("3.13", torch="2.13.0.1+cpu, 12.13.0"), Fake("3.10")], "python3.10", "3.13 .*finds no torch"),
        # Under its plain name only; of two, the numbered one.
        ([Fake("3.12", name="python3"), Fake("3.11")], "python3", "taking Python 3.12"),
        ([Fake("3.12", name="python3"), Fake("3.12")], "python3.12", "taking Python 3.12"),
        # Newer than what the tests have run with.
        ([Fake("3.14"), Fake("3.14", name="python3"), Fake("3.10")], "python3.10", "taking Python 3.10"),
    ],
)  # fmt: skip
def test_the_newest_that_has_everything(tmp_path: Path, fakes: list[Fake], expected: str, why: str) -> None:
    found = find(tmp_path, fakes)
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{tmp_path / expected}\n"
    assert re.search(why, found.stderr)


def test_with_a_gpu_no_cpu_build_is_asked_for(tmp_path: Path) -> None:
    found = find(tmp_path, [Fake("3.13", torch=CUDA_ONLY), Fake("3.11")], options=[])
    assert found.stdout == f"{tmp_path / 'python3.13'}\n"


@pytest.mark.parametrize("fakes", [[], [Fake("3.9")], [Fake("3.14")], [Fake("3.12", torch="1.0")]])
def test_none_is_one_line_that_says_how_to_go_on(tmp_path: Path, fakes: list[Fake]) -> None:
    found = find(tmp_path, fakes)
    assert found.returncode == 1 and found.stdout == ""
    assert (
        "accepted: one of 3.13 3.12 3.11 3.10; name another with make PYTHON="
        in found.stderr.splitlines()[-1]
    )


def make(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    venv = folder / "venv"
    command = ["make", f"VENV={venv}", "GPUS=0", *arguments, str(venv / "bin" / "python")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_make_takes_it_and_keeps_an_environment_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "path"
    folder.mkdir()
    environment = path_with(folder, [Fake("3.12")])
    made = make(tmp_path, environment)
    assert made.returncode == 0, made.stderr
    assert f"{folder / 'python3.12'} -m venv" in made.stdout and "taking Python 3.12" in made.stderr
    newer = folder / "python3.13"
    newer.write_text(STAND_IN.format(**vars(Fake("3.13"))))
    newer.chmod(0o755)
    assert "up to date" in make(tmp_path, environment).stdout


def test_make_takes_the_one_that_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "path"
    folder.mkdir()
    environment = path_with(folder, [Fake("3.13"), Fake("3.11")])
    named = folder / "python3.11"
    made = make(tmp_path, environment, f"PYTHON={named}")
    assert made.returncode == 0 and f"{named} -m venv" in made.stdout
    assert made.stderr == ""
