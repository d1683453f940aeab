"""Configurations of supervised runs: read, written back, and refused where they cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapo_mega.config import Section
from gapo_mega.config.loading import dump, load
from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig, check_batches

MINIMAL = """
output_dir: runs/x
model: {path: m}
data: {source: rows.jsonl.gz}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def failure(path: Path, kind: type[Section], *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, overrides, kind=kind)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_one_file_serves_both_kinds(file: Path) -> None:
    reward = load(
        file, ["data.format=pku", "data.objective=harmless", "model.keep_layers=4"], kind=RewardModelConfig
    )
    assert (reward.data.objective, reward.model.keep_layers, reward.center_rewards) == ("harmless", 4, 0)
    sft = load(file, ["assistant_only=false"], kind=SftConfig)
    assert (sft.data.messages_column, sft.assistant_only) == ("messages", False)


def test_changing_another_field_of_the_optimizer_keeps_its_learning_rate(file: Path) -> None:
    assert load(file, ["optimizer.weight_decay=0.1"], kind=SftConfig).optimizer.lr == 1e-5


@pytest.mark.parametrize("kind", [RewardModelConfig, SftConfig])
def test_dump_reads_back(file: Path, tmp_path: Path, kind: type[Section]) -> None:
    config = load(file, ["optimizer.lr=3e-6", "model.chat_template='{{ a }}: no'", "max_steps=7"], kind=kind)
    dump(config, tmp_path / "out.yaml")
    assert load(tmp_path / "out.yaml", kind=kind) == config


@pytest.mark.parametrize(
    ("kind", "override", "parts"),
    [
        (
            RewardModelConfig,
            "data.chossen_column=x",
            ["data.chossen_column: unknown", "nearest is 'chosen_column'"],
        ),
        (RewardModelConfig, "assistant_only=true", ["assistant_only: unknown key", "accepted: output_dir"]),
        (SftConfig, "center_rewards=1.0", ["center_rewards: unknown key"]),
        (RewardModelConfig, "center_rewards=-1.0", ["center_rewards: found -1.0, accepted: greater"]),
        (SftConfig, "epochs=0", ["epochs: found 0, accepted: greater than or equal to 1"]),
        (SftConfig, "max_steps=0", ["max_steps: found 0, accepted: greater than or equal to 1"]),
        (SftConfig, "data.heldout_fraction=1.0", ["data.heldout_fraction: found 1.0, accepted: less than 1"]),
        (SftConfig, "model.keep_layers=0", ["model.keep_layers: found 0, accepted: greater"]),
        (SftConfig, "data.format=pku", ["data.format: found 'pku', accepted: 'auto', 'messages', 'col"]),
        (RewardModelConfig, "data.format=pku", ["data.objective: found nothing", "helpful, harmless"]),
        (
            RewardModelConfig,
            "data={source: a, format: hh, objective: helpful}",
            ["found helpful with format hh"],
        ),
        (SftConfig, "output_dir=", ["output_dir: found nothing"]),
    ],
)
def test_wrong_value_is_named(file: Path, kind: type[Section], override: str, parts: list[str]) -> None:
    message = failure(file, kind, override)
    for part in parts:
        assert part in message


def test_a_file_that_is_no_mapping_lists_the_keys_of_its_kind(file: Path) -> None:
    file.write_text("- a")
    assert "center_rewards" in failure(file, RewardModelConfig)


def test_batches_must_come_out_even(file: Path) -> None:
    config = load(file, ["batch_size=24", "micro_batch_size=4"], kind=SftConfig)
    for ranks in (1, 2, 3, 6):
        check_batches(config, ranks)
    with pytest.raises(
        ValueError, match=r"^batch_size: found 24, accepted for 5 data-parallel ranks: a multiple"
    ):
        check_batches(config, 5)
    with pytest.raises(ValueError, match=r"^micro_batch_size: found 4, accepted .* 3 on .*: 1, 3$"):
        check_batches(config, 8)


def test_a_tilde_is_expanded_in_every_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    given = ["output_dir=~/o", "model.path=~/m", "data.source=~/s", "data.heldout_source=~/h"]
    config = load(file, [*given, "model.chat_template=~/t.jinja"], kind=SftConfig)
    assert (config.output_dir, config.model.path) == ("/homes/me/o", "/homes/me/m")
    assert (config.data.source, config.data.heldout_source) == ("/homes/me/s", "/homes/me/h")
    assert config.model.chat_template == "/homes/me/t.jinja"
    text = "~{{ messages[0].content }}"
    assert load(file, [f"model.chat_template={text}"], kind=SftConfig).model.chat_template == text


PAIRS = """
output_dir: runs/x
model: {path: m}
objectives:
  - {name: helpful, data: {source: a.jsonl}}
  - {name: harmless, data: {source: b.jsonl, margins: {helpfulness: 0.5}}, weight: 0.5}
"""


def test_pairs_of_several_objectives(file: Path, tmp_path: Path) -> None:
    file.write_text(PAIRS)
    config = load(file, ["loss.beta=0.2", "optimizer.schedule=constant"], kind=PairsConfig)
    assert (config.data_sets, config.objectives[1].data.margins) == (2, {"helpfulness": 0.5})
    assert (config.loss.beta, config.optimizer.lr, config.aggregation.name) == (0.2, 1e-6, "gapo")
    dump(config, tmp_path / "out.yaml")
    assert load(tmp_path / "out.yaml", kind=PairsConfig) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objectives.1.name=helpful", "objectives: names must differ, found ['helpful', 'helpful']"),
        ("objectives=[]", "objectives: found [], accepted: "),
        ("objectives.0.weight=0", "objectives.0.weight: found 0, accepted: greater than 0"),
        ("objectives.0.data.margin={}", "objectives.0.data.margin: unknown key, the nearest is 'margins'"),
        ("loss.beta=0", "loss.beta: found 0, accepted: greater than 0"),
        ("loss.label_smoothing=0.5", "loss.label_smoothing: found 0.5, accepted: less than 0.5"),
        ("loss.name=kto", "loss.name: found 'kto', accepted: 'dpo' or 'ipo'"),
        ("loss={name: ipo, label_smoothing: 0.1}", "loss.label_smoothing: found 0.1 with name ipo"),
        ("loss.name=ipo", "objectives.1: found data.margins or a weight with loss.name ipo, accepted: dpo"),
        ("model.keep_layers=2", "model.keep_layers: found 2, accepted: null (the reference is the policy"),
        ("data.source=x", "data: unknown key"),
    ],
)
def test_what_pairs_refuse(file: Path, override: str, message: str) -> None:
    file.write_text(PAIRS)
    found = failure(file, PairsConfig, override)
    assert message in found


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [("evaluate_every: 7\n", []), ("", ["evaluate_every=7"]), ("evaluate_every: 3\n", ["evaluate_every=7"])],
)
@pytest.mark.parametrize("kind", [SftConfig, RewardModelConfig])
def test_evaluations_are_asked_for_by_their_old_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[Section], settings: str, overrides: list[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: o\nmodel: {path: m}\ndata: {source: s}\n" + settings)
    config = load(file, overrides, kind=kind)
    assert config.model_dump()["evaluation"] == {"every_steps": 7}
    assert [record.message for record in caplog.records] == ["evaluate_every is now evaluation.every_steps"]
