"""Two hosts on one machine: network namespaces joined by a link that can be cut, slowed, and joined again.

    python -m tests.helpers.two_hosts CONFIG

``run`` starts that in user, network and process namespaces of its own, so nothing of it outlives the call and
nobody need be root. Host ``left`` has rank 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.helpers.environment import ROOT, environment
from tests.helpers.rank_runs import disturb, wait_until

APART = [
    "unshare",
    "--user",
    "--map-root-user",
    "--net",
    "--mount",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
]
LEFT, RIGHT = "10.9.0.1", "10.9.0.2"
HOSTS = {"left": ("to-right", LEFT), "right": ("to-left", RIGHT)}
SLOW = "20mbit"
WAIT = 300.0  # seconds for a run to come somewhere; the runs' own limits are far shorter

_SETUP = [
    # Where ip keeps the names of network namespaces.
    "mount -t tmpfs none /run",
    "ip netns add left",
    "ip netns add right",
    "ip link add to-right netns left type veth peer name to-left netns right",
    *(
        command
        for host, (link, address) in HOSTS.items()
        for command in (
            f"ip -n {host} addr add {address}/24 dev {link}",
            f"ip -n {host} link set lo up",
            f"ip -n {host} link set {link} up",
        )
    ),
]


def _slowed(host: str) -> str:
    """The command that slows what a host sends."""
    link = HOSTS[host][0]
    return f"ip netns exec {host} tc qdisc add dev {link} root tbf rate {SLOW} burst 64kb latency 100ms"


def _environment() -> dict[str, str]:
    """With the folders of ip and tc, which a user's PATH need not have."""
    return environment() | {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def missing() -> str | None:
    """Why this machine cannot have two hosts; None where it can."""
    probe = " && ".join([*_SETUP, "ip netns exec left unshare --uts hostname left-host", _slowed("left")])
    try:
        done = subprocess.run(
            [*APART, "sh", "-ec", probe], env=_environment(), capture_output=True, text=True, timeout=60
        )
    except OSError as error:
        return f"unshare: {error}"
    return None if done.returncode == 0 else f"network namespaces: {' '.join(done.stderr.split())[:200]}"


def run(config: Path) -> list[dict[str, Any]]:
    """What came of the runs of ``main``: exit codes and output of both ranks, left first."""
    done = subprocess.run(
        [*APART, sys.executable, "-m", "tests.helpers.two_hosts", str(config)],
        env=_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _shell(command: str) -> None:
    subprocess.run(command.split(), check=True, stdout=sys.stderr)


def _start(config: Path, port: int) -> list[subprocess.Popen[str]]:
    """One rank on each host."""
    found = []
    for rank, (host, (link, _)) in enumerate(HOSTS.items()):
        job = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        job |= {"MASTER_ADDR": LEFT, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": link}
        train = f"{sys.executable} -m gapo_mega.cli train --config {config}"
        named = f"hostname {host}-host && exec {train}"
        command = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-ec", named]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        found.append(subprocess.Popen(command, env=os.environ | job, text=True, **pipes))
    return found


def _ended(ranks: list[subprocess.Popen[str]]) -> dict[str, Any]:
    said = [rank.communicate(timeout=WAIT)[0] for rank in ranks]
    return {"codes": [rank.returncode for rank in ranks], "said": said}


def main(config: Path) -> list[dict[str, Any]]:
    """A run until its link is cut; its continuation over a slow link until a host is killed; and the rest."""
    for command in _SETUP:
        _shell(command)
    folder = config.parent
    happened = folder / "disturbed"
    happened.unlink(missing_ok=True)

    disturb(folder, rank=1, step=2, what="sleep")
    ranks = _start(config, 29500)
    wait_until(lambda: happened.exists() or None not in [r.poll() for r in ranks], WAIT, "no second step")
    time.sleep(5)  # until its signs of life say where it is
    _shell("ip -n left link set to-right down")
    found = [_ended(ranks)]

    _shell("ip -n left link set to-right up")
    for host in HOSTS:
        _shell(_slowed(host))
    disturb(folder, rank=1, step=2, what="SIGKILL")
    found.append(_ended(_start(config, 29501)))
    found.append(_ended(_start(config, 29502)))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
