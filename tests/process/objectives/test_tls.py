"""Rewards by https: who is trusted, by ``options.certificates`` alone."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.helpers.http_services import EXPECTED, PROMPTS, RESPONSES, objective, right, services


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that is its own authority, and its key."""
    file, key = folder / f"{name}.pem", folder / f"{name}.key"
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not there")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, *names, "-out", file, "-keyout", key], check=True, capture_output=True)
    return file, key


def test_a_service_is_trusted_by_its_own_authority_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key = certificate(tmp_path, "mine")
    other, _ = certificate(tmp_path, "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    with services(context) as start:
        state = start(lambda number, content: right(content))
        own = objective(state.url, certificates=str(file))
        assert own.score(PROMPTS[:3], RESPONSES[:3]) == EXPECTED[:3]
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(file))  # what the environment trusts does not count
        for options in ({}, {"certificates": str(other)}):
            with pytest.raises(
                ValueError, match=r"^objective 'helpful': https://.* certificate verify failed"
            ):
                objective(state.url, retries=0, **options).score(PROMPTS[:3], RESPONSES[:3])
    assert len(state.requests) == 1
