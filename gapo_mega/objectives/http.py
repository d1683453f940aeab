"""An objective that is a service: it receives conversations as JSON and answers scores (docs/rewards.md)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from pydantic import Field

from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives.base import ObjectiveKind
from gapo_mega.objectives.json_service import JsonService, ServiceOptions
from gapo_mega.objectives.options import read_options
from gapo_mega.types import Prompt

Sample = dict[str, Any]

_EXCERPT = 200  # characters of a value that an error shows


class HttpOptions(ServiceOptions):
    """``options`` of kind ``http``."""

    batch_size: int = Field(32, ge=1, description="samples of one request")


class Http(ObjectiveKind):
    """Scores that the service at ``options.url`` gives; nothing is sent before the first responses."""

    kind: ClassVar[str] = "http"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._options = read_options(config, HttpOptions, with_columns=True)
        self._service = JsonService(self._options, self._error)

    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        samples = [self._sample(*pair) for pair in zip(prompts, responses, strict=True)]
        size = self._options.batch_size
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        # map keeps the order; its first error cancels the requests that have not begun.
        with ThreadPoolExecutor(self._options.concurrency) as threads:
            answered = [score for scores in threads.map(self._post, batches) for score in scores]
        return [self._json_number(index, score) for index, score in enumerate(answered)]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            for column in self.config.columns:
                try:
                    json.dumps(prompt.columns[column], allow_nan=False)
                except (TypeError, ValueError, RecursionError) as error:
                    found = " ".join(repr(prompt.columns[column]).split())[:_EXCERPT]
                    raise self._error(
                        f"columns: found {found} in column {column!r} of prompt {prompt.index}, accepted: "
                        f"what JSON can hold ({error})"
                    ) from None

    def _sample(self, prompt: Prompt, response: str) -> Sample:
        messages = [dict(message) for message in prompt.answered(response)]
        sample: Sample = {"messages": messages, "prompt": prompt.text, "response": response}
        if self.config.columns:
            sample["columns"] = {column: prompt.columns[column] for column in self.config.columns}
        return sample

    def _json_number(self, index: int, score: Any) -> Any:
        """``score``, unless Python would take for a number what JSON does not, or double precision cannot."""
        too_large = isinstance(score, int) and abs(score) > sys.float_info.max
        if isinstance(score, bool) or too_large:
            shown = json.dumps(score)[:_EXCERPT]
            raise self._error(f"found the score {shown} for response {index}, accepted: a finite number")
        return score

    def _post(self, samples: list[Sample]) -> list[Any]:
        """The scores of one request. ``ValueError`` when the last attempt fails or answers something else."""
        accepted = f'{{"scores": [...]}}, {len(samples)} numbers'
        reply = self._service.post({"samples": samples}, accepted)
        scores = reply.content.get("scores") if isinstance(reply.content, dict) else None
        if not isinstance(scores, list):
            raise reply.fault("no list of scores")
        if len(scores) != len(samples):
            raise reply.fault(f"{len(scores)} scores")
        return scores
