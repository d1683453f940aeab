"""What a vLLM server is asked for a response, and what its answer must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.servers.client import VllmServer
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.rollout.servers.responses import Response

_TIES = 16  # tokens beyond top-k that an answer shows at first


@dataclass(frozen=True)
class Questions:
    """Those of one rollout.

    Attributes:
        label: of the weights that must answer.
        seed: of the rollout; every row has its own.
        eos_ids: they end a response.
        vocabulary: tokens of the model; None: not said.
    """

    label: str
    sampling: SamplingParameters
    seed: int
    eos_ids: Sequence[int]
    vocabulary: int | None

    def ask(self, server: VllmServer, prompt: Sequence[int], row: int) -> Response:
        """The response of a row. Where more tokens are left to draw from than it shows, it asks for more.

        Raises ``ServerLost`` unless it is whole and drawn with the weights of that label.
        """
        sampling = self.sampling
        # Of the drawn token, or also of all that were left; ties of the k-th stay, too.
        shown = self._at_most(sampling.top_k + _TIES) if sampling.cuts else 0
        while True:
            wanted = {**self._settings(), "seed": row_seed(self.seed, row), "logprobs": shown}
            choice = server.generate(list(prompt), wanted)
            self._check(server.url, choice)
            # Where the whole vocabulary is shown there is no more.
            response = Response.read(server.url, choice, shown + (shown == self.vocabulary))
            if response is not None:
                return response
            shown = self._at_most(4 * shown)

    def _at_most(self, wanted: int) -> int:
        return wanted if self.vocabulary is None else min(wanted, self.vocabulary)

    def _settings(self) -> dict[str, Any]:
        sampling = self.sampling
        return {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "repetition_penalty": sampling.repetition_penalty,
            **({"top_k": sampling.top_k, "top_p": sampling.top_p} if sampling.cuts else {}),
            # Ours alone end a response, whatever the server has read of the model.
            "stop_token_ids": list(self.eos_ids),
            "ignore_eos": True,
            "detokenize": False,
        }

    def _check(self, url: str, choice: Mapping[str, Any]) -> None:
        spans = choice.get("weight_versions")
        labelled = [span for span in spans if isinstance(span, dict)] if isinstance(spans, list) else []
        found = sorted({str(span.get("version")) for span in labelled})
        if found != [self.label]:
            raise ServerLost(
                f"{url}: found a response of the weights {', '.join(found) or 'without a label'}, "
                f"accepted: {self.label}"
            )
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise ServerLost(f"{url}: found a response that ended with {reason!r}")


def row_seed(seed: int, row: int) -> int:
    """62 bits of (seed, row): samples of one prompt differ, and no two replicas share any."""
    digest = blake2b(f"{seed} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
