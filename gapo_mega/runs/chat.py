"""Conversations with models: what each reads, what it answers, and what objectives say of the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gapo_mega import objectives
from gapo_mega.config import Config, ModelConfig, ParallelConfig, RolloutConfig
from gapo_mega.data.chat_template import ChatTemplate
from gapo_mega.data.messages import of_user
from gapo_mega.data.prompt_encoding import opened
from gapo_mega.engine.base import AnsweringEngine, SamplingParameters, build_answering_engine
from gapo_mega.models.huggingface.location import companions_of
from gapo_mega.models.huggingface.token_ids import check_tokens, end_of_sequence_ids, padding_id
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from gapo_mega.models.shape import ModelShape
from gapo_mega.objectives.base import Objective
from gapo_mega.planning.setups import AnsweringSetup, LocalModel
from gapo_mega.rollout.response_scores import ResponseScorer, attach_score_models
from gapo_mega.runs.evaluated_models import NamedModel
from gapo_mega.runs.preflight import check_language_model, check_score_models
from gapo_mega.types import Message, Prompt, ResponseFacts, well_formed

_SEED_OFFSET = 311_021  # away from the seeds of training and evaluation
_LAYOUT = ParallelConfig()  # one process holds the whole model

Watch = Callable[[str, int], None]  # a model's name and its next token


class Stopped(Exception):
    """What a ``Watch`` raises to end an answer where it is."""


@dataclass(frozen=True)
class Manner:
    """How models answer.

    Attributes:
        sampling: ``max_new_tokens`` is the longest answer.
        system: message before every conversation, which objectives do not see; None: none.
        raw: the text itself is the model's input, without template, history and system message.
        config: whose objectives score every answer; None: there are no scores.
    """

    sampling: SamplingParameters
    seed: int = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    system: str | None = None
    raw: bool = False
    config: Config | None = None


@dataclass(frozen=True)
class Reply:
    """A model's answer.

    Attributes:
        tokens: that it has, the end-of-sequence token included.
        finished: the model ended it; else it was stopped, or is as long as it may be.
        stopped: by whoever watched.
        left_out: messages at the beginning of the conversation that the model had no room to read.
        scores: by objective; empty without any, and for an answer without a token.
        fault: why there are no scores, where objectives were asked in vain.
    """

    model: str
    text: str
    tokens: int
    finished: bool
    stopped: bool = False
    left_out: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True)
class _Speaker:
    """A model that is ready to be loaded."""

    named: NamedModel
    shape: ModelShape
    tokenizer: PreTrainedTokenizerBase
    eos_ids: list[int]

    def setup(self, manner: Manner) -> AnsweringSetup:
        path = str(self.named.source)
        return AnsweringSetup(
            policy=LocalModel(self.named.source, self.shape),
            reference=None,
            model=ModelConfig(path=path, dtype=manner.dtype),
            parallel=_LAYOUT,
            rollout=RolloutConfig(batch_size=1),
            micro_batch=1,
            seed=manner.seed,
            pad_id=padding_id(self.tokenizer, self.eos_ids),
            eos_ids=self.eos_ids,
        )


class Chat:
    """One conversation, in which every model has its own answers. In one process."""

    def __init__(self, models: Sequence[NamedModel], manner: Manner) -> None:
        """Check everything, then load the models. Raises ``ValueError``."""
        self._manner = manner
        built = [] if manner.config is None else _objectives(manner.config)
        speakers = [_speaker(named, manner) for named in models]
        self._engine = build_answering_engine(speakers[0].setup(manner))
        engines = [self._engine, *(self._engine.beside(each.setup(manner)) for each in speakers[1:])]
        attach_score_models(self._engine, built)
        self._names = [objective.name for objective in built]
        self._scorer = ResponseScorer(self._engine, built)
        self._talkers = [
            _Talker(speaker, engine, manner) for speaker, engine in zip(speakers, engines, strict=True)
        ]

    @property
    def models(self) -> list[str]:
        """Their names."""
        return [talker.name for talker in self._talkers]

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        for talker in self._talkers:
            talker.said.clear()

    def set_system(self, text: str | None) -> None:
        """Begin the conversation, what was said and what follows, with this system message, or with none."""
        if text is not None and self._manner.raw:
            raise ValueError("/system: found a text with --raw, accepted: none (there is no chat template)")
        for talker in self._talkers:
            talker.system = text

    def tokenizer_of(self, model: str) -> PreTrainedTokenizerBase:
        """What makes text of the tokens that a ``Watch`` is told of."""
        return next(talker.tokenizer for talker in self._talkers if talker.name == model)

    def ask(self, text: str, watch: Watch) -> list[Reply]:
        """Every model's answer, in order, which becomes part of the conversation.

        An answer that ``watch`` stops stays as far as it is; one without a token is forgotten, and so is what
        it was to answer. Raises ``ValueError`` for a message that is too long or that a chat template
        refuses; the conversation is then as it was.
        """
        before = [list(talker.said) for talker in self._talkers]
        try:
            return [self._scored(*talker.answer(well_formed(text), watch)) for talker in self._talkers]
        except BaseException:
            for talker, said in zip(self._talkers, before, strict=True):
                talker.said[:] = said
            raise

    def close(self) -> None:
        """Leave the process groups."""
        self._engine.close()

    def _scored(self, reply: Reply, prompt: Prompt) -> Reply:
        if not self._names or not reply.tokens:
            return reply
        facts = ResponseFacts([reply.tokens], [reply.finished])
        try:
            scores_MB = self._scorer.scores([prompt], [reply.text], facts)
        except ValueError as error:  # the answer is there all the same
            return replace(reply, fault=str(error))
        return replace(reply, scores=dict(zip(self._names, scores_MB[:, 0].tolist(), strict=True)))


class _Talker:
    """One model and its side of the conversation."""

    def __init__(self, speaker: _Speaker, engine: AnsweringEngine, manner: Manner) -> None:
        self.name = speaker.named.name
        self.tokenizer = speaker.tokenizer
        self.said: list[Message] = []  # user and assistant in turn
        self.system = manner.system
        self._engine = engine
        self._manner = manner
        self._template = ChatTemplate(speaker.tokenizer)
        self._longest = speaker.shape.longest
        self._eos_ids = speaker.eos_ids
        self._turns = 0

    def answer(self, text: str, watch: Watch) -> tuple[Reply, Prompt]:
        """The answer to ``text`` after what was said, and what the model has read for it."""
        whole = [*self.said, of_user(text)] if not self._manner.raw else [of_user(text)]
        messages, ids = self._fitted(whole)
        sampling = self._manner.sampling
        room = min(sampling.max_new_tokens, self._longest - len(ids))
        self._turns += 1
        tokens: list[int] = []

        def take(_: Sequence[int], new: Sequence[int]) -> None:
            tokens.append(new[0])
            watch(self.name, new[0])

        seed = (self._manner.seed + _SEED_OFFSET) * 1_000_003 + self._turns
        stopped = False
        try:
            self._engine.generator.generate([ids], replace(sampling, max_new_tokens=room), seed, take)
        except Stopped:
            stopped = True
        response = well_formed(str(self.tokenizer.decode(tokens, skip_special_tokens=True)))
        if tokens and not self._manner.raw:
            self.said += [of_user(text), {"role": "assistant", "content": response}]
        finished = bool(tokens) and tokens[-1] in self._eos_ids
        left_out = len(whole) - len(messages)
        reply = Reply(self.name, response, len(tokens), finished, stopped and not finished, left_out)
        shown = () if messages == [of_user(text)] else tuple(messages)
        return reply, Prompt(self._turns - 1, text, tuple(ids), shown)

    def _fitted(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """The last messages, and their token ids, that leave room for an answer."""
        wanted = min(self._manner.sampling.max_new_tokens, self._longest // 2)
        for first in range(0, len(messages), 2):  # a message of the user and its answer go together
            ids = self._encoded(messages[first:])
            if len(ids) + wanted <= self._longest:
                return messages[first:], ids
        if not 0 < len(ids) < self._longest:
            raise ValueError(
                f"message: found {len(ids)} tokens for {self.name}, accepted: 1 to {self._longest - 1} (an "
                f"answer has to fit into the model's {self._longest}, too)"
            )
        return messages[-1:], ids

    def _encoded(self, messages: Sequence[Message]) -> list[int]:
        if self._manner.raw:
            return opened(self.tokenizer, messages[-1]["content"])
        first: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            rendered = self._template.render([*first, *messages], asked=True)
        except TemplateError as error:
            raise ValueError(
                f"message: the chat template of {self.name} refuses it: {' '.join(str(error).split())}"
            ) from None
        # Special tokens are the template's business: the tokenizer adds none.
        ids: list[int] = self.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _objectives(config: Config) -> list[Objective]:
    """The objectives of ``config``. Raises ``ValueError`` for one that cannot score a conversation."""
    for column, parameter in config.columns.items():
        raise ValueError(
            f"--scores: {parameter} reads {column!r} of the data, which a chat has not; accepted: objectives "
            "that read prompt and response alone (objectives=[...] in place of the file's)"
        )
    built = objectives.build_all(config.objectives)
    check_score_models(config.model_copy(update={"parallel": _LAYOUT}), built, 1)
    return built


def _speaker(named: NamedModel, manner: Manner) -> _Speaker:
    parameter = f"{named.parameter} {named.given}"
    shape = check_language_model(str(named.source), parameter)
    companions = companions_of(named.source)
    tokenizer = read_tokenizer(companions, named.parameter)
    check_tokens(companions, tokenizer, shape.vocab)
    if tokenizer.chat_template is None and not manner.raw:
        raise ValueError(
            f"{parameter}: found a tokenizer without a chat template, accepted: one with a template, or --raw"
        )
    return _Speaker(named, shape, tokenizer, end_of_sequence_ids(companions, tokenizer, named.parameter))
