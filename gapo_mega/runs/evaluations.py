"""The held-out evaluations of a training: before it, while it goes on, and at its end."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapo_mega.config import Config
from gapo_mega.engine.base import Engine
from gapo_mega.evaluation.criterion import Rank, rank_of, spreads
from gapo_mega.evaluation.report import SamplePair, write_report
from gapo_mega.evaluation.standing import Standing
from gapo_mega.evaluation.summary import Summary, paired_summary
from gapo_mega.rollout.heldout import Answers, HeldOut
from gapo_mega.runs.selection import Selection
from gapo_mega.runs.shared_answers import SharedAnswers

logger = logging.getLogger(__name__)


class Evaluations:
    """Answers held-out prompts, compares with those before training, and tells the selection.

    Attributes:
        before: the answers before training; None until ``begin`` or a checkpoint gives them.
        selection: which evaluation is the best.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        names: Sequence[str],
        heldout: HeldOut,
        shared: SharedAnswers | None,
    ) -> None:
        """``shared``: where answers before training may be had without asking the policy."""
        self._config = config
        self._engine = engine
        self._names = list(names)
        self._heldout = heldout
        self._shared = shared
        self.before: Answers | None = None
        self.selection = Selection(config.checkpoint.best, config.evaluation.early_stopping_patience)
        self._latest: tuple[int, Answers] | None = None  # steps done, and what the policy answered then

    def begin(self) -> None:
        """Have the policy answer as it was given, if no checkpoint has the answers. Collective."""
        if self.before is None:
            answer = self._heldout.answer
            self.before = answer() if self._shared is None else self._shared.get(answer)

    def start(self) -> tuple[Tensor, Tensor] | None:
        """Means and standard deviations of the scores before training, float64 [M]; None without answers.

        The same on every rank. A deviation is exactly 0 where all scores are alike.
        """
        assert self.before is not None, "begin() comes first"
        if not self.before.prompts:
            return None
        means_M = torch.tensor(self.before.scores, dtype=torch.float64).mean(dim=1)
        return means_M, torch.from_numpy(spreads(self.before.scores, of_constant=0.0))

    def is_due(self, done: int) -> bool:
        """Whether to evaluate after ``done`` steps: every so many, and after the last one."""
        every = self._config.evaluation.every_steps
        return every > 0 and len(self._heldout) > 0 and (done % every == 0 or done == self._config.steps)

    def measure(self, done: int) -> dict[str, float]:
        """Evaluate the policy after ``done`` steps; what the log takes of it. Collective.

        ``heldout/NAME`` is the mean score, ``heldout_gain/NAME`` the paired change since before training and
        ``heldout_gain_error/NAME`` its standard error. With ``checkpoint.best`` also
        ``heldout_criterion``, by which it is judged, and ``heldout_best_step``.
        """
        assert self.before is not None, "begin() comes first"
        self._heldout.update_weights()
        answers = self._heldout.answer()
        self._latest = (done, answers)
        summary = self.summary(answers)
        found: dict[str, float] = {}
        for name, change in summary.items():
            found[f"heldout/{name}"] = change.after
            found[f"heldout_gain/{name}"] = change.difference
            found[f"heldout_gain_error/{name}"] = change.standard_error
        best = self._judge(done, summary)
        if self._engine.layout.is_main:
            told = [
                f"{name} {change.after:.4g} ({change.difference:+.3g})" for name, change in summary.items()
            ]
            logger.info("held-out scores after step %d: %s", done, ", ".join(told))
        return found | best

    def update_weights(self) -> None:
        """Have the next answers be those of the policy as it is. Collective."""
        self._heldout.update_weights()

    def answers(self, done: int) -> Answers:
        """Of the policy as it is, which has done ``done`` steps. Collective."""
        if self._latest is not None and self._latest[0] == done:
            return self._latest[1]
        return self._heldout.answer()

    def summary(self, answers: Answers) -> Summary:
        """``answers`` beside those before training; empty without held-out prompts."""
        assert self.before is not None, "begin() comes first"
        if not answers.prompts:
            return {}
        same = [old == new for old, new in zip(self.before.responses, answers.responses, strict=True)]
        before, after = torch.tensor(self.before.scores), torch.tensor(answers.scores)
        return paired_summary(before, after, self._names, self._heldout.samples, same)

    def samples(self, answers: Answers) -> list[SamplePair]:
        """What the report shows of ``answers``."""
        assert self.before is not None, "begin() comes first"
        shown = self._config.evaluation.shown
        return sample_pairs(self.before, answers, self._names, shown, self._heldout.samples)

    def report(self, done: int) -> None:
        """Write the report of the running run, with the evaluation after ``done`` steps, its latest."""
        if self._engine.layout.is_main:
            assert self._latest is not None and self._latest[0] == done
            answers = self._latest[1]
            standing = Standing(done, done, self._config.steps, ended=False, best=self.selection.best)
            directory = Path(self._config.output_dir)
            write_report(directory, self.samples(answers), (self.summary(answers), standing))
        self._engine.barrier()

    def state_dict(self) -> dict[str, Any]:
        """The answers before training, and the best so far."""
        return {
            "before": dataclasses.asdict(self.before) if self.before else None,
            "selection": self.selection.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.before = Answers(**state["before"]) if state["before"] else None
        self.selection.load_state_dict(state.get("selection", {}))

    def _judge(self, done: int, summary: Summary) -> dict[str, float]:
        by = self.selection.by
        if by is None:
            return {}
        assert self.before is not None
        own = rank_of(by, summary, spreads(self.before.scores))
        # Hosts may round differently, and all ranks must choose and stop alike.
        rank: Rank = self._engine.gather_over_data(self._engine.broadcast_in_replica(own))[0]
        self.selection.take(done, rank)
        assert self.selection.best is not None
        if self._engine.layout.is_main:
            logger.info("the best so far is that of %s", self.selection.best.sentence())
        return {"heldout_criterion": rank[0], "heldout_best_step": float(self.selection.best.step)}


def sample_pairs(
    before: Answers, after: Answers, names: Sequence[str], count: int, samples: int
) -> list[SamplePair]:
    """The first sample of the first ``count`` held-out prompts."""
    rows = range(0, len(after.prompts), samples)[:count]
    return [
        SamplePair(
            prompt=after.prompts[i],
            before=before.responses[i],
            after=after.responses[i],
            scores_before={name: before.scores[m][i] for m, name in enumerate(names)},
            scores_after={name: after.scores[m][i] for m, name in enumerate(names)},
        )
        for i in rows
    ]
