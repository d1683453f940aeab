"""The GPU check: its steps' verdicts, and the whole of it where there is no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gapo_mega.ops import _native

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ROOT / "tools"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def bash(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-u", "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_steps(folder: Path, code: str, *, only: str = "", seconds: int = 60) -> tuple[dict[str, str], int]:
    """The verdict of every step in the summary, and its status."""
    start = f"""
        . {TOOLS}/gpu_steps.sh
        out={folder} only={only} deadline=$((SECONDS + {seconds})) steps=()
        touch {folder}/verdicts.tsv {folder}/log.txt
    """
    done = bash(f"{start}\n{code}\nsummary", folder)
    table = done.stdout.split("step         verdict")[1].splitlines()[1:]
    return {line.split()[0]: line.split()[1] for line in table}, done.returncode


def test_each_step_has_a_verdict_and_the_next_goes_on(tmp_path: Path) -> None:
    verdicts, status = run_steps(
        tmp_path,
        """
        step good 10 "" bash -c 'echo fine'
        step bad 10 "" bash -c 'echo broken; exit 5'
        step slow 1 "" sleep 30
        step refused 10 "" bash -c 'echo no such tool; exit 77'
        step nothing_ran 10 "" bash -c 'echo "3 skipped, 1 warning in 0.02s"'
        step after_bad 10 "good bad" touch never
        step last 10 good bash -c 'echo fine, too'
        """,
    )
    assert verdicts == {
        "good": "passed",
        "bad": "FAILED",
        "slow": "TIMEOUT",
        "refused": "skipped",
        "nothing_ran": "skipped",
        "after_bad": "skipped",
        "last": "passed",
    }
    assert status == 1
    assert not (tmp_path / "never").exists()
    log = (tmp_path / "log.txt").read_text()
    assert all(text in log for text in ("==== good", "fine", "broken", "no such tool", "==== last"))
    notes = (tmp_path / "verdicts.tsv").read_text()
    assert re.search(r"^bad\tFAILED\t\d+\tbroken$", notes, re.MULTILINE)
    assert "after_bad\tskipped\t0\tneeds bad, which has not passed\n" in notes


def test_a_later_call_takes_up_what_has_not_passed(tmp_path: Path) -> None:
    code = """
        step first 10 "" bash -c 'echo once >>first.txt'
        step second 10 first bash -c 'echo again >>second.txt; test -e ready'
    """
    assert run_steps(tmp_path, code) == ({"first": "passed", "second": "FAILED"}, 1)
    (tmp_path / "ready").touch()
    assert run_steps(tmp_path, code) == ({"first": "passed", "second": "passed"}, 0)
    assert (tmp_path / "first.txt").read_text() == "once\n"
    assert (tmp_path / "second.txt").read_text() == "again\nagain\n"


def test_what_there_is_no_time_for_is_left_and_said(tmp_path: Path) -> None:
    code = """
        step first 10 "" true
        step second 600 "" touch second
    """
    assert run_steps(tmp_path, code, seconds=15) == ({"first": "passed", "second": "left"}, 3)
    assert run_steps(tmp_path, code) == ({"first": "passed", "second": "passed"}, 0)


def test_steps_can_be_chosen(tmp_path: Path) -> None:
    code = """
        step first 10 "" true
        step first_of_all 10 "" true
        step second 10 "" true
    """
    expected = {"first": "-", "first_of_all": "-", "second": "passed"}
    assert run_steps(tmp_path, code, only="second") == (expected, 0)


def make_bundle(folder: Path) -> Path:
    """With the module of this environment, and no wheels: its packages are here."""
    module = folder / "bundle" / "module"
    module.mkdir(parents=True)
    shutil.copy(_native.__file__, module)
    said = bash(f"bash {TOOLS}/gpu_sources.sh {ROOT} csrc CMakeLists.txt", folder)
    (module / "sources").write_text(said.stdout)
    return folder / "bundle"


def check(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(TOOLS / "gpu_check.sh"), "--python", sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.skipif(not _native.has_cuda, reason="built without CUDA")
def test_the_whole_check_ends_at_the_missing_device(tmp_path: Path) -> None:
    out = tmp_path / "out"
    bundle = make_bundle(tmp_path)
    before = {path for path in TOOLS.parent.glob("*")}
    done = check(tmp_path, "--bundle", str(bundle), "--out", str(out), "--only", "device,kernels")
    assert done.returncode == 1
    table = done.stdout.split("step         verdict")[1].splitlines()[1:-1]
    verdicts = {line.split()[0]: line.split()[1] for line in table}
    assert verdicts.pop("module") == "passed" and verdicts.pop("packages") in ("passed", "FAILED")
    assert verdicts.pop("collect") == "-"
    assert verdicts.pop("device") == "FAILED"
    assert "no CUDA device" in next(line for line in table if line.startswith("device"))
    steps = {"stack", "kernels", "capture", "benchmark", "memcheck", "frozen", "weights", "layers", "engine"}
    assert verdicts == dict.fromkeys(steps, "skipped")
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "verdicts.tsv"]
    assert {path for path in TOOLS.parent.glob("*")} == before


def test_a_bundle_of_other_sources_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    (bundle / "module" / "sources").write_text("0123456789abcdef\n")
    done = check(tmp_path, "--bundle", str(bundle), "--out", str(tmp_path / "out"), "--only", "device")
    assert "the bundle's module was made from other sources than csrc: make the bundle again" in done.stdout
    assert "needs module, which has not passed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fast"], "gpu_check: found --fast, accepted: --python, "),
        (["--out"], "gpu_check: --out: found nothing, accepted: a value"),
        (["--limit", "ten"], "gpu_check: --limit: found ten, accepted: seconds"),
        (["--limit", "09"], "gpu_check: --limit: found 09, accepted: seconds"),
        (["--only", "device,kernel"], "gpu_check: --only: found kernel, accepted: packages,module,collect,"),
        (["--only", "train"], "gpu_check: --only: found train, accepted: packages,module,collect,"),
        (
            ["--only", "training", "--long"],
            "gpu_check: --only: found training, accepted with --long: packages,",
        ),
        (["--bundle", "nowhere"], "gpu_check: --bundle: found no folder nowhere"),
        (["--python", "no-such-python"], "gpu_check: --python: found no such program"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = check(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("says", "ends", "status"),
    [
        ("========= Error: Device not supported", 1, 77),
        ("========= ERROR SUMMARY: 0 errors", 0, 0),
        ("========= ERROR SUMMARY: 3 errors", 9, 9),
    ],
)
def test_a_refusal_of_the_memory_checker_is_a_skip(tmp_path: Path, says: str, ends: int, status: int) -> None:
    """A program of that name on PATH: what ours does with its words and its status."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {ends}\n")
    tool.chmod(0o755)
    done = bash(
        f"bash {TOOLS}/gpu_memcheck.sh true", tmp_path, PATH=f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert done.returncode == status
    assert says in done.stdout


def test_a_folder_that_is_no_bundle_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.txt").write_text("kept")
    done = bash(f"bash {TOOLS}/gpu_bundle.sh --out {tmp_path}/mine", tmp_path)
    assert done.returncode == 2
    assert "which is no bundle" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "mine" / "data.txt").read_text() == "kept"


@pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("cmake")), reason="no nvcc or cmake")
def test_a_second_bundle_takes_the_variables_of_its_own_call(tmp_path: Path) -> None:
    """CMake's own first half, which keeps what it has found; nothing is compiled, and no wheel is fetched."""
    copy = tmp_path / "checkout"
    shutil.copytree(TOOLS, copy / "tools")
    for name in ("csrc", "CMakeLists.txt"):
        (copy / name).symlink_to(ROOT / name)
    programs = {
        "cmake": f"""[ "$1" = --build ] && exec touch "$2/_native.so"\nexec {shutil.which("cmake")} "$@" """,
        "python": f"""case "$*" in *" download "*) exit ;; esac\nexec {sys.executable} "$@" """,
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = f"bash {copy}/tools/gpu_bundle.sh --python {tmp_path}/bin/python --out {tmp_path}/bundle"
    for archs, built in (("90", "90"), ("80;90", "80,90")):
        done = bash(command, tmp_path, PATH=path, GAPO_CUDA_ARCHS=archs)
        assert done.returncode == 0, done.stderr
        assert f"gapo_mega: CUDA architectures: {built}\n" in done.stdout
