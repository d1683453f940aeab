"""Runs the engine's tests with several Pythons and releases of Megatron-core, in an environment for each.

    python tools/matrix.py [--versions 3.10 3.12 3.13] [--workers 2] [PIP OPTION...]

Environments and results are in build/matrix/PYTHON. What passed with the same files is not run again, so that
a call after a failure or an interruption goes on from there. The exit status is 0 where all tests passed with
all versions, 1 where one failed, and 2 where none failed but a version could not be had.

The options of pip at the end (``--extra-index-url ...``) are for installing torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gapo_mega.versions import TESTED, Versions, row_of

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "matrix"
# Megatron in one process, and over several: layouts, checkpoints, generation, weights, critics.
TESTS = ("tests/process/megatron", "tests/engine")
BUILT_FROM = ("constraints.txt", "pyproject.toml", "setup.py", "CMakeLists.txt", "csrc")
TESTED_FILES = (*BUILT_FROM, "gapo_mega", "tests")
# What versions differ in: the program tells each environment's.
VERSIONS_OF = "import importlib.metadata as m; print(*(m.version(n) for n in ('megatron-core', 'torch')))"
# Loads a compiled module alone, which needs no package.
HAS_CUDA = (
    "import importlib.util as u, sys; s = u.spec_from_file_location('_native', sys.argv[1]); "
    "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.has_cuda)"
)
EXCHANGE = "tests.helpers.exchange"


@dataclass
class Outcome:
    """What came of one Python's tests."""

    row: Versions
    found: str = ""  # versions of megatron-core and torch in its environment
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)  # test files and steps
    why_not: str | None = None  # it did not run
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        if self.why_not is not None:
            return f"NOT RUN: {self.why_not}"
        return f"FAILED: {', '.join(self.failed)}" if self.failed else "passed"


class Unavailable(Exception):
    """An interpreter or a package that cannot be had here."""


# -- environments ------------------------------------------------------------------------------------
def interpreter(version: str) -> str:
    """A Python of this version that starts: from PATH, or pyenv's. Raises ``Unavailable``."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in candidates:
        if candidate is None:
            continue
        told = [str(candidate), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(told, capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip() == version:
            return str(candidate)
    raise Unavailable(f"no Python {version} on PATH or among pyenv's")


def environment(row: Versions, folder: Path, index: list[str]) -> Path:
    """The Python of an environment with everything in constraints.txt. Raises ``Unavailable``."""
    python, stamp = folder / "env" / "bin" / "python", folder / "installed"
    wanted = digest(BUILT_FROM)
    compiled = list((ROOT / "gapo_mega" / "ops").glob(f"_native.cpython-{row.python.replace('.', '')}-*.so"))
    if compiled and stamp.is_file() and stamp.read_text() == wanted:
        return python
    if not (python.parent / "pip").exists():  # pip comes last: without it, the making was interrupted
        shutil.rmtree(folder / "env", ignore_errors=True)
        call(folder, "venv", [interpreter(row.python), "-m", "venv", str(folder / "env")])
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", "constraints.txt"]
    call(folder, "pip", [*pip, "--upgrade", "pip"])
    # Alone, as in the Makefile: what depends on it must not choose another.
    call(folder, "torch", [*pip, *index, "torch"])
    build = ["--build-constraint", "constraints.txt", "--editable", ".[test]"]
    call(folder, "install", [*pip, *build], {"GAPO_CUDA": cuda_setting(str(python), compiled)})
    stamp.write_text(wanted)
    return python


def cuda_setting(python: str, compiled: list[Path]) -> str:
    """``GAPO_CUDA`` for a build in the checkout, where it replaces the module of every environment.

    The engine's tests need no CUDA kernels, but a module that has them must not lose them: ``make`` or the
    user compiled it for the same Python. ``python``: that loads the modules ``compiled``.
    """
    for module in compiled:
        told = subprocess.run([python, "-c", HAS_CUDA, str(module)], capture_output=True, text=True)
        if told.stdout.strip() == "True":
            return "AUTO"
    return "OFF"


def call(folder: Path, name: str, command: list[str], settings: dict[str, str] | None = None) -> None:
    """Run a step of an installation. Raises ``Unavailable`` with the last line of what it said."""
    log = folder / f"{name}.log"
    say(f"{folder.name}: {' '.join(command[1:])}")
    variables = {**(settings or {}), **os.environ}
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if code:
        errors = [line for line in log.read_text().splitlines() if "error" in line.lower()]
        reason = errors[-1].strip() if errors else f"exit status {code}"
        raise Unavailable(f"{name}: {reason} ({log.relative_to(ROOT)})")


def digest(names: tuple[str, ...]) -> str:
    """Of the contents of files and folders, without what is built or cached."""
    total = hashlib.sha256()
    for name in names:
        top = ROOT / name
        paths = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file())
        for path in paths:
            if path.suffix not in (".so", ".pyc"):
                total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()


# -- tests -------------------------------------------------------------------------------------------
def test_files() -> Iterator[str]:
    for folder in TESTS:
        yield from (str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).rglob("test_*.py")))


class Results:
    """Counts of the test files that passed, kept for files as they are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = digest(TESTED_FILES)
        kept = json.loads(path.read_text()) if path.is_file() else {}
        self.passed: dict[str, dict[str, int]] = (
            kept.get("passed", {}) if kept.get("files") == self._files else {}
        )

    def add(self, name: str, counts: Counter[str]) -> None:
        self.passed[name] = dict(counts)
        self._path.write_text(json.dumps({"files": self._files, "passed": self.passed}, indent=1))


def run_file(python: Path, folder: Path, name: str) -> tuple[str, Counter[str], bool]:
    """One test file in a process of its own: its name, its counts, and whether it passed."""
    stem = name.removeprefix("tests/").removesuffix(".py").replace("/", ".")
    report, log = folder / f"{stem}.xml", folder / f"{stem}.log"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", f"--junitxml={report}", name]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    counts = counted(report)
    failure = f" (exit status {code}, {log.relative_to(ROOT)})" if code else ""
    say(f"{folder.name}: {name}: {told(counts)}{failure}")
    return name, counts, code == 0


def counted(report: Path) -> Counter[str]:
    """Tests of a JUnit report by outcome; none where pytest has written no report."""
    counts: Counter[str] = Counter()
    if report.is_file():
        for suite in xml.parse(report).getroot().iter("testsuite"):
            numbers = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            bad = numbers["failures"] + numbers["errors"]
            counts += Counter(
                passed=numbers["tests"] - bad - numbers["skipped"], failed=bad, skipped=numbers["skipped"]
            )
    return counts


def told(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number) or "no tests"


def run_row(outcome: Outcome, workers: int, index: list[str]) -> None:
    """Install and test one Python."""
    folder = HOME / outcome.row.python
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    try:
        python = environment(outcome.row, folder, index)
    except Unavailable as reason:
        outcome.why_not = str(reason)
        return
    outcome.found = subprocess.run(
        [str(python), "-c", VERSIONS_OF], capture_output=True, text=True, check=True
    ).stdout.strip()
    if outcome.found.split()[0] != outcome.row.megatron_core:
        outcome.failed.append(f"megatron-core {outcome.row.megatron_core} was expected")
    results = Results(folder / "results.json")
    for counts in results.passed.values():
        outcome.counts += Counter(counts)
    left = [name for name in test_files() if name not in results.passed]
    say(f"{folder.name}: {len(results.passed)} test files passed before, {len(left)} to run")
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(run_file, python, folder, name) for name in left]
        try:
            for done in as_completed(running):
                name, counts, passed = done.result()
                outcome.counts += counts
                if passed:
                    results.add(name, counts)
                else:
                    outcome.failed.append(name)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    outcome.seconds = time.monotonic() - begin


def exchange(outcomes: list[Outcome]) -> None:
    """Load every environment's checkpoint with every other one."""
    able = [outcome for outcome in outcomes if outcome.why_not is None]
    for writer in able:
        written = HOME / writer.row.python / "checkpoint"
        shutil.rmtree(written, ignore_errors=True)
        if not exchanged(writer, "write", written):
            writer.failed.append("writing a checkpoint")
            continue
        for reader in able:
            if reader is not writer and not exchanged(reader, "read", written):
                reader.failed.append(f"the checkpoint of {writer.row.megatron_core} ({writer.row.python})")


def exchanged(outcome: Outcome, action: str, directory: Path) -> bool:
    folder = HOME / outcome.row.python
    log = folder / f"{action}.{directory.parent.name}.log"
    with log.open("w") as file:
        command = [str(folder / "env" / "bin" / "python"), "-m", EXCHANGE, action, str(directory)]
        return not subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode


# -- output ------------------------------------------------------------------------------------------
def say(text: str) -> None:
    print(text, flush=True)


def table(outcomes: list[Outcome]) -> str:
    """One line a Python."""
    lines = [f"{'python':<8}{'megatron-core':<15}{'torch':<14}{'tests':<32}{'seconds':>8}  result"]
    for outcome in outcomes:
        core, _, torch = outcome.found.partition(" ")
        tests = told(outcome.counts) if outcome.found else "-"
        lines.append(
            f"{outcome.row.python:<8}{core or '-':<15}{torch or '-':<14}{tests:<32}{outcome.seconds:>8.0f}  "
            f"{outcome.verdict}"
        )
    return "\n".join(lines)


def report(outcomes: list[Outcome]) -> None:
    """Print the table, and keep it in build/matrix as text and as JSON."""
    text = table(outcomes)
    say(f"\n{text}")
    HOME.mkdir(parents=True, exist_ok=True)
    found = [
        {**vars(outcome), "row": asdict(outcome.row), "verdict": outcome.verdict} for outcome in outcomes
    ]
    (HOME / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    (HOME / "table.txt").write_text(text + "\n")


def status(outcomes: list[Outcome]) -> int:
    if any(outcome.failed for outcome in outcomes):
        return 1
    return 2 if any(outcome.why_not is not None for outcome in outcomes) else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", nargs="+", default=["3.10", "3.12", "3.13"], metavar="PYTHON")
    parser.add_argument("--workers", type=int, default=2, help="test files that run at a time")
    given, index = parser.parse_known_args(arguments)
    rows = [(version, row_of(version)) for version in given.versions]
    unknown = [version for version, row in rows if row is None]
    if unknown:
        accepted = ", ".join(row.python for row in TESTED)
        parser.error(f"--versions: found {', '.join(unknown)}; accepted: {accepted} (gapo_mega/versions.py)")
    outcomes = [Outcome(row) for _, row in rows if row is not None]
    for outcome in outcomes:
        run_row(outcome, given.workers, index)
    exchange(outcomes)
    report(outcomes)
    return status(outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
