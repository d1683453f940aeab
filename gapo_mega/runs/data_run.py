"""What runs on data without rollouts share: checks, the directory, held-out data, the end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gapo_mega.config.supervised import RewardModelConfig, SupervisedConfig, check_batches
from gapo_mega.data.chat_template import template_text
from gapo_mega.data.encoding import TEMPLATE_PARAMETER
from gapo_mega.data.order import Order
from gapo_mega.data.token_cache import TokenCache
from gapo_mega.engine.base import RunEngine
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
from gapo_mega.planning.disk import adapter_parameters, predict_disk
from gapo_mega.planning.layout import check_adapters, check_interleaving, check_model_split, check_packages
from gapo_mega.planning.memory import critic_parameters, stage_parameters
from gapo_mega.planning.shares import share
from gapo_mega.runs import fingerprints
from gapo_mega.runs.directory import ADAPTER_FOLDER, EXPORT_FOLDER, Wanted
from gapo_mega.runs.earlier_ends import set_aside_others
from gapo_mega.runs.identity import Identity, settings_of
from gapo_mega.runs.log import RunLog, check_logging
from gapo_mega.runs.loop import RunLoop
from gapo_mega.runs.preflight import check_adapter
from gapo_mega.runs.processes import world_size
from gapo_mega.runs.resume import CONFIGURATION, HELDOUT_ROWS, POLICY, TEMPLATE, TRAINING_ROWS
from gapo_mega.runs.session import Session
from gapo_mega.runs.skips import Skips
from gapo_mega.runs.uploading import put_from_main

logger = logging.getLogger(__name__)
AnyConfig = TypeVar("AnyConfig", bound=SupervisedConfig)
AnyEngine = TypeVar("AnyEngine", bound=RunEngine)


@dataclasses.dataclass(frozen=True)
class Start:
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


def check(config: SupervisedConfig, world_size: int) -> Start:
    """Raise ``ValueError`` for what can be refused before data are read or a model is built."""
    source = model_location.resolve(config.model.path)
    hf_config = read_config(model_location.companions_of(source))
    shape = shape_of(hf_config)
    if not isinstance(config, RewardModelConfig):
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
    check_adapters(config.model.lora, shape)
    check_adapter(config.model.lora, shape)
    data_ranks = check_model_split(config.parallel, shape, config.model.dtype, world_size)
    check_packages(config.parallel)
    check_batches(config, data_ranks)
    microbatches = config.data_sets * config.batch_size // data_ranks // config.micro_batch_size
    check_interleaving(config.parallel, shape, microbatches)
    check_logging(config.logging)
    companions = model_location.companions_of(source)
    tokenizer = read_tokenizer(companions)
    check_tokens(companions, tokenizer, shape.vocab)
    template_text(tokenizer, config.model.chat_template, TEMPLATE_PARAMETER)
    return Start(shape, source, hf_config, tokenizer)


class DataRun(ABC, Generic[AnyConfig, AnyEngine]):
    """The work of a run on data, for ``RunLoop``, on this process's share of the world."""

    updates_per_step = 1
    command: ClassVar[str]

    def __init__(self, config: AnyConfig, overwrite: bool = False) -> None:
        """Take the output directory, read the data and build the model; ``run`` gives the directory back.

        ``overwrite``: first remove what runs wrote there. Raises ``ValueError`` for what does not fit.
        """
        self.config = config
        self.directory = Path(config.output_dir)
        self.measured: dict[str, float] = {}
        self.finished = False  # whether ``run`` came to the end
        self.session = Session(config, self.directory, self.wanted(config), overwrite)
        with contextlib.ExitStack() as held:
            held.enter_context(self.session)
            self._prepare()
            held.pop_all()  # until the end of ``run``

    @classmethod
    def check(cls, config: AnyConfig, world_size: int) -> Start:
        """Raise ``ValueError`` for what can be refused before data are read or a model is built."""
        return check(config, world_size)

    @classmethod
    def wanted(cls, config: SupervisedConfig) -> Wanted:
        """What the run does in its output directory."""
        adapter = config.checkpoint.export_adapter
        return Wanted(cls.command, config.checkpoint, config.logging, report=False, adapter=adapter)

    def _prepare(self) -> None:
        config = self.config
        self.skips = Skips(self.names, config.gradients.max_nonfinite_steps)
        self.session.check_settings(Identity(self.command, settings_of(config)))
        self.start = self.check(config, world_size())
        counts = self._load(self.start.tokenizer, self.session.token_cache(config.logging.progress))
        # Refuses more items a step than there are, before the engine knows this process's place.
        orders = [Order(count, config.batch_size, 0, 1, config.seed) for count in counts]
        total = max(order.steps_per_epoch for order in orders) * config.epochs
        self.total_steps = total if config.max_steps is None else min(total, config.max_steps)
        self.session.check_contents(self._contents(), self.total_steps, self.total_steps)
        shape = self.start.shape
        scores = isinstance(config, RewardModelConfig)
        count = critic_parameters(shape, 1, 1, 0, 1) if scores else stage_parameters(shape, 1, 1, 0)
        plan = predict_disk(
            count,
            config.model.dtype,
            config.optimizer,
            config.checkpoint,
            self.total_steps,
            adapters=adapter_parameters(shape, config.model.lora),
        )
        self.session.check_space(plan)
        self.session.check_export()
        self.session.begin()
        self.engine = self._build()
        layout = self.engine.layout
        self.orders = [
            Order(count, config.batch_size, layout.data_rank, layout.data, config.seed) for count in counts
        ]
        self.log = RunLog(self.directory, self.names, config.logging, self.total_steps, layout.is_main)
        record = self.session.record()
        self.loop = RunLoop(
            self,
            self.engine,
            self.directory,
            config.checkpoint,
            self.log,
            record,
            None,
            self.session.everyone,
            plan.checkpoint,
        )

    def _contents(self) -> dict[str, Any]:
        """Fingerprints of what the run reads."""
        given = self.config.model.chat_template
        text = template_text(self.start.tokenizer, given, TEMPLATE_PARAMETER)
        shape = fingerprints.of_shape(self.start.shape, padding=self.start.pad_id)
        found = {TEMPLATE: fingerprints.of_text(text), CONFIGURATION: shape}
        found[POLICY] = fingerprints.of_weights(self.start.source)
        rows = dict(zip((TRAINING_ROWS, HELDOUT_ROWS), self._rows(), strict=True))
        return found | {key: fingerprints.of_rows(items) for key, items in rows.items()}

    @property
    def names(self) -> list[str]:
        """Of the objectives; none where there is one loss."""
        return []

    def run(self) -> dict[str, float]:
        """Train to the end, or to a signal; return what the end measured on the held-out data."""
        with self.session:
            self.finished = self.loop.run()
            if self.finished:
                self.session.end(self.loop.step, self.total_steps)
        return self.measured

    # -- the work ------------------------------------------------------------------------------------
    def begin(self) -> None:
        """Do nothing: ``evaluation.every_steps`` and the end of the run measure the held-out data."""

    def end_step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Measure the held-out data if it is time to, and log the step."""
        self.log.write(done, {**metrics, **self._heldout_due(done)})

    def finish(self) -> None:
        """Measure the held-out data, export the model, and write the summary."""
        self.measured = self.evaluate()
        settings = self.config.checkpoint
        if self.engine.layout.is_main:
            models = {EXPORT_FOLDER: settings.export_hf, ADAPTER_FOLDER: settings.export_adapter}
            written = [SUMMARY_FILE, *(name for name, wanted in models.items() if wanted)]
            set_aside_others(self.directory, self.loop.step, written)
        if settings.export_hf:
            self.engine.export_hf(self.directory / EXPORT_FOLDER)
        if settings.export_adapter:
            self.engine.export_adapter(self.directory / ADAPTER_FOLDER)
        if self.engine.layout.is_main:
            summary: dict[str, Any] = {
                "steps": self.loop.step,
                "training_items": self._counts(),
                "heldout": self.measured,
            }
            if self.session.history:
                summary["resumed"] = self.session.history
            write_text(self.directory / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
            measures.print_table(self.measured, self.directory)
        self.engine.barrier()
        if self.session.export is not None:
            put_from_main(self.session.export, self.directory / EXPORT_FOLDER, self.loop.step, self.engine)

    def state_dict(self) -> dict[str, Any]:
        """Updates skipped in a row, and what gives a step its items: the same in a run that is resumed."""
        return {
            "items": self._counts(),
            "batch_size": self.config.batch_size,
            "skipped_in_a_row": self.skips.in_a_row,
        }

    def in_flight(self, step: int) -> dict[str, Any]:
        """Nothing: a step begins with its items."""
        return {}

    def _counts(self) -> int | list[int]:
        """Training items; of every data set where there are several."""
        counts = [order.count for order in self.orders]
        return counts[0] if len(counts) == 1 else counts

    def load_state_dict(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise ``ValueError`` for another number of items, or of items per step."""
        mine = DataRun.state_dict(self)
        for key, name in (("items", "data"), ("batch_size", "batch_size")):
            if state[key] != mine[key]:
                raise ValueError(
                    f"{name}: {checkpoint} was written with {state[key]}, found {mine[key]}; accepted: the "
                    "configuration of the run that is resumed, or another output_dir"
                )
        self.skips.in_a_row = int(state.get("skipped_in_a_row", 0))  # checkpoints before 0.1 have none

    # -- what kinds differ in ------------------------------------------------------------------------
    @abstractmethod
    def _load(self, tokenizer: PreTrainedTokenizerBase, cache: TokenCache) -> Sequence[int]:
        """Read and encode the data; return the number of training items of every data set. Collective."""

    @abstractmethod
    def _rows(self) -> tuple[Iterable[object], Iterable[object]]:
        """The encoded training and held-out items, as ``fingerprints.of_rows`` takes them."""

    @abstractmethod
    def _build(self) -> AnyEngine:
        """Build the engine with the model."""

    @abstractmethod
    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step on the items of ``step``; its metrics, by ``_unless_too_many``."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Measures on the held-out data; the same on every rank, empty without such data."""

    # -- helpers -------------------------------------------------------------------------------------
    def _template(self) -> str | None:
        """The chat template that goes with the model, which expects it from now on; None: its own."""
        template = self.config.model.chat_template
        return None if template is None else template_text(self.start.tokenizer, template, TEMPLATE_PARAMETER)

    def _unless_too_many(self, done: int, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of step ``done``. Logs them and raises where too many updates in a row were skipped."""
        if self.skips.too_many:
            self.log.write(done, metrics)
        self.skips.check()
        return metrics

    def _heldout_due(self, done: int) -> dict[str, float]:
        """What the held-out data give after ``done`` steps, by the log's names, if it is time to look."""
        every = self.config.evaluation.every_steps
        if not every or done % every or done >= self.total_steps:
            return {}
        return {f"heldout/{name}": value for name, value in self.evaluate().items()}

    def _own(self, count: int, lengths: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
        """This data rank's share of held-out items, by length and cut into forward passes. Collective.

        With each the word whether it counts: data ranks that share experts take equally many passes.
        """
        self.engine.gather_parameters()  # this rank may have no item, and so no forward pass
        layout, size = self.engine.layout, self.config.micro_batch_size
        taken, count_own = share(range(count), layout.data_rank, layout.data, layout.in_step)
        own = sorted(taken[:count_own], key=lambda i: lengths[i])
        yield from ((own[i : i + size], True) for i in range(0, len(own), size))
        if -(-len(taken) // size) > -(-len(own) // size):
            yield taken[count_own:], False

    def _gathered(self, own: dict[int, Any], count: int) -> list[Any]:
        """All ranks' values by item, in the items' order."""
        merged = {i: value for part in self.engine.gather_over_data(own) for i, value in part.items()}
        return [merged[i] for i in range(count)]
