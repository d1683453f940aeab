"""``gapo-mega info`` shows the versions found beside those that the tests have run with."""

from __future__ import annotations

import platform
from importlib.metadata import version

import pytest

from gapo_mega.commands.info import beside_tested, info
from gapo_mega.versions import TESTED

ROW = TESTED[-1]  # of the oldest Python, and another megatron-core than the newest
FOUND = {"megatron-core": ROW.megatron_core, "torch": ROW.torch, "transformers": ROW.transformers}


def said(python: str = f"{ROW.python}.13", **found: str) -> dict[str, str]:
    """What the lines say after the version found, by name."""
    packages = {**FOUND, **{name.replace("_", "-"): value for name, value in found.items()}}
    lines = beside_tested(python, packages)
    return {line.split()[0]: line.split(maxsplit=2)[2] for line in lines}


def test_what_is_tested() -> None:
    assert set(said().values()) == {"tested"}
    assert said(torch=f"{ROW.torch}+cpu")["torch"] == "tested"
    assert said(torch=f"{ROW.torch}+cu130")["torch"] == "tested"


@pytest.mark.parametrize(
    ("found", "name", "tested"),
    [
        ({"megatron_core": TESTED[0].megatron_core}, "megatron-core", ROW.megatron_core),  # of another Python
        ({"megatron_core": f"{ROW.megatron_core}0"}, "megatron-core", ROW.megatron_core),
        ({"megatron_core": f"{ROW.megatron_core}rc1"}, "megatron-core", ROW.megatron_core),
        ({"torch": "2.6.0+cpu"}, "torch", ROW.torch),
        ({"transformers": "5.0.0"}, "transformers", ROW.transformers),
    ],
)
def test_what_is_not_names_what_is(found: dict[str, str], name: str, tested: str) -> None:
    lines = said(**found)
    assert lines.pop(name) == f"tested: {tested}"
    assert set(lines.values()) == {"tested"}


def test_a_package_that_is_not_there() -> None:
    (line,) = [
        line for line in beside_tested("3.10", {"torch": "(not installed)"}) if line.startswith("torch")
    ]
    assert line.endswith(f"(not installed) tested: {ROW.torch}")


def test_a_python_of_no_row_shows_all_rows() -> None:
    lines = said(python="3.14.0", megatron_core="0.18.0")
    assert lines["python"] == "tested: 3.10, 3.11, 3.12, 3.13"
    assert lines["megatron-core"] == "tested: 0.16.1, 0.19.2"
    assert lines["torch"] == "tested"


def test_the_command_shows_this_environment(capsys: pytest.CaptureFixture[str]) -> None:
    info()
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["python"][0] == platform.python_version()
    for name in FOUND:
        assert lines[name][0] == version(name)
        assert lines[name][1].startswith("tested")
