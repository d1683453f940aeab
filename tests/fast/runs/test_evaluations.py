"""Evaluations while training, above a fake engine: what is asked, logged, kept and chosen."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gapo_mega.evaluation.standing import Best
from gapo_mega.rollout.heldout import Answers
from gapo_mega.runs.evaluations import sample_pairs
from gapo_mega.runs.trainer import Trainer
from tests.helpers.fake_engine import FakeEngine, terminate
from tests.helpers.fake_runs import HELD_OUT, Words, trainer
from tests.helpers.metrics_log import CLOCKED, metrics
from tests.helpers.team import Team

EVALUATION = ("heldout",)


class Playing(Words):
    """Scores of held-out answers that a list gives, an evaluation each; training prompts have others."""

    def __init__(self, name: str, means: list[float], engine: FakeEngine) -> None:
        super().__init__(name)
        self._means = means
        self._engine = engine

    def evaluate(self, prompts: Any, responses: Any) -> object:
        if prompts[0].text not in {prompt.text for prompt in HELD_OUT}:
            return super().evaluate(prompts, responses)
        # 0 before training, then one of the list an update; the spread over prompts is that of -1, 0, 1.
        updates = self._engine.calls.count("update_policy") + self._engine.done
        mean = 0.0 if updates == 0 else self._means[updates - 1]
        return [mean + offset for offset in (-1.0, 0.0, 1.0)]


class Engine(FakeEngine):
    """Counts the updates of earlier processes, too."""

    done = 0

    def save(self, directory: Path, extra: dict[str, Any]) -> None:
        super().save(directory, extra)
        (directory / "updates").write_text(str(self.calls.count("update_policy") + self.done))

    def load(self, directory: Path) -> dict[str, Any]:
        extra = super().load(directory)
        self.done = int((directory / "updates").read_text()) - self.calls.count("update_policy")
        return extra


def playing(
    directory: Path, means: dict[str, list[float]], at: Any = None, *, every: int = 1, **sections: Any
) -> tuple[Trainer, Engine]:
    engine = Engine(at=at)
    objectives: list[Words] = [Playing(name, values, engine) for name, values in means.items()]
    sections = {"steps": len(next(iter(means.values()))), **sections}
    sections["evaluation"] = {"every_steps": every, **sections.get("evaluation", {})}
    return trainer(directory, engine, objectives, **sections), engine


def checkpoints(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (directory / "checkpoints").glob("step_*"))


def summary(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return found


def test_evaluations_are_in_the_log_of_their_steps(tmp_path: Path) -> None:
    """Every second step and the last one, in the line of the step's last update."""
    run = trainer(tmp_path, steps=5, algorithm={"minibatches": 2}, evaluation={"every_steps": 2})
    assert run.run()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "heldout/long" in line] == [4, 8, 10]
    answers = run.evaluations.answers(5)
    assert lines[-1]["heldout/long"] == pytest.approx(np.mean(answers.scores[0]))
    assert run.before is not None
    gain = np.array(answers.scores[0]) - np.array(run.before.scores[0])
    assert lines[-1]["heldout_gain/long"] == pytest.approx(gain.mean())
    assert lines[-1]["heldout_gain_error/long"] == pytest.approx(gain.std(ddof=1) / len(gain) ** 0.5)
    raw = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in raw if "time/evaluation" in line] == [4, 8, 10]


def test_training_is_the_same_with_evaluations(tmp_path: Path) -> None:
    """Objectives that draw from the process's generators draw the same numbers, too."""

    class Noisy(Words):
        def evaluate(self, prompts: Any, responses: Any) -> object:
            scores = super().evaluate(prompts, responses)
            assert isinstance(scores, list)
            draws = (random.random, np.random.random, lambda: float(torch.rand(())))
            return [score + sum(draw() for draw in draws) for score in scores]

    found = []
    for every in (0, 1):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        engine = FakeEngine()
        objectives: list[Words] = [Noisy("long"), Words("short", -1.0)]
        directory = tmp_path / str(every)
        assert trainer(directory, engine, objectives, evaluation={"every_steps": every}).run()
        found.append((engine.policy, metrics(directory, (*CLOCKED, *EVALUATION)), random.random()))
    assert found[0] == found[1]


# The first answers come before signals are heeded.
POINTS = [*(("generate", number) for number in range(2, 8)), *(("update_policy", n) for n in range(1, 5))]


@pytest.mark.parametrize(("call", "number"), POINTS)
def test_a_signal_at_every_point_leaves_the_same_run(tmp_path: Path, call: str, number: int) -> None:
    sections: dict[str, Any] = {
        "evaluation": {"every_steps": 2, "early_stopping_patience": 9},
        "checkpoint": {"best": "worst_gain", "keep": 1},
        "logging": {"responses": 1},
    }
    whole = trainer(tmp_path / "whole", **sections)
    assert whole.run()
    run = trainer(tmp_path / "run", FakeEngine(at={(call, number): terminate}), **sections)
    if not run.run():
        run = trainer(tmp_path / "run", **sections)
        assert run.run()
    assert metrics(tmp_path / "run", CLOCKED) == metrics(tmp_path / "whole", CLOCKED)
    assert run.evaluations.selection.best == whole.evaluations.selection.best
    kept = [
        {path.name: path.read_text() for path in (tmp_path / name / "responses").iterdir()}
        for name in ("whole", "run")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 4


MEANS = {"long": [1.0, 3.0, 2.0, 4.0, 0.0], "short": [0.5, 2.0, -1.0, -2.0, 1.0]}


@pytest.mark.parametrize(
    ("by", "best"),
    [("long", 4), ("short", 2), ("worst_gain", 2), ("hypervolume", 2)],
)
def test_what_the_best_is(tmp_path: Path, by: str, best: int) -> None:
    run, _ = playing(tmp_path, MEANS, checkpoint={"best": by, "keep": 1})
    assert run.run()
    assert best in checkpoints(tmp_path)
    found = run.evaluations.selection.best
    assert found is not None and (found.by, found.step, found.evaluations) == (by, best, 5)
    assert metrics(tmp_path)[-1]["heldout_best_step"] == best


def test_the_best_is_exported_and_told(tmp_path: Path) -> None:
    means = {"long": [3.0, 1.0], "short": [2.0, 1.0]}
    checkpoint = {"best": "hypervolume", "keep": 1, "export_hf": True, "save_final": True}
    run, engine = playing(tmp_path, means, checkpoint=checkpoint, with_report=True)
    assert run.run()
    assert checkpoints(tmp_path) == [1, 2]
    found = summary(tmp_path)
    assert (found["step"], found["steps"], found["steps_asked"]) == (1, 2, 2)
    # Both spread by sqrt(2 / 3) before training.
    assert found["best"] == {"by": "hypervolume", "step": 1, "value": pytest.approx(9.0), "evaluations": 2}
    assert {name: facts["after"] for name, facts in found["objectives"].items()} == {
        "long": 3.0,
        "short": 2.0,
    }
    assert engine.calls[-4:] == ["load", "update_weights", "export_hf", "generate"]
    policy = json.loads((tmp_path / "checkpoints" / "step_00000001" / "state.json").read_text())["policy"]
    assert engine.policy == policy
    page = (tmp_path / "report" / "index.html").read_text()
    assert "after (step 1)" in page and "Ended after step 2, written at" in page
    assert "too favourable" in page


def test_the_last_step_is_the_result_without_a_choice(tmp_path: Path) -> None:
    run, engine = playing(tmp_path, {"long": [3.0, 0.5], "short": [0.0, 0.0]}, every=5, with_report=True)
    assert run.run()
    found = summary(tmp_path)
    assert (found["step"], found["steps"]) == (2, 2) and "best" not in found
    assert found["objectives"]["long"]["after"] == pytest.approx(0.5)
    assert engine.calls.count("generate") == 1 + 2 + 1, "the last evaluation is not asked for again"
    assert not (tmp_path / "checkpoints").exists()


def test_the_best_survives_the_rotation_and_older_ones_do_not(tmp_path: Path) -> None:
    means = {"long": [1.0, 5.0, 2.0, 6.0, 3.0, 2.0, 1.0], "short": [0.0] * 7}
    run, _ = playing(tmp_path, means, checkpoint={"best": "long", "keep": 1, "every_steps": 1})
    assert run.run()
    assert checkpoints(tmp_path) == [4, 7]


def test_it_stops_after_evaluations_in_vain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    means = {"long": [1.0, 3.0, 2.0, 3.0, 9.0, 9.0], "short": [0.0] * 6}
    sections = {"checkpoint": {"best": "long"}, "evaluation": {"early_stopping_patience": 2}}
    run, _ = playing(tmp_path, means, **sections)
    assert run.run()
    assert run.loop.step == 4, "an equal score is no improvement"
    assert (
        "stopped early after step 4: 2 evaluations in a row were not better by long than that of step 2 (3)"
        in (caplog.text)
    )


def test_patience_and_best_are_kept_over_a_resume(tmp_path: Path) -> None:
    means = {"long": [1.0, 3.0, 2.0, 2.5, 2.0, 9.0], "short": [0.0] * 6}
    sections = {"checkpoint": {"best": "long", "keep": 1}, "evaluation": {"early_stopping_patience": 3}}
    run, _ = playing(tmp_path, means, {("update_policy", 4): terminate}, **sections)
    assert not run.run()
    assert checkpoints(tmp_path) == [2, 4]
    run, engine = playing(tmp_path, means, **sections)
    assert run.run() and engine.calls.count("update_policy") == 1
    assert run.evaluations.selection.best == Best("long", 2, 3.0, 5)
    assert 2 in checkpoints(tmp_path)
    about = json.loads((tmp_path / "checkpoints" / "step_00000004" / "complete.json").read_text())
    assert about["best"] == {"by": "long", "step": 2, "value": 3.0, "evaluations": 4}


def test_a_run_that_stopped_early_is_not_trained_on_by_the_same_command(tmp_path: Path) -> None:
    means = {"long": [3.0, 2.0, 9.0], "short": [0.0] * 3}
    sections = {
        "checkpoint": {"best": "long", "save_final": True},
        "evaluation": {"early_stopping_patience": 1},
        "with_report": True,
    }
    assert playing(tmp_path, means, **sections)[0].run()
    before = summary(tmp_path)
    assert (before["step"], before["steps"], before["steps_asked"]) == (1, 2, 3)
    assert "Ended after step 2 of 3, stopped early" in (tmp_path / "report" / "index.html").read_text()
    run, engine = playing(tmp_path, means, **sections)
    assert run.run() and "update_policy" not in engine.calls
    assert {**summary(tmp_path), "seconds": 0} == {**before, "seconds": 0}
    run, engine = playing(tmp_path, means, **{**sections, "evaluation": {"early_stopping_patience": 2}})
    assert run.run() and engine.calls.count("update_policy") == 1, "more patience goes on"
    assert summary(tmp_path)["step"] == 3


def test_killed_in_an_evaluation_it_goes_on(tmp_path: Path) -> None:
    """The step's line is not there yet; the best so far is."""

    def killed() -> None:
        raise KeyboardInterrupt

    sections = {"checkpoint": {"best": "long"}, "with_report": True}
    # Before training, then a rollout and an evaluation a step: the third step's evaluation is the seventh.
    run, _ = playing(tmp_path, MEANS, {("generate", 7): killed}, **sections)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert checkpoints(tmp_path) == [1, 2] and [line["step"] for line in metrics(tmp_path)] == [1, 2]
    assert not (tmp_path / "summary.json").exists()
    page = (tmp_path / "report" / "index.html").read_text()
    assert re.search(r"Running: step 2 of 5, written at \d{4}-\d\d-\d\d \d\d:\d\d UTC", page)
    assert "The best so far is step 2, the best of 2 evaluations by long (3)" in page
    sections["with_report"] = False
    assert playing(tmp_path, MEANS, **sections)[0].run()
    assert playing(tmp_path / "whole", MEANS, **sections)[0].run()
    assert metrics(tmp_path, CLOCKED) == metrics(tmp_path / "whole", CLOCKED)


def test_another_criterion_chooses_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = playing(tmp_path, MEANS, {("update_policy", 3): terminate}, checkpoint={"best": "short"})
    assert not run.run()
    run, _ = playing(tmp_path, MEANS, checkpoint={"best": "long"})
    assert run.run()
    assert "checkpoint.best was short and is long: the best of the evaluations is chosen anew" in caplog.text
    assert run.evaluations.selection.best == Best("long", 4, 4.0, 2)


def test_a_best_checkpoint_that_somebody_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    means = {"long": [1.0, 5.0, 2.0, 3.0], "short": [0.0] * 4}
    run, _ = playing(tmp_path, means, {("update_policy", 3): terminate}, checkpoint={"best": "long"})
    assert not run.run()
    (tmp_path / "checkpoints" / "step_00000002" / "complete.json").unlink()
    run, _ = playing(tmp_path, means, checkpoint={"best": "long"})
    assert run.run()
    assert "step_00000002 is not there: the best of the evaluations is chosen anew" in caplog.text
    assert run.evaluations.selection.best == Best("long", 4, 3.0, 1)


def test_all_data_ranks_measure_and_choose_alike(tmp_path: Path) -> None:
    """Three prompts over two ranks: each has the others' answers, too."""

    def measure(engine: Any) -> tuple[dict[str, float], Best | None, int]:
        sections: dict[str, Any] = {"evaluation": {"every_steps": 1}, "checkpoint": {"best": "worst_gain"}}
        run = trainer(tmp_path / str(engine.layout.rank), engine, **sections)
        run.evaluations.begin()
        engine.policy += 5  # what an update would do
        found = run.evaluations.measure(1)
        return found, run.evaluations.selection.best, len(run.evaluations.answers(1).prompts)

    first, second = Team(world=2, data=2).run(measure)
    assert first == second
    assert first[2] == len(HELD_OUT) and first[0]["heldout_gain/long"] != 0
    assert first[1] is not None and first[1].step == 1


def test_without_held_out_prompts_nothing_is_evaluated(tmp_path: Path) -> None:
    engine = FakeEngine()
    assert trainer(tmp_path, engine, steps=2, held_out=[], evaluation={"every_steps": 1}).run()
    assert engine.calls.count("generate") == 2


def test_the_first_sample_of_the_first_prompts_is_shown() -> None:
    texts = [f"p{i}" for i in range(3) for _ in range(2)]
    before = Answers(texts, [f"b{i}" for i in range(6)], [[float(i) for i in range(6)]])
    after = Answers(texts, [f"a{i}" for i in range(6)], [[float(-i) for i in range(6)]])
    pairs = sample_pairs(before, after, ["o"], count=2, samples=2)
    assert [(pair.prompt, pair.before, pair.after) for pair in pairs] == [
        ("p0", "b0", "a0"),
        ("p1", "b2", "a2"),
    ]
    assert [pair.scores_after for pair in pairs] == [{"o": 0.0}, {"o": -2.0}]


def test_methods_that_follow_progress_start_from_the_answers_before_training(tmp_path: Path) -> None:
    """Both kinds, also after a resume; without held-out prompts the first rollout is the start."""
    means = {"long": [1.0] * 4, "short": [2.0] * 4}
    methods: dict[str, dict[str, Any]] = {
        "aggregator": {"aggregation": {"name": "tchebycheff_safe"}},
        "scalarizer": {"scalarization": {"name": "tchebycheff"}},
    }
    held_out = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    for kind, section in methods.items():
        stopped, _ = playing(tmp_path / kind, means, {("update_policy", 1): terminate}, **section)
        assert not stopped.run()
        resumed, _ = playing(tmp_path / kind, means, **section)
        assert resumed.run()
        for run in (stopped, resumed):
            progress = run.state_dict()[kind]["progress"]
            assert progress["baseline"] == [0.0, 0.0]
            assert progress["unit"] == pytest.approx([float(held_out.std(correction=0))] * 2, rel=1e-14)
        bare = trainer(tmp_path / f"{kind}-bare", held_out=[], **section)
        assert bare.run() and bare.state_dict()[kind]["progress"]["baseline"] != [0.0, 0.0]
