"""Responses as text: what the tokenizer decodes can always be written to a file."""

from __future__ import annotations

from typing import Any

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.collect import Collector
from gapo_mega.types import Prompt
from tests.helpers.fake_engine import FakeEngine, FakeTokenizer


class HalfCharacters(FakeTokenizer):
    """Decodes broken UTF-8 as ``errors="surrogateescape"`` does."""

    def decode(self, *arguments: Any, **options: Any) -> str:
        return b"ok \xe6\x9d".decode("utf-8", "surrogateescape")


def test_half_characters_never_leave_the_tokenizer() -> None:
    tokenizer: Any = HalfCharacters()
    engine: Any = FakeEngine()
    collector = Collector(engine.generator, tokenizer, SamplingParameters(max_new_tokens=4))
    rollout = collector.collect([Prompt(0, "w0", (2,))], 3, seed=1)
    assert rollout.responses == ["ok \ufffd\ufffd"] * 3


class Recorder(FakeEngine):
    """Keeps how it was asked to sample."""

    sampling: SamplingParameters

    def generate(self, prompts: Any, sampling: SamplingParameters, seed: int) -> Any:
        self.sampling = sampling
        return super().generate(prompts, sampling, seed)


def test_greedy_takes_the_most_likely_token_after_the_penalty() -> None:
    engine, tokenizer = Recorder(), FakeTokenizer()
    drawn = SamplingParameters(4, temperature=0.7, top_k=3, top_p=0.9, repetition_penalty=1.2)
    collector = Collector(engine.generator, tokenizer, drawn)  # type: ignore[arg-type]
    prompts = [Prompt(0, "w0", (2,)), Prompt(1, "w1", (3,))]
    rollout = collector.collect(prompts, 1, seed=1, greedy=True)
    assert engine.sampling == SamplingParameters(4, temperature=0.0, repetition_penalty=1.2)
    assert rollout.prompts == prompts
    collector.collect(prompts, 1, seed=1)
    assert engine.sampling == drawn
