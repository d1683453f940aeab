"""docs/reference/configuration.md is what tools/configuration_reference.py writes, and holds every field."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest

from gapo_mega import advantages, aggregation, losses, objectives, scalarization
from gapo_mega.config import Config, Section
from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig
from gapo_mega.user_code import is_subclass

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")


def test_page_is_current() -> None:
    script = runpy.run_path(str(ROOT / "tools" / "configuration_reference.py"))
    assert script["page"]() == PAGE, "run python tools/configuration_reference.py"


def fields(kind: type[Section], before: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        below = [
            candidate
            for candidate in (field.annotation, *get_args(field.annotation))
            if is_subclass(candidate, Section)
        ]
        if below:
            yield from fields(
                below[0], f"{before}{name}.{'N.' if get_origin(field.annotation) is list else ''}"
            )
        else:
            yield f"{before}{name}"


@pytest.mark.parametrize("kind", [Config, SftConfig, RewardModelConfig, PairsConfig])
def test_page_has_every_field(kind: type[Section]) -> None:
    """Once in full; a section that a command shares with an earlier one refers to it."""
    shared = {"critic.optimizer": "optimizer"}
    for path in fields(kind):
        section = path.rpartition(".")[0]
        shown = f"{shared.get(section, section)}.{path.rpartition('.')[2]}".lstrip(".")
        assert f"| `{shown}` |" in PAGE, path


def test_page_has_every_method() -> None:
    for section, names in (
        ("aggregation.name", aggregation.methods()),
        ("scalarization.name", scalarization.scalarizers()),
        ("advantages.name", advantages.estimators()),
        ("loss.name", losses.losses()),
        ("objectives.N.kind", objectives.kinds()),
    ):
        for name in names:
            assert f"#### `{section}: {name}`" in PAGE
