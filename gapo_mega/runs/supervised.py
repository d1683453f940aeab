"""Supervised runs: ``gapo-mega train-reward`` and ``gapo-mega sft``. One loop, two kinds of data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from gapo_mega.config.supervised import RewardModelConfig, SftConfig, SupervisedConfig, check_batches
from gapo_mega.data import encoding as batches
from gapo_mega.data.chat_template import template_text
from gapo_mega.data.chats import load_chats
from gapo_mega.data.order import Order
from gapo_mega.data.pairs import load_pairs
from gapo_mega.engine.base import (
    SupervisedEngine,
    SupervisedSetup,
    build_chat_engine,
    build_pair_engine,
    read_score_head,
)
from gapo_mega.evaluation import measures
from gapo_mega.evaluation.files import write_text
from gapo_mega.evaluation.summary import SUMMARY_FILE
from gapo_mega.models import shape_of
from gapo_mega.models.huggingface import location as model_location
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.token_ids import check_tokens
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from gapo_mega.models.score_head import require_language_model
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning.layout import check_interleaving, check_model_split
from gapo_mega.runs import fingerprints
from gapo_mega.runs.directory import EXPORT_FOLDER, Wanted
from gapo_mega.runs.identity import Identity, settings_of
from gapo_mega.runs.log import RunLog, check_logging
from gapo_mega.runs.loop import RunLoop
from gapo_mega.runs.processes import world_size
from gapo_mega.runs.resume import CONFIGURATION, HELDOUT_ROWS, POLICY, TEMPLATE, TRAINING_ROWS
from gapo_mega.runs.session import Session
from gapo_mega.types import TokenBatch

logger = logging.getLogger(__name__)
AnyConfig = TypeVar("AnyConfig", bound=SupervisedConfig)


@dataclasses.dataclass(frozen=True)
class _Start:
    """What is known of a run before its engine is built."""

    shape: ModelShape
    source: Path
    hf_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad_id(self) -> int:
        """The id that pads rows; a score is read at the last token with another id."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        found = pad if pad is not None else end
        if found is None:
            raise ValueError(f"model.path: the tokenizer of {self.source} has neither a pad nor an eos token")
        return int(found)


def check(config: SupervisedConfig, world_size: int) -> _Start:
    """Raise ``ValueError`` for what can be refused before data are read or a model is built."""
    source = model_location.resolve(config.model.path)
    hf_config = read_config(model_location.companions_of(source))
    shape = shape_of(hf_config)
    if isinstance(config, SftConfig):
        require_language_model(hf_config)
    layers = config.model.keep_layers
    if layers is not None:
        if layers > shape.num_layers or source != model_location.companions_of(source):
            raise ValueError(
                f"model.keep_layers: found {layers}, accepted: 1 to {shape.num_layers}, of a Hugging Face "
                "directory"
            )
        shape = dataclasses.replace(shape, num_layers=layers)
    if config.model.max_tokens > shape.longest:
        raise ValueError(
            f"model.max_tokens: found {config.model.max_tokens}, accepted: at most the model's "
            f"{shape.max_positions} positions and its sliding window ({shape.sliding_window})"
        )
    data_ranks = check_model_split(config.parallel, shape, world_size)
    check_batches(config, data_ranks)
    microbatches = config.batch_size // data_ranks // config.micro_batch_size
    check_interleaving(config.parallel, shape, microbatches)
    check_logging(config.logging)
    companions = model_location.companions_of(source)
    tokenizer = read_tokenizer(companions)
    check_tokens(companions, tokenizer, shape.vocab)
    template_text(tokenizer, config.model.chat_template, batches.TEMPLATE_PARAMETER)
    return _Start(shape, source, hf_config, tokenizer)


class SupervisedRun(ABC, Generic[AnyConfig]):
    """The work of a supervised run, for ``RunLoop``, on this process's share of the world."""

    updates_per_step = 1
    command: ClassVar[str]

    def __init__(self, config: AnyConfig, overwrite: bool = False) -> None:
        """Take the output directory, read the data and build the model; ``run`` gives the directory back.

        ``overwrite``: first remove what runs wrote there. Raises ``ValueError`` for what does not fit.
        """
        self.config = config
        self.directory = Path(config.output_dir)
        self.measured: dict[str, float] = {}
        self.session = Session(config, self.directory, self.wanted(config), overwrite)
        self.session.open()
        try:
            self._prepare()
        except BaseException:
            self.session.close()
            raise

    @classmethod
    def wanted(cls, config: SupervisedConfig) -> Wanted:
        """What the run does in its output directory."""
        return Wanted(cls.command, config.checkpoint, config.logging, report=False)

    def _prepare(self) -> None:
        config = self.config
        self.session.check_settings(Identity(self.command, settings_of(config)))
        self.start = check(config, world_size())
        count = self._load(self.start.tokenizer)
        # Refuses more items a step than there are, before the engine knows this process's place.
        order = Order(count, config.batch_size, 0, 1, config.seed)
        total = order.steps_per_epoch * config.epochs
        self.total_steps = total if config.max_steps is None else min(total, config.max_steps)
        self.session.check_contents(self._contents(), self.total_steps, self.total_steps)
        self.session.begin()
        self.engine = self._build()
        layout = self.engine.layout
        self.order = Order(count, config.batch_size, layout.data_rank, layout.data, config.seed)
        self.log = RunLog(self.directory, [], config.logging, self.total_steps, layout.is_main)
        record = self.session.record()
        self.loop = RunLoop(self, self.engine, self.directory, config.checkpoint, self.log, record)

    def _contents(self) -> dict[str, Any]:
        """Fingerprints of what the run reads."""
        given = self.config.model.chat_template
        text = template_text(self.start.tokenizer, given, batches.TEMPLATE_PARAMETER)
        shape = fingerprints.of_shape(self.start.shape, padding=self.start.pad_id)
        found = {TEMPLATE: fingerprints.of_text(text), CONFIGURATION: shape}
        found[POLICY] = fingerprints.of_weights(self.start.source)
        rows = dict(zip((TRAINING_ROWS, HELDOUT_ROWS), self._rows(), strict=True))
        return found | {key: fingerprints.of_rows(items) for key, items in rows.items()}

    def run(self) -> dict[str, float]:
        """Train to the end, or to a signal; return what the end measured on the held-out data."""
        with contextlib.closing(self.session):
            if self.loop.run():
                self.session.end(self.loop.step)
        return self.measured

    # -- the work ------------------------------------------------------------------------------------
    def begin(self) -> None:
        """Do nothing: ``evaluate_every`` and the end of the run measure the held-out data."""

    def train_step(self, step: int) -> None:
        """One optimizer step on the items of ``step``."""
        started = time.perf_counter()
        batch = self._batch(self.order.items(step))
        update = self.engine.update(batch)
        done = step + 1
        seconds = time.perf_counter() - started
        tokens = float(self.engine.sum_over_data((batch.tokens_BT != self.start.pad_id).sum()))
        metrics = {
            "loss": update.loss,
            **self._named(update.right),
            "gradient_norm": update.gradient_norm,
            "learning_rate": update.learning_rate,
            "skipped": float(update.skipped),
            "tokens_per_second": tokens / seconds,
            "time/step": seconds,
        }
        if update.skipped:
            logger.warning("step %d skipped: its gradient is not finite", done)
        every = self.config.evaluate_every
        if every and done % every == 0 and done < self.total_steps:
            metrics |= {f"heldout/{name}": value for name, value in self.evaluate().items()}
        self.log.write(done, metrics)

    def finish(self) -> None:
        """Measure the held-out data, export the model, and write the summary."""
        self.measured = self.evaluate()
        if self.config.checkpoint.export_hf:
            self.engine.export_hf(self.directory / EXPORT_FOLDER)
        if self.engine.layout.is_main:
            summary: dict[str, Any] = {
                "steps": self.loop.step,
                "training_items": self.order.count,
                "heldout": self.measured,
            }
            if self.session.history:
                summary["resumed"] = self.session.history
            write_text(self.directory / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
            measures.print_table(self.measured, self.directory)
        self.engine.barrier()

    def state_dict(self) -> dict[str, Any]:
        """The numbers that give a step its items: those of a resumed run must be the same."""
        return {"items": self.order.count, "batch_size": self.order.batch_size}

    def load_state_dict(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise ``ValueError`` for another number of items, or of items per step."""
        mine = self.state_dict()
        for key, name in (("items", "data"), ("batch_size", "batch_size")):
            if state[key] != mine[key]:
                raise ValueError(
                    f"{name}: {checkpoint} was written with {state[key]}, found {mine[key]}; accepted: the "
                    "configuration of the run that is resumed, or another output_dir"
                )

    # -- what kinds differ in ------------------------------------------------------------------------
    @abstractmethod
    def _load(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Read and encode the data; return the number of training items."""

    @abstractmethod
    def _rows(self) -> tuple[Iterable[object], Iterable[object]]:
        """The encoded training and held-out items, as ``fingerprints.of_rows`` takes them."""

    @abstractmethod
    def _build(self) -> SupervisedEngine:
        """Build the engine with the model."""

    @abstractmethod
    def _batch(self, items: Sequence[int]) -> TokenBatch:
        """These training items, padded and sorted by length, since each microbatch is cut to its own."""

    @abstractmethod
    def _named(self, right: float) -> dict[str, float]:
        """Metrics of an update that only one kind has."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Measures on the held-out data; the same on every rank, empty without such data."""

    # -- helpers -------------------------------------------------------------------------------------
    def _setup(self, micro_batch: int, config: dict[str, object]) -> SupervisedSetup:
        """``config``: what the kind changes in the trained model's ``config.json``."""
        kept = self.config.model.keep_layers
        if kept is not None:
            config["num_hidden_layers"] = kept
            layer_types = self.start.hf_config.to_dict().get("layer_types")
            if layer_types is not None:
                config["layer_types"] = layer_types[:kept]
        template = self.config.model.chat_template
        if template is not None:  # it goes with the model, which expects it from now on
            template = template_text(self.start.tokenizer, template, batches.TEMPLATE_PARAMETER)
        return SupervisedSetup(
            shape=self.start.shape,
            source=self.start.source,
            model=self.config.model,
            parallel=self.config.parallel,
            optimizer=self.config.optimizer,
            total_steps=self.total_steps,
            micro_batch=micro_batch,
            seed=self.config.seed,
            config=config,
            chat_template=template,
        )

    def _own(self, count: int, lengths: Sequence[int]) -> list[list[int]]:
        """This data rank's share of held-out items, by length and cut into forward passes. Collective."""
        self.engine.gather_parameters()  # this rank may have no item, and so no forward pass
        layout, size = self.engine.layout, self.config.micro_batch_size
        own = sorted(range(layout.data_rank, count, layout.data), key=lambda i: lengths[i])
        return [own[i : i + size] for i in range(0, len(own), size)]

    def _gathered(self, own: dict[int, Any], count: int) -> list[Any]:
        """All ranks' values by item, in the items' order."""
        merged = {i: value for part in self.engine.gather_over_data(own) for i, value in part.items()}
        return [merged[i] for i in range(count)]


class RewardRun(SupervisedRun[RewardModelConfig]):
    """Trains a reward model on preference pairs, by the Bradley-Terry likelihood."""

    command = "gapo-mega train-reward"

    def _load(self, tokenizer: PreTrainedTokenizerBase) -> int:
        model, source = self.config.model, self.start.source
        self._head = head = read_score_head(source)
        if head is not None and (head.bias is not None or head.normalize is not None or head.is_cost):
            raise ValueError(
                f"model.path: {source} is a score model with a bias, a normaliser or a sign, "
                "which training would not keep; accepted: a language model, or a transformers classifier"
            )
        train, heldout = load_pairs(self.config.data, self.config.seed)
        self._train, _ = batches.encode_pairs(train, tokenizer, model.chat_template, model.max_tokens)
        self._heldout: list[batches.PairIds] = []
        self._lengths: list[tuple[int, int]] = []
        if heldout:
            self._heldout, kept = batches.encode_pairs(
                heldout, tokenizer, model.chat_template, model.max_tokens
            )
            self._lengths = batches.response_lengths(kept, tokenizer)
        return len(self._train)

    def _rows(self) -> tuple[Iterable[object], Iterable[object]]:
        return self._train, self._heldout

    def _build(self) -> SupervisedEngine:
        start = self.start
        family = start.hf_config.model_type
        config: dict[str, object] = {
            "architectures": [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[family]],
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
            "pad_token_id": start.pad_id,
        }
        setup = self._setup(2 * self.config.micro_batch_size, config)
        return build_pair_engine(
            setup, head=self._head, center=self.config.center_rewards, pad_id=start.pad_id
        )

    def _batch(self, items: Sequence[int]) -> TokenBatch:
        pairs = [self._train[i] for i in items]
        return batches.pair_batch(sorted(pairs, key=lambda both: max(map(len, both))), self.start.pad_id)

    def _named(self, right: float) -> dict[str, float]:
        return {"accuracy": right}

    def evaluate(self) -> dict[str, float]:
        """``measures.of_pairs`` of the held-out pairs."""
        if not self._heldout:
            return {}
        lengths = [max(len(chosen), len(rejected)) for chosen, rejected in self._heldout]
        own: dict[int, tuple[float, float]] = {}
        for items in self._own(len(self._heldout), lengths):
            batch = batches.pair_batch([self._heldout[i] for i in items], self.start.pad_id)
            scores_B = self.engine.measure(batch)
            own |= dict(zip(items, scores_B.view(-1, 2).tolist(), strict=True))
        scores = self._gathered(own, len(self._heldout))
        return measures.of_pairs(scores, self._lengths)


class SftRun(SupervisedRun[SftConfig]):
    """Trains a language model on conversations, by the likelihood of the tokens to learn."""

    command = "gapo-mega sft"

    def _load(self, tokenizer: PreTrainedTokenizerBase) -> int:
        model = self.config.model
        train, heldout = load_chats(self.config.data, self.config.seed)
        encoded = [
            batches.encode_chats(
                chats,
                tokenizer,
                model.chat_template,
                model.max_tokens,
                assistant_only=self.config.assistant_only,
            )
            if chats
            else []
            for chats in (train, heldout)
        ]
        self._train, self._heldout = encoded
        return len(self._train)

    def _rows(self) -> tuple[Iterable[object], Iterable[object]]:
        return self._train, self._heldout

    def _build(self) -> SupervisedEngine:
        return build_chat_engine(self._setup(self.config.micro_batch_size, {}))

    def _batch(self, items: Sequence[int]) -> TokenBatch:
        chats = [self._train[i] for i in items]
        return batches.chat_batch(sorted(chats, key=lambda chat: len(chat[0])), self.start.pad_id)

    def _named(self, right: float) -> dict[str, float]:
        return {}

    def evaluate(self) -> dict[str, float]:
        """``measures.of_chats`` of the held-out chats."""
        if not self._heldout:
            return {}
        own: dict[int, float] = {}
        for items in self._own(len(self._heldout), [len(ids) for ids, _ in self._heldout]):
            batch = batches.chat_batch([self._heldout[i] for i in items], self.start.pad_id)
            logprobs_B = self.engine.measure(batch)
            own |= dict(zip(items, logprobs_B.tolist(), strict=True))
        tokens = [int(mask_T.sum()) for _, mask_T in self._heldout]
        return measures.of_chats(self._gathered(own, len(self._heldout)), tokens)
