"""What test files of every folder share, and the option that adds one's own classes to the contract tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest

from gapo_mega import advantages, aggregation, losses, objectives, scalarization
from gapo_mega.user_code import resolve

SMOLLM2 = Path(__file__).resolve().parents[1] / "models" / "SmolLM2-135M-Instruct"

PLUGINS: dict[str, Callable[[], Mapping[str, type]]] = {
    "advantages": advantages.estimators,
    "aggregation": aggregation.methods,
    "losses": losses.losses,
    "objectives": objectives.kinds,
    "scalarization": scalarization.scalarizers,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plugin",
        action="append",
        default=[],
        metavar="KIND=path/to/file.py:Class",
        help=f"also test this class (or module:Class) by the contract of {', '.join(PLUGINS)}; see "
        "docs/extending.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Nothing here asserts a time: by default an example may take 0.2 s, and a busy machine takes longer.
    hypothesis.settings.register_profile("suite", deadline=None)
    hypothesis.settings.load_profile("suite")
    # Torch asks for the name of every address that connects to its stores, and waits 5 s for a lost answer.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    config.addinivalue_line("markers", "every(kind): for every plug-in of the kind, and those of --plugin")
    for given in config.getoption("--plugin"):
        kind, _, reference = given.partition("=")
        if kind not in PLUGINS or ":" not in reference:
            accepted = f"KIND=path/to/file.py:Class or KIND=module:Class, KIND one of {', '.join(PLUGINS)}"
            raise pytest.UsageError(f"--plugin: found {given!r}, accepted: {accepted}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with the mark ``every(kind)`` get the ``name`` of each plug-in of the kind."""
    for mark in metafunc.definition.iter_markers("every"):
        (kind,) = mark.args
        given = [text.partition("=")[::2] for text in metafunc.config.getoption("--plugin")]
        own = [resolve(reference, [Path.cwd()]) for of, reference in given if of == kind]
        metafunc.parametrize("name", [*sorted(PLUGINS[kind]()), *own])


@pytest.fixture(autouse=True)
def _level_of_the_log() -> Iterator[None]:
    """Commands, which some tests call in this process, set it for their own."""
    logger = logging.getLogger("gapo_mega")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of a real pretrained model with its tokenizer."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip(f"models/{SMOLLM2.name} is not there; `make test` converts it")
    return SMOLLM2
