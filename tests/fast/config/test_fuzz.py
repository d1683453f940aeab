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
from gapo_mega.config.judges import JudgesConfig
from gapo_mega.config.loading import load, parse, to_yaml
from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig
from gapo_mega.data.preview import preview_supervised
from gapo_mega.objectives.pairwise import PairwiseJudge, PairwiseOptions
from gapo_mega.planning import methods
from gapo_mega.runs.identity import settings_of
from gapo_mega.runs.pairs import PairsRun
from gapo_mega.runs.supervised import RewardRun, SftRun
from tests.helpers.fuzzing import TEXTS, VALUES, examples, one_line
from tests.helpers.tiny import byte_tokenizer, tiny_llama

BASE: dict[str, Any] = {
    "output_dir": "o",
    "model": {"path": "HuggingFaceTB/SmolLM2-135M"},
    "data": {"source": "package:prompts"},
    "objectives": [
        {"name": "a", "function": "gapo_mega.demo.rewards:concise"},
        {"name": "b", "kind": "http", "options": {"url": "http://127.0.0.1:1"}},
    ],
}
JUDGE: dict[str, Any] = {"url": "http://127.0.0.1:1", "model": "m", "rubrics": {"a": "is kind"}}
RUNS: dict[type[Section], Any] = {SftConfig: SftRun, RewardModelConfig: RewardRun, PairsConfig: PairsRun}


def fields_of(config: type[Section]) -> list[tuple[str | int, ...]]:
    """Every field of a configuration and of its sections, and some that do not exist."""
    found: list[tuple[str | int, ...]] = [("x",)]
    for name, field in config.model_fields.items():
        found.append((name,))
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found += [(name, key) for key in [*kind.model_fields, "x"]]
    return found


def places() -> list[tuple[str | int, ...]]:
    """Those of a training."""
    found = fields_of(Config)
    found += [("objectives", 0), ("objectives", 1, "options", "url"), ("method",)]
    for key in BASE["objectives"][1]:
        found.append(("objectives", 1, key))
    found += [
        ("objectives", 1, "options", key) for key in ("headers", "timeout", "proxy", "patience", "retries")
    ]
    found += [("aggregation", "options", key) for key in ("scale", "preference", "x")]
    found += [("loss", "options", "clip_epsilon"), ("objectives", 0, "options", "scale")]
    return found


def supervised_places(config: type[Section]) -> list[tuple[str | int, ...]]:
    """Those of a run without rollouts."""
    found = fields_of(config)
    found += [("model", "lora", key) for key in ("rank", "alpha", "path", "target_modules")]
    if config is PairsConfig:
        found += [("objectives", 1), ("aggregation", "options", "scale")]
        found += [("objectives", 1, key) for key in ("name", "weight", "data")]
        found += [("objectives", 1, "data", key) for key in ("source", "format", "margins", "chosen_column")]
    return found


def changes_at(places: list[tuple[str | int, ...]]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.tuples(st.sampled_from(places), VALUES), min_size=1, max_size=4)


PLACES = places()
CHANGES = changes_at(PLACES)
SUPERVISED_CHANGES = st.one_of(
    *(st.tuples(st.just(kind), changes_at(supervised_places(kind))) for kind in RUNS)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows of pairs."""
    found = tmp_path_factory.mktemp("inputs")
    tiny_llama(found / "model", vocab=300, max_position_embeddings=400)
    byte_tokenizer(found / "model")
    question = "\n\nHuman: May I?\n\nAssistant:"
    row = {"chosen": f"{question} yes", "rejected": f"{question} no"}
    (found / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    return found


@pytest.fixture(scope="module")
def base(folder: Path) -> dict[str, Any]:
    """A training that fits; what its plan imports is no time of a later refusal."""
    found = BASE | {"model": {"path": str(folder / "model")}}
    make_plan(parse(copy.deepcopy(found), [], Config, "here"), 1)
    return found


@pytest.fixture(scope="module")
def supervised(folder: Path) -> dict[type[Section], dict[str, Any]]:
    """Configurations of runs without rollouts that fit."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = {"path": str(folder / "model"), "max_tokens": 100, "chat_template": template}
    data = {"source": str(folder / "rows.jsonl")}
    common = {"output_dir": "o", "model": model, "logging": {"tensorboard": False}}
    found: dict[type[Section], dict[str, Any]] = {kind: common | {"data": data} for kind in RUNS}
    found[PairsConfig] = common | {"objectives": [{"name": name, "data": dict(data)} for name in "ab"]}
    for kind, settings in found.items():
        config = parse(copy.deepcopy(settings), [], kind, "here")
        tokenizer = RUNS[kind].check(config, 1).tokenizer
        assert preview_supervised(config, lambda: tokenizer)  # noqa: B023
    return found


def changed(base: dict[str, Any], changes: list[tuple[tuple[str | int, ...], Any]]) -> dict[str, Any]:
    data: Any = copy.deepcopy(base)
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
    tmp_path_factory: pytest.TempPathFactory, base: dict[str, Any], changes: list[Any]
) -> None:
    config = one_line(lambda: parse(changed(base, changes), [], Config, "here"))
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
@given(kind_and_changes=SUPERVISED_CHANGES)
def test_a_run_without_rollouts_is_read_or_refused_and_checked_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    supervised: dict[type[Section], dict[str, Any]],
    kind_and_changes: tuple[type[Section], list[Any]],
) -> None:
    """Up to what is checked before all data are read and the model is built."""
    kind, changes = kind_and_changes
    config = one_line(lambda: parse(changed(supervised[kind], changes), [], kind, "here"))
    if config is None:
        return
    written = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    written.write_text(to_yaml(config), encoding="utf-8")
    assert load(written, kind=kind) == config
    json.dumps(settings_of(config))
    start = one_line(lambda: RUNS[kind].check(config, 1))
    if start is not None:
        one_line(lambda: preview_supervised(config, lambda: start.tokenizer))


@examples(60)
@given(changes=changes_at([*fields_of(PairwiseOptions), ("rubrics", "a"), ("rubrics", "")]))
def test_a_judge_is_read_or_refused_and_made_or_refused(changes: list[Any]) -> None:
    options = one_line(lambda: parse(changed(JUDGE, changes), [], PairwiseOptions, "here"))
    if options is None:
        return
    judge = one_line(lambda: PairwiseJudge(options, "--judge here"))
    if judge is not None:
        for rubric in options.rubrics:
            json.dumps(judge.request(rubric, [{"role": "user", "content": "w1"}], "a", "b"))


@examples(60)
@given(
    data=st.one_of(VALUES, st.dictionaries(TEXTS, VALUES, max_size=5)),
    kind=st.sampled_from(
        [
            Config,
            SftConfig,
            RewardModelConfig,
            PairsConfig,
            JudgesConfig,
            PairwiseOptions,
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
