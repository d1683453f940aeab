"""``serve-reward`` as a process of its own, asked by the objective of kind http."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from gapo_mega.types import Prompt
from tests.helpers.http_services import EXPECTED, PROMPTS, RESPONSES, objective

REWARDS = '''
def difference(prompts, responses, *, scale=1.0):
    """Numbers in, numbers out, so that a wrong order or pairing shows."""
    for prompt in prompts:
        if prompt == "refuse":
            raise ValueError("found a prompt that\\nis refused")
    return [scale * (float(response) - len(prompt)) for prompt, response in zip(prompts, responses)]
'''


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of ``gapo-mega serve-reward`` with a Python function, as a process of its own."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "served_rewards.py").write_text(REWARDS)
    (folder / "objective.yaml").write_text(
        "name: gap\nfunction: served_rewards:difference\noptions: {scale: 1.0}\n"
    )
    command = [sys.executable, "-m", "gapo_mega.cli", "serve-reward", "--port", "0"]
    with subprocess.Popen(
        [*command, "--config", str(folder / "objective.yaml"), "options.scale=2.0"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()  # ends, empty, with the process
        assert line.startswith("objective gap is served at http://127.0.0.1:"), line
        yield line.split()[-1]
        process.terminate()
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(("batch_size", "concurrency"), [(64, 1), (7, 4), (1, 16)])
def test_the_command_serves_what_the_objective_asks_in_order(
    served: str, batch_size: int, concurrency: int
) -> None:
    scored = objective(served, batch_size=batch_size, concurrency=concurrency)
    assert scored.score(PROMPTS, RESPONSES) == EXPECTED


def test_health_and_what_is_refused(served: str) -> None:
    root = served.removesuffix("/score")
    assert requests.get(f"{root}/health", timeout=10).json() == {"status": "ok", "objective": "gap"}
    minimal = requests.post(served, json={"samples": [{"prompt": "ab", "response": "5"}]}, timeout=10)
    assert (minimal.status_code, minimal.json()) == (200, {"scores": [6.0]})
    other = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "6"}]
    for malformed in (
        {},
        {"samples": []},
        {"samples": [{"prompt": "a"}]},
        {"samples": [{"prompt": "a", "response": 1}]},
        {"samples": [{"prompt": "ab", "response": "5", "messages": other}]},
        {"samples": [{"prompt": "ab", "response": "5", "messages": []}]},
        {"samples": [{"prompt": "ab", "response": "5", "reply": ""}]},
    ):
        assert requests.post(served, json=malformed, timeout=10).status_code == 422, malformed
    assert requests.post(served, data="{", timeout=10).status_code == 422


def test_what_the_served_objective_refuses_reaches_the_client_without_a_retry(served: str) -> None:
    with pytest.raises(
        ValueError, match=r"objective 'helpful': http.*after 1 attempt, status 422 .*is refused"
    ):
        objective(served).score([Prompt(0, "refuse")], ["1"])


HANGS = """
import threading

def hangs(prompts, responses):
    threading.Event().wait()
"""


def test_the_first_sigterm_ends_it_also_while_a_reward_hangs(tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGS)
    command = [sys.executable, "-m", "gapo_mega.cli", "serve-reward", "--port", "0"]
    with subprocess.Popen(
        [*command, "--function", f"{tmp_path}/hanging.py:hangs"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with pytest.raises(requests.ReadTimeout):
            requests.post(url, json={"samples": [{"prompt": "a", "response": "b"}]}, timeout=1)
        found = requests.get(url.replace("/score", "/health"), timeout=10).json()
        assert found["status"] == "busy"
        process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM  # ten seconds are for what is under way


HELD = """
import time
from pathlib import Path

def held(prompts, responses):
    while not (Path(__file__).parent / "go").exists():
        time.sleep(0.05)
    return [0.0] * len(responses)
"""
BODIES = 16
MIB = 1 << 20


def large(last: str) -> bytes:
    """A megabyte that is forty as Python objects; right where ``last`` is the response."""
    turn = b'{"role":"","content":""},'
    end = f'{{"role":"assistant","content":"{last}"}}]}}]}}'
    return b'{"samples":[{"prompt":"","response":"a","messages":[' + turn * (MIB // len(turn)) + end.encode()


def peak(process: subprocess.Popen[str]) -> int:
    """Bytes that it has had in memory at most."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_bodies_that_wait_are_not_read_as_json(tmp_path: Path) -> None:
    (tmp_path / "holding.py").write_text(HELD)
    command = [sys.executable, "-m", "gapo_mega.cli", "serve-reward", "--port", "0"]
    with (
        subprocess.Popen(
            [*command, "--function", f"{tmp_path}/holding.py:held"], stdout=subprocess.PIPE, text=True
        ) as process,
        ThreadPoolExecutor(BODIES) as clients,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            health = url.replace("/score", "/health")
            assert requests.get(health, timeout=60).json()["status"] == "ok"
            before = peak(process)
            bodies = [large("ab"[number % 2]) for number in range(BODIES)]
            asked = [
                clients.submit(
                    requests.post, url, data=body, headers={"Content-Type": "application/json"}, timeout=600
                )
                for body in bodies
            ]
            done = 0
            while requests.get(health, timeout=60).json().get("waiting", 0) + done < BODIES - 1:
                time.sleep(0.1)
                done = sum(one.done() for one in asked)
            (tmp_path / "go").touch()
            codes = sorted(one.result().status_code for one in asked)
            more = peak(process) - before
        finally:
            process.kill()
    assert codes == [200] * (BODIES // 2) + [422] * (BODIES // 2)
    # All of them, once more while they are joined, and forty times one; all as objects would be 640 MiB.
    assert more < (2 * BODIES + 2 * 40) * MIB
