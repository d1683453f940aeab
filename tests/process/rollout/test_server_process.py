"""A server that a run starts: its end, its restart, its errors. vLLM is one of the same protocol here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gapo_mega.config.loading import to_yaml
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.backends import Policy
from gapo_mega.rollout.backends.vllm import Vllm
from gapo_mega.rollout.recovery import recovered
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.types import Generation
from tests.helpers.environment import ROOT, environment
from tests.helpers.fake_engine import END
from tests.helpers.fake_runs import configuration
from tests.helpers.table_policy import TablePolicy

SERVER = """\
import os, sys, threading
from pathlib import Path
from tests.helpers.vllm_protocol import TableServer
assert sys.argv[1] == "--no-enable-chunked-prefill"  # before what a user may say of that
if "--fail" in sys.argv:
    print("loading"); sys.exit("no such model" + os.environ.get("HF_TOKEN", ""))
if "SEEN" in os.environ:
    open(os.environ["SEEN"], "w").close()
server = TableServer(int(sys.argv[sys.argv.index("--port") + 1]))
def hang(path, content):
    if "generate" in path:
        threading.Event().wait()
def fall_ill(path, content):
    if path == "/health" and server.label != "default":
        return 503, None
first = "FIRST" in os.environ and not Path(os.environ["FIRST"]).exists()
if first:
    Path(os.environ["FIRST"]).write_text("")
    server.fail = {"hang": hang, "fall_ill": fall_ill}[os.environ["DOES"]]
threading.Event().wait()
"""
PLATFORMS = """\
class current_platform:
    is_cpu = staticmethod(lambda: True)
"""
PROMPTS = [[3, 5], [4], [3, 5]]
SAMPLING = SamplingParameters(8)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The "Python of an environment with vLLM": this one, with modules in the place of vLLM's."""
    module = tmp_path / "site" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    module.write_text(SERVER)
    (tmp_path / "site" / "vllm" / "platforms.py").write_text(PLATFORMS)
    script = tmp_path / "python"
    paths = f"{tmp_path / 'site'}:{ROOT}:$PYTHONPATH"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{paths}" exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def backend(python: Path, engine: TablePolicy, *arguments: str, **options: Any) -> Vllm:
    vllm = {
        "python": str(python),
        "arguments": list(arguments),
        "patience": 0,
        "start_timeout": 120,
        **options,
    }
    config = configuration(python.parent / "run", rollout={"backend": "vllm", "vllm": vllm})
    Vllm.check(config)
    return Vllm(Policy(engine, python.parent, 0, (END,)), config)


@pytest.fixture
def rollouts(python: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    monkeypatch.chdir(python.parent)
    built = backend(Path("python"), TablePolicy())  # relative, as a user writes it
    yield built
    built.close()


def process_of(rollouts: Vllm) -> subprocess.Popen[bytes]:
    (server,) = rollouts._processes
    assert server._process is not None
    return server._process


def test_a_killed_server_is_started_again_and_the_rollout_is_the_same(
    rollouts: Vllm, caplog: pytest.LogCaptureFixture
) -> None:
    engine = rollouts.policy.engine
    rollouts.update_weights()
    undisturbed = rollouts.generate(PROMPTS, SAMPLING, 7)
    calls = 0

    def killed_at_first() -> Generation:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.kill(process_of(rollouts).pid, signal.SIGKILL)
        return rollouts.generate(PROMPTS, SAMPLING, 7)

    again = recovered(engine, rollouts.update_weights, killed_at_first)
    assert calls == 2 and rollouts._processes[0].starts == 2
    (told,) = (record.getMessage() for record in caplog.records if "ended" in record.getMessage())
    assert "ended with status -9" in told and str(rollouts._processes[0].log) in told
    assert torch.equal(undisturbed.tokens_BT, again.tokens_BT)
    np.testing.assert_array_equal(undisturbed.logprobs_BT.numpy(), again.logprobs_BT.numpy())
    last = process_of(rollouts)
    rollouts.close()
    assert last.poll() is not None and not rollouts._processes[0].log.exists()


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("hang", "{url}: found that it lost a question and still runs; it is ended"),
        ("fall_ill", "{url}: found no healthy vLLM server within 0 s; it is ended"),
    ],
)
def test_a_living_server_that_does_not_answer_is_ended_and_started_again(
    python: Path, caplog: pytest.LogCaptureFixture, does: str, told: str
) -> None:
    engine = TablePolicy()
    own = {"FIRST": str(python.parent / "first"), "DOES": does}
    built = backend(python, engine, environment=own, timeout=5)
    try:
        built.update_weights()
        (process,) = built._processes
        if does == "fall_ill":
            engine.learn(1)
            built.update_weights()
        found = recovered(engine, built.update_weights, lambda: built.generate(PROMPTS, SAMPLING, 7))
        assert process.starts == 2
        assert found.versions_B is not None and found.versions_B.tolist() == [engine.changes] * 3
        lines = [record.getMessage() for record in caplog.records if "ended" in record.getMessage()]
        assert lines == [told.format(url=process.url)]
    finally:
        built.close()


def test_replicas_have_the_same_weights_and_their_own_variables(python: Path) -> None:
    (python.parent / "seen").mkdir()
    engine = TablePolicy()
    own = {"SEEN": [str(python.parent / "seen" / name) for name in ("first", "second")]}
    built = backend(python, engine, replicas=2, environment=own)
    try:
        built.update_weights()
        before = built.generate(PROMPTS, SAMPLING, 7)
        os.kill(built._processes[1]._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        after = recovered(engine, built.update_weights, lambda: built.generate(PROMPTS, SAMPLING, 7))
        assert torch.equal(before.tokens_BT, after.tokens_BT)
        assert [process.starts for process in built._processes] == [1, 2]
        assert len({process.url for process in built._processes}) == 2
        assert sorted(path.name for path in (python.parent / "seen").iterdir()) == ["first", "second"]
    finally:
        built.close()


def test_a_server_that_cannot_start_is_told_with_what_it_printed(python: Path) -> None:
    failing = backend(python, TablePolicy(), "--fail")
    with pytest.raises(ServerLost, match=r"ended with status 1: loading \| no such model \(.*vllm.log\)$"):
        failing.update_weights()
    failing.close()


def test_a_secret_of_the_run_reaches_the_server_and_no_error(
    python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "/visible-77e0")
    failing = backend(python, TablePolicy(), "--fail", environment={"HF_TOKEN": "env:MY_TOKEN"})
    with pytest.raises(ServerLost, match=r"loading \| no such model\*\*\* \(.*vllm.log\)$"):
        failing.update_weights()
    failing.close()
    assert "visible" not in to_yaml(failing.config)


@pytest.mark.parametrize(
    ("mode", "reason"), [(0o644, "Permission denied"), (0o755, "No such file or directory")]
)
def test_a_python_that_is_no_program_is_one_line(tmp_path: Path, mode: int, reason: str) -> None:
    (tmp_path / "python").write_text("#!/no/such/interpreter\n")
    (tmp_path / "python").chmod(mode)
    message = rf"^rollout.vllm.python: found .*/python, which does not start \({reason}\), accepted: "
    with pytest.raises(ValueError, match=message):
        backend(tmp_path / "python", TablePolicy())


PARENT = """\
import sys, time
from pathlib import Path
from tests.helpers.table_policy import TablePolicy
from tests.process.rollout.test_server_process import backend, process_of
rollouts = backend(Path(sys.argv[1]), TablePolicy())
rollouts.update_weights()
print(process_of(rollouts).pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's death")
def test_no_server_outlives_a_run_that_is_killed(python: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(python)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), cwd=ROOT) as run:
        assert run.stdout is not None
        server = int(run.stdout.readline())
        os.kill(server, 0)  # it is there
        run.kill()
    for _ in range(300):
        try:
            os.kill(server, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the server is still there after 30 s")
