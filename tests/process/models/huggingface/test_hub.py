"""Models by hub name, from a server that speaks the part of the hub's protocol that downloads need."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.tiny import tiny_llama

REPOSITORY = "someone/tiny-llama"
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """``/api/models/NAME/...`` tells revision and files, ``/NAME/resolve/REVISION/FILE`` gives one."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            sizes = [(file.name, file.stat().st_size) for file in sorted(self.folder.iterdir())]
            tree = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes]
            body = json.dumps(tree).encode()
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            files = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": files}).encode()
        elif path.startswith(f"/{REPOSITORY}/resolve/") and (self.folder / name).is_file():
            body = (self.folder / name).read_bytes()
            self.asked.append(name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if REPOSITORY in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "repository"
    tiny_llama(folder, vocab=101)
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another form")
    Hub.folder, Hub.asked = folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def convert(hub: str, tmp_path: Path, source: str, target: Path) -> subprocess.CompletedProcess[str]:
    # A cache of its own; the address is read when the library is imported.
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "gapo_mega.cli", "convert", "--from", source, "--to", str(target)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_model_is_converted_by_its_hub_name(hub: str, tmp_path: Path) -> None:
    done = convert(hub, tmp_path, REPOSITORY, tmp_path / "ckpt")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "config.json" in Hub.asked and "model.safetensors" in Hub.asked
    assert "consolidated.safetensors" not in Hub.asked
    back = convert(hub, tmp_path, str(tmp_path / "ckpt"), tmp_path / "back")
    assert back.returncode == 0, back.stderr[-4000:]
    found, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "back", Hub.folder))
    assert found.keys() == expected.keys()
    assert all((found[name] == value).all() for name, value in expected.items())
    unknown = convert(hub, tmp_path, "someone/else", tmp_path / "other")
    assert unknown.returncode != 0 and "Traceback" not in unknown.stderr
    assert "someone/else" in unknown.stderr and not (tmp_path / "other").exists()
