"""Configurations of all kinds: read or refused in one line, and what is read does not fail a moment later."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gapo_mega.commands.plan import make_plan
from gapo_mega.config import Config, Section
from gapo_mega.config.loading import load, parse, to_yaml
from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig
from gapo_mega.planning import methods
from tests.helpers.fuzzing import TEXTS, VALUES, examples, one_line

BASE: dict[str, Any] = {
    "output_dir": "o",
    "model": {"path": "HuggingFaceTB/SmolLM2-135M"},
    "data": {"source": "package:prompts"},
    "objectives": [
        {"name": "a", "function": "gapo_mega.demo.rewards:concise"},
        {"name": "b", "kind": "http"},
    ],
}


def places() -> list[tuple[str | int, ...]]:
    """Every field of a training's configuration, and some that do not exist."""
    found: list[tuple[str | int, ...]] = [
        ("objectives", 0),
        ("objectives", 1, "options", "url"),
        ("x",),
        ("method",),
    ]
    for name, field in Config.model_fields.items():
        found.append((name,))
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found += [(name, key) for key in [*kind.model_fields, "x"]]
    for key in BASE["objectives"][1]:
        found.append(("objectives", 1, key))
    found += [
        ("objectives", 1, "options", key) for key in ("headers", "timeout", "proxy", "patience", "retries")
    ]
    found += [("aggregation", "options", key) for key in ("scale", "preference", "x")]
    found += [("loss", "options", "clip_epsilon"), ("objectives", 0, "options", "scale")]
    return found


PLACES = places()
CHANGES = st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=4)


def changed(changes: list[tuple[tuple[str | int, ...], Any]]) -> dict[str, Any]:
    data: Any = copy.deepcopy(BASE)
    for place, value in changes:
        node = data
        for key in place[:-1]:
            if isinstance(node, dict):
                node = node.setdefault(key, {})
            elif isinstance(node, list) and isinstance(key, int) and key < len(node):
                node = node[key]
        last = place[-1]
        if isinstance(node, dict) or (isinstance(node, list) and isinstance(last, int) and last < len(node)):
            node[last] = value  # type: ignore[index]
    assert isinstance(data, dict)
    return data


@examples(60)
@given(changes=CHANGES)
def test_a_training_is_read_or_refused_and_planned_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Any]
) -> None:
    config = one_line(lambda: parse(changed(changes), [], Config, "here"))
    if config is None:
        return
    written = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    written.write_text(to_yaml(config), encoding="utf-8")
    assert load(written) == config
    json.dumps(config.model_dump(mode="json"))  # as checkpoints record it
    plan = one_line(lambda: make_plan(config, 1))
    if plan is not None:
        assert plan.lines() and json.dumps(plan.as_dict(None))


@examples(60)
@given(
    data=st.one_of(VALUES, st.dictionaries(TEXTS, VALUES, max_size=5)),
    kind=st.sampled_from(
        [
            Config,
            SftConfig,
            RewardModelConfig,
            PairsConfig,
        ]
    ),
)
def test_a_file_of_anything_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: Any, kind: type[Section]
) -> None:
    path = tmp_path_factory.getbasetemp() / "anything.yaml"
    try:
        path.write_text(json.dumps(data))
    except (UnicodeEncodeError, ValueError, RecursionError):
        return
    one_line(lambda: load(path, kind=kind))
    try:
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
    except (UnicodeEncodeError, ValueError, RecursionError):
        return
    one_line(lambda: methods.load(path) if kind is Config else load(path, kind=kind))


SIGNS = st.text("[]{}:,?&*!|>'\"#%@`-~\n\t ab01.<é\x85\u2028\ufeff", max_size=40)


@examples(120)
@given(text=SIGNS, raw=st.binary(max_size=20))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    for content in (text.encode(), raw, b"output_dir: " + raw, b"seed: " + text.encode()):
        path.write_bytes(content)
        one_line(lambda: load(path))


@examples(120)
@given(
    key=st.one_of(st.sampled_from([".".join(map(str, place)) for place in PLACES]), SIGNS),
    value=SIGNS | TEXTS,
)
def test_any_override_is_taken_or_refused(key: str, value: str) -> None:
    config = one_line(lambda: parse(copy.deepcopy(BASE), [f"{key}={value}"], Config, Path("here")))
    assert config is None or parse(yaml.safe_load(to_yaml(config)), [], Config, "again") == config
