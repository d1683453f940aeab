"""Configuration files and overrides: what is read, and that every mistake is named in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gapo_mega.config import Config, OptimizerConfig
from gapo_mega.config.fields import LARGEST_INTEGER, LARGEST_NUMBER
from gapo_mega.config.loading import dump, load, to_yaml

MINIMAL = """
output_dir: runs/x
model: {path: m}
data: {source: prompts.jsonl}
objectives:
  - {name: short, function: "a.b:c"}
  - {name: kind, function: "a.b:d", options: {threshold: 1e-3}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_file_and_overrides(file: Path) -> None:
    config = load(
        file,
        [
            "optimizer.lr=3e-5",
            "objectives.0.name=brief",
            "aggregation.options.p=2",
            "data.system_prompt=Be brief.",
            "rollout={top_k: 5, top_p: 0.5}",
            "rollout.top_k=7",
            "model.path=a=b",
        ],
    )
    assert config.optimizer.lr == 3e-5
    assert config.critic.optimizer.lr == 5e-7
    assert [o.name for o in config.objectives] == ["brief", "kind"]
    assert config.objectives[1].options == {"threshold": 1e-3}
    assert config.aggregation.options == {"p": 2}
    assert config.data.system_prompt == "Be brief."
    assert (config.rollout.top_k, config.rollout.top_p) == (7, 0.5)
    assert config.model.path == "a=b"


def test_list_can_be_replaced_as_a_whole(file: Path) -> None:
    config = load(file, ["objectives=[{name: only, function: 'm:f'}]"])
    assert [o.name for o in config.objectives] == ["only"]


def test_unknown_key_names_path_neighbour_and_keys(file: Path) -> None:
    message = failure(file, "rollout.temprature=0.5")
    assert message.startswith("rollout.temprature: unknown key, the nearest is 'temperature'")
    assert "accepted: prompts_per_step, samples_per_prompt" in message
    assert "from override 'rollout.temprature=0.5'" in message


def test_unknown_key_of_a_list_item_and_of_the_file(file: Path) -> None:
    file.write_text(MINIMAL.replace("name: kind", "name: kind, clipp: 3"))
    message = failure(file)
    assert message.startswith("objectives.1.clipp: unknown key, the nearest is 'clip'")
    assert f"(from {file})" in message


def test_unknown_key_is_reported_before_what_it_made_missing(file: Path) -> None:
    file.write_text(MINIMAL.replace("source:", "sources:"))
    assert failure(file).startswith("data.sources: unknown key, the nearest is 'source'")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.temperature=-1", ["rollout.temperature: found -1, accepted: greater than or equal to 0"]),
        ("rollout.temperature=0", ["rollout.temperature: found 0.0, accepted: above 0 (a greedy response"]),
        ("rollout.top_k=1", ["rollout.top_k: found 1, accepted: 0 (all tokens), or at least 2 (a greedy"]),
        ("steps=ten", ["steps: found 'ten', accepted: a valid integer"]),
        ("steps=true", ["steps: found True, accepted: a valid integer"]),
        ("model.dtype=fp16", ["model.dtype: found 'fp16', accepted: 'fp32' or 'bf16'"]),
        ("objectives.0.clip=0", ["objectives.0.clip: found 0, accepted: greater than 0"]),
        ("objectives.0.name=a b", ["objectives.0.name: found 'a b', accepted: match pattern"]),
        ("objectives=[]", ["objectives: found [], accepted:", "at least 1 item"]),
        ("objectives.5.name=x", ["objectives.5: objectives has 2 items, accepted: an index from 0 to 1"]),
        ("objectives.first.name=x", ["objectives.first:", "accepted: an index from 0 to 1"]),
        ("parallel.expert_tensor=2", ["parallel.expert_tensor: found 2 with parallel.expert 1, accepted:"]),
        (
            "critic.optimizer.name=sgd",
            ["in critic.optimizer: optimizer.distributed: found true with name sgd"],
        ),
        ("model.path.x=1", ["model.path: found 'm', which has no parts to set"]),
        ("model=", ["model: found nothing, accepted:"]),
        ("output_dir=''", ["output_dir: found '', accepted: a name"]),
        ("output_dir='  '", ["output_dir: found '  ', accepted: a name"]),
        ('output_dir="a\\0b"', ["output_dir: found 'a\\x00b', accepted: a name"]),
        ("model.path=''", ["model.path: found '', accepted: a name"]),
        ('model.path="a\\nb"', ["model.path: found 'a\\nb', accepted: a name in one line"]),
        ('data.source=["a", "b\\u2028"]', ["data.source.1: found 'b\\u2028', accepted: a name in one line"]),
        ("data.source=[a, 3]", ["data.source.1: found 3, accepted: a valid string (from"]),
        ("data.source=[]", ["data.source: found [], accepted: a valid string or at least 1 item"]),
        ("data.heldout_source=''", ["data.heldout_source: found '', accepted: a name"]),
        ("critic.path=''", ["critic.path: found '', accepted: a name"]),
        ("data.source=''", ["data.source: found '', accepted: a name or a valid list (from"]),
        ("data.source=3", ["data.source: found 3, accepted: a valid string or a valid list (from"]),
        (
            "gradients.scope=all",
            ["gradients.scope: found 'all', accepted: 'full', ", "or a valid list (from"],
        ),
    ],
)
def test_wrong_value_is_named_with_what_is_accepted(file: Path, override: str, parts: list[str]) -> None:
    message = failure(file, override)
    assert message.startswith(parts[0])
    for part in parts:
        assert part in message
    assert f"(from override {override!r})" in message


def test_the_last_override_is_blamed(file: Path) -> None:
    message = failure(file, "steps=5", "steps=0", "seed=3")
    assert "(from override 'steps=0')" in message


def test_missing_value_says_what_it_means(file: Path) -> None:
    file.write_text(MINIMAL.replace("path: m", "dtype: fp32"))
    assert failure(file).startswith("model.path: not given, accepted: a value (Hugging Face directory")


def test_check_over_several_keys_names_both_origins(file: Path) -> None:
    message = failure(file, "objectives.0.name=kind")
    assert message == f"objectives: names must differ, found ['kind', 'kind'] (from {file} and its overrides)"


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("optimizer.lr=.inf", "optimizer.lr: found inf"),
        ("optimizer.lr=1e999", "optimizer.lr: found inf"),
        ("optimizer={lr: .nan}", "optimizer.lr: found nan"),
        ("aggregation.options.p=.inf", "aggregation.options.p: found inf"),
        ("aggregation.options={a: {b: [1, -.inf]}}", "aggregation.options.a.b.1: found -inf"),
        ("objectives.1.options.threshold=-.INF", "objectives.1.options.threshold: found -inf"),
    ],
)
def test_numbers_that_are_not_finite_are_named(file: Path, override: str, found: str) -> None:
    assert failure(file, override) == f"{found}, accepted: a finite number (from override {override!r})"
    key, _, value = override.partition("=")
    if key.startswith("optimizer"):
        file.write_text(MINIMAL + ("optimizer: " + (value if key == "optimizer" else f"{{lr: {value}}}")))
        assert failure(file) == f"{found}, accepted: a finite number (from {file})"


@pytest.mark.parametrize(
    "given", ['{"\\ud800": null}', '{headers: {"\\ud800": a}}', '{a: [{"\\ud800": {}}]}']
)
def test_half_a_character_is_no_key_either(file: Path, given: str) -> None:
    """Also in options, which are any mapping."""
    message = failure(file, f"objectives.0.options={given}")
    assert "found '\\ud800', accepted: UTF-8 text" in message and message.isascii()


@pytest.mark.parametrize(
    "key", ["output_dir", "data.system_prompt", "aggregation.options.x.y", "objectives.0.name"]
)
def test_bytes_of_the_command_line_that_are_no_text_are_named(file: Path, key: str) -> None:
    """Python hands them on as lone surrogates, which no file of the run can hold."""
    override = os.fsdecode(f"{key}=caf".encode() + b"\xe9")
    message = failure(file, override)
    assert message.encode().startswith(
        f"{key}: found 'caf\\udce9', accepted: UTF-8 text (from override".encode()
    )


def test_half_a_character_in_a_file_is_named(file: Path) -> None:
    file.write_text(MINIMAL.replace(".jsonl", '.jsonl, system_prompt: "\\ud83d"'))
    assert failure(file) == f"data.system_prompt: found '\\ud83d', accepted: UTF-8 text (from {file})"


def test_a_configuration_made_in_python_has_finite_numbers_too() -> None:
    with pytest.raises(ValueError, match="finite number"):
        OptimizerConfig(lr=float("inf"))


def test_the_text_of_an_override_is_not_cut_and_empty_is_nothing(file: Path) -> None:
    overrides = ["output_dir=runs/a #1", "data.system_prompt = #3 ", "data.prompt_column=a=b", "seed=010"]
    config = load(file, overrides)
    assert (config.output_dir, config.data.system_prompt) == ("runs/a #1", "#3")
    assert (config.data.prompt_column, config.seed) == ("a=b", 10)
    assert load(file, ["data.system_prompt=x", "data.system_prompt="]).data.system_prompt is None
    assert load(file, ["data.system_prompt=''"]).data.system_prompt == ""
    for override, found in (
        ("steps=1:30", "'1:30'"),
        ("steps=1_000", "'1_000'"),
        ("data.shuffle=no", "'no'"),
    ):
        assert f"found {found}, accepted: a valid" in failure(file, override)


@pytest.mark.parametrize("index", ["-1", "2", "00", "²", "+1", "9" * 5000])
def test_an_override_reaches_the_items_that_a_list_has(file: Path, index: str) -> None:
    assert (
        "objectives has 2 items, accepted: an index from 0 to 1; a longer one is given as a whole"
        in failure(file, f"objectives.{index}={{name: x}}")
    )
    file.write_text(MINIMAL.replace("source: prompts.jsonl", "source: []"))
    assert "data.source has 0 items, accepted: none" in failure(file, "data.source.0=x")


def test_an_override_of_a_shared_section_changes_one_place(file: Path) -> None:
    file.write_text(MINIMAL + "optimizer: &o {lr: 1e-6, eps: 1e-7}\ncritic: {optimizer: *o}\n")
    config = load(file, ["critic.optimizer.lr=2e-6"])
    assert (config.optimizer.lr, config.critic.optimizer.lr) == (1e-6, 2e-6)
    file.write_text(
        MINIMAL + "optimizer: &o {lr: 1e-6, eps: 1e-7}\ncritic: {optimizer: {<<: *o, lr: 3e-6}}\n"
    )
    config = load(file)
    assert (config.critic.optimizer.lr, config.critic.optimizer.eps) == (3e-6, 1e-7)


def test_nothing_in_place_of_a_section_lists_its_keys(file: Path) -> None:
    file.write_text(MINIMAL + "logging:\n")
    assert failure(file).startswith(
        "logging: found nothing, accepted: a mapping with the keys tensorboard, wandb, wandb_project"
    )


def test_a_tilde_is_expanded_in_every_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    config = load(
        f"~/{file.name}",
        [
            "output_dir=~/out",
            "model.path=~/m",
            "critic.path=~/c",
            "data.source=[~/a.jsonl, b.jsonl]",
            "data.heldout_source=~/h.jsonl",
            "objectives.0.function=~/f.py:g",
        ],
    )
    home = str(file.parent)
    assert (config.output_dir, config.model.path, config.critic.path) == (
        f"{home}/out",
        f"{home}/m",
        f"{home}/c",
    )
    assert config.data.source == [f"{home}/a.jsonl", "b.jsonl"]
    assert config.data.heldout_source == f"{home}/h.jsonl"
    assert config.objectives[0].function == f"{home}/f.py:g"
    assert load(file, ["data.source=~/a[1].jsonl"]).data.source == f"{home}/a[1].jsonl"


def test_files_that_are_no_text(file: Path) -> None:
    file.write_bytes(MINIMAL.encode() + b"# caf\xe9\n")
    assert failure(file) == f"{file}: not readable as YAML: line 8: found the byte 0xe9, accepted: UTF-8"
    file.write_bytes(MINIMAL.encode("utf-16"))
    assert f"{file}: not readable as YAML: line 1: found the byte 0xff" in failure(file)
    file.write_bytes(MINIMAL.encode("utf-8-sig"))
    assert load(file).output_dir == "runs/x"
    file.write_text("")
    assert f"{file}: found nothing, accepted: a mapping with the keys output_dir" in failure(file)
    assert "not found" in failure(file.parent)


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", "--steps=3"])
def test_malformed_override(file: Path, override: str) -> None:
    assert "accepted: key=value" in failure(file, override)


def test_broken_files(file: Path, tmp_path: Path) -> None:
    assert "not found" in failure(tmp_path / "absent.yaml")
    file.write_text("steps: [1")
    assert f"{file}: not readable as YAML" in failure(file)
    file.write_text("- a")
    assert "accepted: a mapping with the keys output_dir" in failure(file)
    file.write_text(MINIMAL + "\nsteps: 3\nsteps: 4\n")
    assert "key 'steps' is given twice" in failure(file)
    file.write_text(MINIMAL)
    assert "value not readable as YAML" in failure(file, "steps=[1")


def test_dump_reads_back(file: Path, tmp_path: Path) -> None:
    config = load(file, ["optimizer.lr=1e-7", "data.system_prompt='no: really'", "seed=7"])
    dump(config, tmp_path / "new" / "config.yaml")
    assert load(tmp_path / "new" / "config.yaml") == config


@settings(deadline=None)  # a time limit says nothing about correctness on a busy machine
@example(lr=1.0, seed=0, text="1e5")
@example(lr=1.0, seed=0, text="\x85")
@given(
    lr=st.floats(min_value=1e-300, max_value=LARGEST_NUMBER),
    seed=st.integers(-LARGEST_INTEGER, LARGEST_INTEGER),
    text=st.text(max_size=30),
)
def test_dump_reads_back_any_number_and_text(
    tmp_path_factory: pytest.TempPathFactory, lr: float, seed: int, text: str
) -> None:
    config = Config.model_validate(
        {
            "output_dir": "o",
            "seed": seed,
            "model": {"path": "m"},
            "data": {"source": "s", "system_prompt": text},
            "objectives": [{"name": "a"}],
            "optimizer": {"lr": lr},
        }
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config


def test_a_setting_that_has_moved_is_taken_by_its_old_name(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = ["algorithm.clip_epsilon is now loss.options.clip_epsilon"]
    old = MINIMAL + "algorithm: {kl_beta: 0.5, clip_epsilon: 0.3}\n"
    new = MINIMAL + "loss: {options: {clip_epsilon: 0.3}}\n"
    for text, overrides, expected in [
        (old, [], 0.3),
        (old, ["algorithm.clip_epsilon=0.4"], 0.4),
        (old, ["loss.options.clip_epsilon=0.4"], 0.4),
        (new, ["algorithm.clip_epsilon=0.4"], 0.4),
        (new, ["algorithm={clip_epsilon: 0.4}"], 0.4),
        (MINIMAL, ["algorithm.clip_epsilon=0.4"], 0.4),
    ]:
        file.write_text(text)
        caplog.clear()
        config = load(file, overrides)
        assert (config.loss.name, config.loss.options) == ("ppo", {"clip_epsilon": expected})
        assert [record.message for record in caplog.records] == told
        assert "clip_epsilon" not in to_yaml(config).partition("algorithm:")[2]
    caplog.clear()
    file.write_text(new)
    assert load(file).loss.options == {"clip_epsilon": 0.3}
    assert not caplog.records


def test_a_setting_given_by_its_old_and_its_new_name_is_refused(file: Path) -> None:
    beside = (
        "algorithm.clip_epsilon: found beside loss.options.clip_epsilon, its new name; accepted: the new one"
    )
    file.write_text(
        MINIMAL + "algorithm: {clip_epsilon: 0.3}\nloss: {name: ppo, options: {clip_epsilon: 0.3}}\n"
    )
    assert failure(file) == f"{beside} (from {file})"
    file.write_text(MINIMAL)
    both = ("algorithm.clip_epsilon=0.3", "loss.options.clip_epsilon=0.2")
    assert failure(file, *both) == f"{beside} (from override 'algorithm.clip_epsilon=0.3')"


def test_what_has_moved_does_not_hide_a_wrong_new_place(file: Path) -> None:
    file.write_text(MINIMAL + "algorithm: {clip_epsilon: 0.3}\nloss: ppo\n")
    assert failure(file).startswith("loss: found 'ppo', accepted:")
