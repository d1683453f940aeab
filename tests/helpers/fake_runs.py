"""Whole training runs above a fake engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from gapo_mega import advantages, losses, scalarization
from gapo_mega.config import Config, ObjectiveConfig
from gapo_mega.models.shape import ModelShape
from gapo_mega.objectives.base import ObjectiveKind
from gapo_mega.planning.resolved import ModelSource, ResolvedRun
from gapo_mega.rollout.backends import Policy, RolloutBackend
from gapo_mega.runs.preflight import build_aggregator
from gapo_mega.runs.session import Session
from gapo_mega.runs.shared_answers import SharedAnswers
from gapo_mega.runs.trainer import Trainer
from gapo_mega.types import Prompt
from tests.helpers.fake_engine import END, FakeEngine, FakeTokenizer

SHAPE = ModelShape(
    family="llama", num_layers=2, hidden=8, ffn=8, heads=2, kv_groups=2, head_dim=4, vocab=42, tied=True,
    rope_theta=1e4, norm_eps=1e-5, qkv_bias=False, max_positions=64,
)  # fmt: skip


PROMPTS = [Prompt(i, f"w{i}", (2 + i, 3)) for i in range(10)]


HELD_OUT = [Prompt(i, f"w{20 + i}", (22 + i,)) for i in range(3)]


class Words(ObjectiveKind):
    """Words of a response, or with ``sign`` -1 their absence; raises ``fail`` where it is given."""

    kind: ClassVar[str] = "words"

    def __init__(self, name: str, sign: float = 1.0, fail: Exception | None = None) -> None:
        super().__init__(ObjectiveConfig(name=name))
        self._sign = sign
        self.fail = fail

    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> object:
        if self.fail is not None:
            raise self.fail
        return [
            self._sign * len(response.split()) + len(prompt.text)
            for prompt, response in zip(prompts, responses, strict=True)
        ]


def configuration(directory: Path, **sections: Any) -> Config:
    config: dict[str, Any] = {
        "output_dir": str(directory),
        "steps": 4,
        "model": {"path": "unused"},
        "data": {"source": "unused"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 6},
        "objectives": [{"name": "long", "function": "m:f"}, {"name": "short", "function": "m:f"}],
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False, "progress": False},
        "evaluation": {"shown": 1},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    return Config.model_validate(config)


def trainer(
    directory: Path,
    engine: FakeEngine | None = None,
    objectives: list[Words] | None = None,
    *,
    with_report: bool = False,
    held_out: list[Prompt] = HELD_OUT,
    session: Session | None = None,
    shared: SharedAnswers | None = None,
    backend: type[RolloutBackend] | None = None,
    **sections: Any,
) -> Trainer:
    """A trainer of four steps with two objectives; ``sections`` of the configuration differ."""
    config = configuration(directory, **sections)
    estimator = advantages.build(config.advantages.name, **config.advantages.options)
    policy = ModelSource("unused", SHAPE)
    scalarizer = None
    if config.scalarization is not None:
        scalarizer = scalarization.build(config.scalarization.name, **config.scalarization.options)
        scalarizer.prepare([objective.name for objective in config.objectives])
    resolved = ResolvedRun(
        config=config,
        world=1,
        policy=policy,
        critic=policy if estimator.needs_values else None,
        objectives=objectives or [Words("long"), Words("short", -1.0)],
        score_models=[],
        aggregator=build_aggregator(config),
        estimator=estimator,
        loss=losses.build(config.loss.name, **config.loss.options),
        scalarizer=scalarizer,
    )
    tokenizer: Any = FakeTokenizer()
    if not (directory / "config.yaml").exists():  # the report reads it
        directory.mkdir(exist_ok=True)
        (directory / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    engine = engine or FakeEngine()
    source = None if backend is None else backend(Policy(engine, directory, 0, (END,)), config)
    return Trainer(
        resolved,
        engine,
        tokenizer,
        PROMPTS,
        held_out,
        with_report=with_report,
        session=session,
        shared=shared,
        backend=source,
    )
