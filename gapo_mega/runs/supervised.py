"""Supervised runs: ``gapo-mega train-reward`` and ``gapo-mega sft``. One loop, two kinds of data."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from gapo_mega.config.supervised import RewardModelConfig, SftConfig
from gapo_mega.data import encoding as batches
from gapo_mega.data.chats import load_chats
from gapo_mega.data.order import Order
from gapo_mega.data.pairs import load_pairs
from gapo_mega.data.token_cache import TokenCache
from gapo_mega.engine.base import (
    SupervisedEngine,
    SupervisedSetup,
    build_chat_engine,
    build_pair_engine,
    read_score_head,
)
from gapo_mega.evaluation import measures
from gapo_mega.planning.chunks import chunk_of
from gapo_mega.runs.data_run import DataRun
from gapo_mega.types import TokenBatch

OneLossConfig = TypeVar("OneLossConfig", bound=RewardModelConfig | SftConfig)


class SupervisedRun(DataRun[OneLossConfig, SupervisedEngine]):
    """A run with one loss, whose engine takes the step."""

    @property
    def order(self) -> Order:
        """Of the one data set."""
        return self.orders[0]

    def train_step(self, step: int) -> dict[str, float]:
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
        self.skips.count(update.skipped, done, "the gradient is not finite", "the gradient was not finite")
        return self._unless_too_many(done, metrics)

    # -- what kinds differ in ------------------------------------------------------------------------
    @abstractmethod
    def _batch(self, items: Sequence[int]) -> TokenBatch:
        """These training items, padded and sorted by length, since each microbatch is cut to its own."""

    @abstractmethod
    def _named(self, right: float) -> dict[str, float]:
        """Metrics of an update that only one kind has."""

    # -- helpers -------------------------------------------------------------------------------------
    def _setup(self, micro_batch: int, config: dict[str, object], chunk: int = 0) -> SupervisedSetup:
        """``config``: what the kind changes in the trained model's ``config.json``; ``chunk``: of logits."""
        kept = self.config.model.keep_layers
        if kept is not None:
            config["num_hidden_layers"] = kept
            layer_types = self.start.hf_config.to_dict().get("layer_types")
            if layer_types is not None:
                config["layer_types"] = layer_types[:kept]
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
            chat_template=self._template(),
            lora=self.config.model.lora,
            chunk=chunk,
        )


class RewardRun(SupervisedRun[RewardModelConfig]):
    """Trains a reward model on preference pairs, by the Bradley-Terry likelihood."""

    command = "gapo-mega train-reward"

    def _load(self, tokenizer: PreTrainedTokenizerBase, cache: TokenCache) -> Sequence[int]:
        model, source = self.config.model, self.start.source
        self._head = head = read_score_head(source)
        if head is not None and (head.bias is not None or head.normalize is not None or head.is_cost):
            raise ValueError(
                f"model.path: {source} is a score model with a bias, a normaliser or a sign, "
                "which training would not keep; accepted: a language model, or a transformers classifier"
            )
        (self._train, _), (self._heldout, kept) = (
            batches.encode_pairs(pairs, tokenizer, model.chat_template, model.max_tokens, cache)
            for pairs in load_pairs(self.config.data, self.config.seed)
        )
        self._lengths = batches.response_lengths(kept, tokenizer)
        return [len(self._train)]

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
        for items, _ in self._own(len(self._heldout), lengths):  # equal items have equal scores
            batch = batches.pair_batch([self._heldout[i] for i in items], self.start.pad_id)
            scores_B = self.engine.measure(batch)
            own |= dict(zip(items, scores_B.view(-1, 2).tolist(), strict=True))
        scores = self._gathered(own, len(self._heldout))
        return measures.of_pairs(scores, self._lengths)


class SftRun(SupervisedRun[SftConfig]):
    """Trains a language model on conversations, by the likelihood of the tokens to learn."""

    command = "gapo-mega sft"

    def _load(self, tokenizer: PreTrainedTokenizerBase, cache: TokenCache) -> Sequence[int]:
        model = self.config.model
        self._train, self._heldout = (
            batches.encode_chats(
                chats,
                tokenizer,
                model.chat_template,
                model.max_tokens,
                cache,
                assistant_only=self.config.assistant_only,
            )
            for chats in load_chats(self.config.data, self.config.seed)
        )
        return [len(self._train)]

    def _rows(self) -> tuple[Iterable[object], Iterable[object]]:
        return self._train, self._heldout

    def _build(self) -> SupervisedEngine:
        model, size = self.config.model, self.config.micro_batch_size
        frozen = model.lora is not None
        chunk = chunk_of(model.logits_chunk, size * model.max_tokens, self.start.shape, frozen)
        return build_chat_engine(self._setup(size, {}, chunk))

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
        for items, _ in self._own(len(self._heldout), [len(ids) for ids, _ in self._heldout]):
            batch = batches.chat_batch([self._heldout[i] for i in items], self.start.pad_id)
            logprobs_B = self.engine.measure(batch)
            own |= dict(zip(items, logprobs_B.tolist(), strict=True))
        tokens = [int(mask_T.sum()) for _, mask_T in self._heldout]
        return measures.of_chats(self._gathered(own, len(self._heldout)), tokens)
