"""Answers prompts with several models, scores the responses, and compares the models."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapo_mega import objectives
from gapo_mega.config import Config, ObjectiveConfig
from gapo_mega.data.prompts import load_prompts, load_questions
from gapo_mega.engine.base import AnsweringEngine, SamplingParameters, build_answering_engine
from gapo_mega.evaluation.answers import Answer
from gapo_mega.evaluation.comparison import Asked, Comparison, compare
from gapo_mega.evaluation.comparison_files import write_comparison
from gapo_mega.evaluation.intervals import Resampling
from gapo_mega.files import read_text
from gapo_mega.models.huggingface.location import companions_of
from gapo_mega.models.huggingface.token_ids import check_tokens, end_of_sequence_ids, padding_id
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from gapo_mega.models.shape import ModelShape
from gapo_mega.objectives.pairwise import PairwiseJudge, PairwiseOptions
from gapo_mega.planning.chunks import logits_chunk
from gapo_mega.planning.setups import AnsweringSetup, LocalModel
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.response_scores import ResponseScorer, attach_score_models
from gapo_mega.runs import fingerprints
from gapo_mega.runs.answer_store import AnswerStore, Belonging
from gapo_mega.runs.answering import BatchAnswerer, Divergence, Manner, batches
from gapo_mega.runs.evaluated_models import NamedModel
from gapo_mega.runs.judging import JUDGEMENTS_FILE, Judging
from gapo_mega.runs.lock import DirectoryLock, check_free
from gapo_mega.runs.preflight import check_answering, check_score_models
from gapo_mega.runs.processes import Peers, agree, peers, watched, world_size
from gapo_mega.runs.start import score_models_in
from gapo_mega.types import Prompt
from gapo_mega.whereabouts import enter

logger = logging.getLogger(__name__)

COMMAND = "gapo-mega evaluate"


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        models: in the order of the tables.
        reference: what divergences are measured from; None: they are not measured.
        out: the directory to write.
        prompts: source of the prompts; None: the held-out ones of the configuration.
        limit: most prompts of that source; None: all.
        greedy: the most likely token in place of a sample.
        overwrite: generate anew what is there.
        judge: of pairs of responses, and what errors call it; None: nobody is asked.
    """

    models: Sequence[NamedModel]
    reference: NamedModel | None
    out: Path
    refusals: tuple[str, Sequence[str]]
    prompts: str | None = None
    limit: int | None = None
    greedy: bool = False
    overwrite: bool = False
    thresholds: dict[str, float] = field(default_factory=dict)
    how: Resampling = field(default_factory=Resampling)
    judge: tuple[PairwiseOptions, str] | None = None


@dataclass(frozen=True)
class _Candidate:
    """A model that is ready to be loaded, and the prompts as its tokenizer has them."""

    named: NamedModel
    model: LocalModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: list[int]
    prompts: list[Prompt]

    @property
    def pad_id(self) -> int:
        return padding_id(self.tokenizer, self.eos_ids)


class Evaluation:
    """One call of the command, on this process's share of the world."""

    def __init__(
        self, config: Config, request: Request, everyone: Peers | None = None, world: int | None = None
    ) -> None:
        """Check and read everything but weights. Raises ``ValueError``.

        ``everyone``, ``world``: the processes of the evaluation and their number; None: those of this job.
        """
        # Frozen models are one chunk a stage, have no optimizer, and hold one layer's activations at a time.
        alone = {"virtual_pipeline": 1, "distributed_optimizer_instances": 1, "context": 1}
        parallel = config.parallel.model_copy(update=alone)
        self.config = config.model_copy(update={"parallel": parallel})
        self.request = request
        self._everyone = peers(config.parallel.timeout) if everyone is None else everyone
        self._world = world_size() if world is None else world
        self._objectives = objectives.build_all(config.objectives)
        self._names = [objective.name for objective in self._objectives]
        for name in request.thresholds:
            if name not in self._names:
                raise ValueError(f"--threshold: found {name!r}, accepted: {', '.join(self._names)}")
        if request.judge is not None:
            PairwiseJudge(*request.judge)  # whose credentials are there
            if len(request.models) < 2:
                raise ValueError("--judge: found one model, accepted: two or more, which it compares")
        check_score_models(self.config, self._objectives, self._world)
        self._candidates = [self._candidate(named) for named in request.models]
        self._check_prompts()
        self._reference = None if request.reference is None else self._reference_of(request.reference)
        self._samples = config.evaluation.samples_per_prompt
        self._fingerprints: dict[Path, fingerprints.Fingerprint] = {}
        self._engine: AnsweringEngine | None = None

    # -- before anything is loaded -------------------------------------------------------------------
    def _candidate(self, named: NamedModel) -> _Candidate:
        config = self.config
        shape = self._shape(named)
        companions = companions_of(named.source)
        tokenizer = read_tokenizer(companions, named.parameter)
        check_tokens(companions, tokenizer, shape.vocab)
        if self.request.prompts is None:
            _, prompts = load_prompts(config.data, tokenizer, config.seed, config.columns)
            if not prompts:
                raise ValueError(
                    "data.heldout_prompts: found 0, accepted: at least 1, or prompts given by --prompts"
                )
        else:
            prompts = load_questions(
                config.data, tokenizer, self.request.prompts, config.columns, self.request.limit
            )
        eos_ids = end_of_sequence_ids(companions, tokenizer, named.parameter)
        return _Candidate(named, LocalModel(named.source, shape), tokenizer, eos_ids, prompts)

    def _shape(self, named: NamedModel) -> ModelShape:
        return check_answering(
            self.config, str(named.source), f"{named.parameter} {named.given}", self._world
        )

    def _check_prompts(self) -> None:
        first, *others = self._candidates
        for objective in self._objectives:
            objective.check_prompts(first.prompts)
        mine = [(prompt.text, prompt.messages) for prompt in first.prompts]
        for other in others:
            if [(prompt.text, prompt.messages) for prompt in other.prompts] != mine:
                raise ValueError(
                    f"--model: found {other.named.given}, whose tokenizer or chat template leaves "
                    f"{len(other.prompts)} prompts where {first.named.given} has {len(mine)}, or others; "
                    "accepted: models that take the same prompts (a larger data.max_prompt_tokens)"
                )

    def _reference_of(self, named: NamedModel) -> _Candidate:
        known = next((each for each in self._candidates if each.named.source == named.source), None)
        return self._candidate(named) if known is None else known

    @cached_property
    def _divergences(self) -> dict[str, Divergence]:
        """Every candidate's, by its name."""
        return {each.named.name: self._divergence_of(each) for each in self._candidates}

    def _divergence_of(self, candidate: _Candidate) -> Divergence:
        reference = self._reference
        if reference is None or self.request.greedy:
            return "none"  # one greedy response is no sample of anything
        if reference.named.source == candidate.named.source:
            return "same"
        if reference.tokenizer.get_vocab() == candidate.tokenizer.get_vocab():
            return "measured"
        logger.warning("%s: no KL, because %s has other tokens", candidate.named.name, reference.named.name)
        return "none"

    # -- the work ------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raise ``ValueError`` where the directory is in use or holds other responses. Changes nothing."""
        check_free(self.request.out, "--out")
        if not self.request.overwrite:
            for candidate in self._candidates:
                self._store(candidate).check()

    def run(self) -> Comparison | None:
        """Answer, score, compare, and write everything to ``request.out``. Collective.

        The main rank has the comparison, the others None. What an earlier call has done there with the same
        settings is not done again. Raises ``ValueError`` where other responses are there.
        """
        with watched(self._everyone, self.config.parallel.silence, self.config.parallel.phase):
            return self._run()

    def _run(self) -> Comparison | None:
        lock = DirectoryLock(self.request.out, COMMAND, "--out")
        agree(self._everyone, lambda: lock.acquire() if self._everyone.is_main else None)
        try:
            stores = [self._store(candidate) for candidate in self._candidates]
            agree(self._everyone, lambda: self._open(stores))
            for candidate, store in zip(self._candidates, stores, strict=True):
                done = self._everyone.gather(store.done)[0]
                if done < len(candidate.prompts):
                    self._answer(candidate, store, done)
            comparison = self._results(stores)
        finally:
            lock.release()
        if self._engine is not None:
            # Not after an error: closing waits for ranks that are still in a collective.
            self._engine.close()
        return comparison

    def _store(self, candidate: _Candidate) -> AnswerStore:
        belonging = Belonging({}, {})
        if self._everyone.is_main:
            belonging = Belonging(self._generation(candidate), self._scoring)
        return AnswerStore(self.request.out / candidate.named.name, belonging, self._samples)

    def _open(self, stores: Sequence[AnswerStore]) -> None:
        if not self._everyone.is_main:
            return
        if not self.request.overwrite:
            for store in stores:  # all, before any is changed
                store.check()
        if self.request.overwrite:
            (self.request.out / JUDGEMENTS_FILE).unlink(missing_ok=True)
        for store in stores:
            store.open(self.request.overwrite)

    def _generation(self, candidate: _Candidate) -> dict[str, Any]:
        config, reference = self.config, self._reference
        sampling = SamplingParameters.of(config.rollout)
        measured = self._divergences[candidate.named.name] != "none" and reference is not None
        return {
            "weights": self._weights(candidate),
            "configuration": fingerprints.of_shape(
                candidate.model.shape, end_of_sequence=sorted(candidate.eos_ids), padding=candidate.pad_id
            ),
            "chat template": fingerprints.of_template(candidate.tokenizer, config.data.chat_template),
            "prompts": fingerprints.of_prompts(candidate.prompts),
            "samples": self._samples,
            "greedy": self.request.greedy,
            **{key: getattr(sampling, key) for key in sampling.__dataclass_fields__},
            "seed": config.seed,
            "dtype": config.model.dtype,
            "reference": self._weights(reference) if measured and reference else None,
        }

    def _weights(self, candidate: _Candidate) -> fingerprints.Fingerprint:
        source = candidate.model.source
        if source not in self._fingerprints:
            self._fingerprints[source] = fingerprints.of_weights(source)
        return self._fingerprints[source]

    @cached_property
    def _scoring(self) -> dict[str, Any]:
        models = score_models_in(self.config)
        return {
            objective.name: {
                **objective.model_dump(mode="json"),
                "code": _code(objective),
                "models": {key: found for key, found in models.items() if key.split(".")[1] == str(index)},
            }
            for index, objective in enumerate(self.config.objectives)
        }

    def _answer(self, candidate: _Candidate, store: AnswerStore, done: int) -> None:
        config, prompts = self.config, candidate.prompts
        engine = self._engine_for(candidate)
        answerer = BatchAnswerer(
            engine,
            Collector(engine.generator, candidate.tokenizer, SamplingParameters.of(config.rollout)),
            ResponseScorer(engine, self._objectives),
            self._names,
            prompts,
            Manner(self._samples, config.seed, self.request.greedy, self._divergences[candidate.named.name]),
        )
        sequences = config.rollout.batch_size
        for numbers in batches(done, len(prompts), self._samples, sequences, engine.layout.data):
            enter("answering")  # from here on the rank's own watch counts
            earlier = answerer.told(_of_all(store, numbers) if self._everyone.is_main else None)
            answers = answerer.answer(numbers) if earlier is None else answerer.score(earlier)
            if self._everyone.is_main:
                store.add(answers)
            logger.info("%s: %d of %d prompts", candidate.named.name, numbers.stop, len(prompts))

    def _engine_for(self, candidate: _Candidate) -> AnsweringEngine:
        """The engine with the candidate's weights, built when it is first needed."""
        config, reference = self.config, None
        if self._divergences[candidate.named.name] == "measured":
            assert self._reference is not None
            reference = self._reference.model
        setup = AnsweringSetup(
            policy=candidate.model,
            reference=reference,
            model=config.model,
            parallel=config.parallel,
            rollout=config.rollout,
            micro_batch=config.micro_batch_size,
            seed=config.seed,
            pad_id=candidate.pad_id,
            eos_ids=candidate.eos_ids,
            micro_batch_tokens=config.micro_batch_tokens,
            chunk=logits_chunk(config, candidate.model.shape),
        )
        if self._engine is not None:
            self._engine.take(setup)
            return self._engine
        self._engine = build_answering_engine(setup)
        attach_score_models(self._engine, self._objectives)
        return self._engine

    # -- the results ---------------------------------------------------------------------------------
    def _results(self, stores: Sequence[AnswerStore]) -> Comparison | None:
        written: list[Comparison] = []
        enter("comparing")

        def compared() -> None:
            if self._everyone.is_main:
                written.append(self._compare([store.close() for store in stores]))

        agree(self._everyone, compared)
        return written[0] if written else None

    def _compare(self, answers: Sequence[list[Answer]]) -> Comparison:
        names = [candidate.named.name for candidate in self._candidates]
        by_name = dict(zip(names, answers, strict=True))
        asked = Asked(self._names, self._samples, self.request.thresholds, self.request.refusals)
        comparison = compare(by_name, asked, self.request.how)
        self._write(comparison, by_name)  # before the judge, which may fail
        if self.request.judge is not None:
            judging = Judging(*self.request.judge, self.request.out / JUDGEMENTS_FILE)
            prompts = self._candidates[0].prompts
            found = judging.judge(prompts, by_name, self._samples, self.request.how)
            comparison = replace(comparison, judged=found)
            self._write(comparison, by_name)
        return comparison

    def _write(self, comparison: Comparison, answers: Mapping[str, Sequence[Answer]]) -> None:
        # Where nothing is measured from it, as of greedy responses, a reference would mislead.
        reference = self._reference if "kl" in comparison.measures else None
        about = {
            "paths": {each.named.name: str(each.named.source) for each in self._candidates},
            "reference": None if reference is None else str(reference.named.source),
            "prompt_source": self.request.prompts or "held-out prompts of the configuration",
            "sampling": {"greedy": self.request.greedy, **self.config.rollout.model_dump(mode="json")},
        }
        write_comparison(self.request.out, comparison, answers, about, self.config.evaluation.shown)


def _of_all(store: AnswerStore, numbers: Sequence[int]) -> list[Answer] | None:
    """The earlier responses to all of ``numbers``; None where one of them has none."""
    found = [store.earlier(number) for number in numbers]
    return [answer for each in found for answer in each or ()] if all(found) else None


def _code(objective: ObjectiveConfig) -> dict[str, Any] | None:
    """A fingerprint of the file that defines the objective's function or class of the user's own."""
    place, _, _ = (objective.function or objective.kind).rpartition(":")
    if not place:
        return None
    path = Path(place) if place.endswith(".py") else None
    if path is None:
        spec = importlib.util.find_spec(place)
        path = Path(spec.origin) if spec is not None and spec.origin is not None else None
    return None if path is None or not path.is_file() else fingerprints.of_text(read_text(path))
