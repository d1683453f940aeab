"""Every field of the configuration is fixed, free or a place; and what defines a run is refused by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from gapo_mega.config import Config, OptimizerConfig, Section
from gapo_mega.config.loading import parse
from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig
from gapo_mega.runs.identity import RULES, Rule, fields_of, rule_of, rules_of, settings_of
from gapo_mega.runs.resume import compare_settings
from gapo_mega.user_code import is_subclass
from tests.helpers.fake_runs import configuration

WHERE = "checkpoints/step_00000002"


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    """``kind`` and every section class in it."""
    yield kind
    for field in kind.model_fields.values():
        for annotation in (field.annotation, *get_args(field.annotation)):
            if is_subclass(annotation, Section):
                yield from sections(annotation)


ALL = {section for kind in (Config, SftConfig, RewardModelConfig, PairsConfig) for section in sections(kind)}


def is_section(section: type[Section], name: str) -> bool:
    annotation = section.model_fields[name].annotation
    return any(is_subclass(part, Section) for part in (annotation, *get_args(annotation)))


@pytest.mark.parametrize("section", sorted(ALL, key=lambda found: found.__name__))
def test_every_field_has_a_rule(section: type[Section]) -> None:
    """A new field is in no line of the table: say there whether a resumed run may change it."""
    for name in section.model_fields:
        if not is_section(section, name):
            assert isinstance(rule_of(section, name), Rule)


def test_no_rule_is_of_a_field_that_is_gone() -> None:
    for section, rules in RULES.items():
        assert set(rules) <= {name for name in section.model_fields if not is_section(section, name)}, section


def test_a_new_field_is_found() -> None:
    class Newer(OptimizerConfig):
        nesterov: bool = False

    with pytest.raises(KeyError, match=r"Newer\.nesterov"):
        list(fields_of(Newer()))


def test_settings_are_readable_and_whole(tmp_path: Path) -> None:
    config = configuration(tmp_path, aggregation={"name": "gapo", "options": {"p": 2, "scale": "none"}})
    settings = settings_of(config)
    assert settings["objectives.0.name"] == "long" and settings["objectives.1.function"] == "m:f"
    assert settings["aggregation.options"] == {"p": 2, "scale": "none"}
    assert settings["critic.optimizer.lr"] == 5e-7
    assert not any(key.startswith("critic.") for key in settings_of(config, without="critic"))


def compared(first: Section, second: Section) -> Any:
    return compare_settings(settings_of(first), settings_of(second), rules_of(second), WHERE)


DEFINING: list[tuple[dict[str, Any], str]] = [
    ({"seed": 2}, "seed: found 2, but checkpoints/step_00000002 was written with 1"),
    ({"algorithm": {"minibatches": 2}}, "algorithm.minibatches: found 2"),
    ({"algorithm": {"ppo_epochs": 3}}, "algorithm.ppo_epochs: found 3"),
    ({"algorithm": {"kl_beta": 0.5}}, "algorithm.kl_beta: found 0.5"),
    ({"aggregation": {"name": "mgda"}}, "aggregation.name: found mgda"),
    ({"aggregation": {"options": {"p": 2}}}, "aggregation.options: found {'p': 2}"),
    ({"advantages": {"name": "gae"}}, "advantages.name: found gae"),
    ({"loss": {"options": {"clip_epsilon": 0.3}}}, "loss.options: found"),
    ({"rollout": {"temperature": 0.7}}, "rollout.temperature: found 0.7"),
    ({"rollout": {"prompts_per_step": 2}}, "rollout.prompts_per_step: found 2"),
    ({"data": {"system_prompt": "Be kind."}}, "data.system_prompt: found Be kind."),
    ({"data": {"heldout_prompts": 2}}, "data.heldout_prompts: found 2"),
    ({"data": {"max_prompt_tokens": 9}}, "data.max_prompt_tokens: found 9"),
    ({"optimizer": {"schedule": "constant"}}, "optimizer.schedule: found constant"),
    ({"optimizer": {"warmup_fraction": 0.5}}, "optimizer.warmup_fraction: found 0.5"),
    ({"critic": {"heads": "separate"}}, "critic.heads: found separate"),
    ({"critic": {"optimizer": {"schedule": "linear"}}}, "critic.optimizer.schedule: found linear"),
    ({"gradients": {"scope": "last_block"}}, "gradients.scope: found last_block"),
    ({"evaluation": {"samples_per_prompt": 3}}, "evaluation.samples_per_prompt: found 3"),
    ({"model": {"dtype": "bf16"}}, "model.dtype: found bf16"),
]


@pytest.mark.parametrize(("changes", "message"), DEFINING, ids=[message for _, message in DEFINING])
def test_what_defines_a_run_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    found = compared(configuration(tmp_path), configuration(tmp_path, **changes))
    assert len(found.refused) == 1
    assert found.refused[0].startswith(message)
    assert "was written with" in found.refused[0] and "another output_dir, or --overwrite" in found.refused[0]
    with pytest.raises(ValueError) as error:
        found.raise_refused()
    assert "\n" not in str(error.value)


NAMES = [{"name": "long", "function": "m:f"}, {"name": "short", "function": "m:f"}]


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (NAMES[::-1], "objectives: found short, long, but .* was written with long, short in this order"),
        (NAMES[:1], "objectives: found long, but .* was written with long, short"),
        ([{**NAMES[0], "clip": 1.0}, NAMES[1]], r"objectives\.0\.clip: found 1\.0"),
        ([NAMES[0], {**NAMES[1], "function": "m:g"}], r"objectives\.1\.function: found m:g"),
        ([NAMES[0], {**NAMES[1], "options": {"scale": 2}}], r"objectives\.1\.options: found {'scale': 2}"),
    ],
)
def test_objectives_compare_by_name_and_order(tmp_path: Path, objectives: list[Any], message: str) -> None:
    found = compared(configuration(tmp_path), configuration(tmp_path, objectives=objectives))
    with pytest.raises(ValueError, match="^" + message):
        found.raise_refused()


FREE: list[tuple[dict[str, Any], dict[str, tuple[Any, Any]]]] = [
    ({"steps": 9}, {"steps": (4, 9)}),
    ({"optimizer": {"lr": 1e-4}}, {"optimizer.lr": (1e-6, 1e-4)}),
    ({"critic": {"optimizer": {"lr": 1e-4}}}, {"critic.optimizer.lr": (5e-7, 1e-4)}),
    (
        {"checkpoint": {"keep": 5, "every_steps": 1}},
        {"checkpoint.keep": (2, 5), "checkpoint.every_steps": (0, 1)},
    ),
    ({"logging": {"tensorboard": True}}, {"logging.tensorboard": (False, True)}),
    ({"parallel": {"pipeline": 2}}, {"parallel.pipeline": (1, 2)}),
    ({"micro_batch_size": 2}, {"micro_batch_size": (8, 2)}),
    ({"gradients": {"store": "single"}}, {"gradients.store": ("shards", "single")}),
    ({"gradients": {"forward": "separate"}}, {"gradients.forward": ("auto", "separate")}),
    ({"evaluation": {"shown": 3}}, {"evaluation.shown": (1, 3)}),
    ({"output_dir": "elsewhere"}, {}),
]


@pytest.mark.parametrize(("changes", "changed"), FREE)
def test_what_may_change_is_taken_and_named(
    tmp_path: Path, changes: dict[str, Any], changed: dict[str, tuple[Any, Any]]
) -> None:
    found = compared(configuration(tmp_path), configuration(tmp_path, **changes))
    assert found.refused == [] and found.unchecked == []
    assert {key: pair for key, pair in found.changed.items() if key != "output_dir"} == changed


def test_a_setting_that_the_checkpoint_does_not_know_is_told(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    saved = settings_of(config)
    del saved["rollout.top_p"]
    found = compare_settings(saved, settings_of(config), rules_of(config), WHERE)
    assert found.unchecked == ["rollout.top_p"] and not found.refused


def with_reward(folder: Path, tmp_path: Path, text: str, name: str = "short") -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "rewards.py").write_text(text)
    objectives = [{"name": "a", "function": f"rewards.py:{name}"}]
    data = configuration(tmp_path, objectives=objectives).model_dump()
    return parse(data, [], Config, "test", folder)


def test_a_users_file_may_move_or_be_mended_but_not_both(tmp_path: Path) -> None:
    text = "def short(p, r): return [1.0]\ndef other(p, r): return [2.0]\n"
    first = with_reward(tmp_path / "a", tmp_path, text)
    saved = settings_of(first)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert saved["objectives.0.function"] == {
        "file": str(tmp_path / "a" / "rewards.py"), "name": "short", "sha256": digest,
    }  # fmt: skip

    def against(config: Config) -> Any:
        return compare_settings(saved, settings_of(config), rules_of(config), WHERE)

    moved = against(with_reward(tmp_path / "b", tmp_path, text))
    assert not moved.refused and str(tmp_path / "b") in moved.changed["objectives.0.function"][1]
    elsewhere = against(with_reward(tmp_path / "c", tmp_path, text + "# new\n"))
    assert elsewhere.refused[0].startswith("objectives.0.function: found ")
    renamed = against(with_reward(tmp_path / "a", tmp_path, text, "other"))
    assert renamed.refused[0].startswith("objectives.0.function: found ")
    mended = against(with_reward(tmp_path / "a", tmp_path, text + "# new\n"))
    assert not mended.refused and digest in mended.changed["objectives.0.function"][0]


def test_a_scalarizer_cannot_be_taken_up_changed_or_left_in_a_resumed_run(tmp_path: Path) -> None:
    """Also where the section is not there, on either side."""
    choices: list[dict[str, Any] | None] = [None, {"name": "gdpo"}, {"name": "rvpo"}]
    configs = [configuration(tmp_path, scalarization=choice) for choice in choices]
    for i, saved in enumerate(configs):
        for j, mine in enumerate(configs):
            found = compare_settings(settings_of(saved), settings_of(mine), rules_of(mine), WHERE)
            assert bool(found.refused) is (i != j), (i, j)
            assert not found.refused or found.refused[0].startswith("scalarization.name: found ")
            assert not found.unchecked
