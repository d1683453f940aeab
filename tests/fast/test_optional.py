"""Optional packages as they lie on a disk: what counts as usable, without importing anything."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from gapo_mega import optional

BROKEN = "raise RuntimeError('imported')\n"


@pytest.fixture(autouse=True)
def no_memory() -> Iterator[None]:
    """Probes remember what they found."""
    optional.transformer_engine.cache_clear()
    yield
    optional.transformer_engine.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python imports from."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def distribution(site: Path, name: str, version: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    importlib.invalidate_caches()


def module(site: Path, name: str) -> None:
    (site / f"{name}.py").write_text(BROKEN)
    importlib.invalidate_caches()


def test_transformer_engine_of_nvidia_s_image(site: Path) -> None:
    """One distribution of the whole, and the compiled part as a module beside it."""
    distribution(site, "transformer_engine", "2.20.0+5a1b2c3")
    module(site, "transformer_engine")
    module(site, "transformer_engine_torch")
    probe = optional.transformer_engine()
    assert probe.usable and probe.lost == ""
    assert probe.found == "transformer-engine 2.20.0+5a1b2c3 with its PyTorch part"


def test_transformer_engine_on_the_path_alone(site: Path) -> None:
    module(site, "transformer_engine")
    module(site, "transformer_engine_torch")
    probe = optional.transformer_engine()
    assert probe.usable and probe.found == "transformer-engine of unknown version with its PyTorch part"


def test_transformer_engine_from_pypi(site: Path) -> None:
    distribution(site, "transformer-engine", "2.20.2")
    distribution(site, "transformer-engine-torch", "2.20.2")
    assert optional.transformer_engine().found == "transformer-engine-torch 2.20.2"


def test_the_meta_package_alone_is_not_usable(site: Path) -> None:
    """It raises where it is imported, and takes megatron-core with it."""
    distribution(site, "transformer-engine", "2.20.2")
    module(site, "transformer_engine")
    probe = optional.transformer_engine()
    assert not probe.usable and probe.lost
    assert probe.found == "transformer-engine 2.20.2 without its PyTorch part"


def test_half_an_installation_is_not_usable(site: Path) -> None:
    module(site, "transformer_engine_torch")
    assert not optional.transformer_engine().usable
