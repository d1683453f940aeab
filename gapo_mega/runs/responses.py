"""The responses of training batches, kept on request: ``responses/step_00000010.jsonl``, a file a step.

A file is written whole or not at all, before the step's updates. A run that goes on from a checkpoint first
removes the files of later steps, which it then does again: every step is there once.
"""

from __future__ import annotations

import json
import math
import re
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from gapo_mega.engine.base import Ranks
from gapo_mega.evaluation.files import write_data
from gapo_mega.runs.directory import RESPONSES_FOLDER
from gapo_mega.types import Experience, Rollout

_NAME = re.compile(r"step_(\d{8,})\.jsonl")


class ResponseFiles:
    """Writes the responses of every so many steps. Every rank has one; the main rank writes."""

    def __init__(self, directory: Path, names: list[str], every: int, ranks: Ranks) -> None:
        """``directory``: the run's; ``names``: of the objectives; ``every``: steps, 0: none."""
        self._folder = directory / RESPONSES_FOLDER
        self._names = names
        self._every = every
        self._ranks = ranks

    def is_due(self, step: int) -> bool:
        """Whether step ``step``, from 1, is one of those."""
        return self._every > 0 and step % self._every == 0

    def drop_after(self, step: int) -> None:
        """Remove the files of steps after ``step``, which an interrupted run wrote."""
        if not (self._ranks.layout.is_main and self._folder.is_dir()):
            return
        for path in self._folder.iterdir():
            found = _NAME.fullmatch(path.name)
            if found is not None and int(found.group(1)) > step:
                path.unlink()

    def write(self, step: int, rollout: Rollout, experience: Experience) -> None:
        """The file of ``step``, from 1. Collective over the data-parallel ranks."""
        parts = self._ranks.gather_over_data(self._rows(step, rollout, experience))
        if self._ranks.layout.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            rows = chain.from_iterable(parts)
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
            write_data(self._folder / f"step_{step:08d}.jsonl", "".join(lines))

    def _rows(self, step: int, rollout: Rollout, experience: Experience) -> list[dict[str, Any]]:
        """Of this data rank's responses."""
        facts, scores_MB = rollout.facts, experience.scores_MB.tolist()
        gap_BT = (experience.old_logprobs_BT - experience.ref_logprobs_BT) * rollout.response_mask_BT
        kl_B, sample_B = gap_BT.double().sum(dim=1).tolist(), _numbers_within(rollout.group_B)
        return [
            {
                "step": step,
                "number": prompt.index,
                "sample": sample_B[i],
                "prompt": prompt.text,
                "response": rollout.responses[i],
                "tokens": facts.token_counts[i],
                "finished": facts.finished[i],
                # Infinite for a token that the reference's top_k or top_p rules out, which JSON has not.
                "kl": kl_B[i] if math.isfinite(kl_B[i]) else None,
                "scores": {name: scores_MB[m][i] for m, name in enumerate(self._names)},
            }
            for i, prompt in enumerate(rollout.prompts)
        ]


def _numbers_within(group_B: Tensor) -> list[int]:
    """The place of every row among those of its group, from 0."""
    seen: dict[int, int] = {}
    found = []
    for group in group_B.tolist():
        found.append(seen.get(group, 0))
        seen[group] = found[-1] + 1
    return found
