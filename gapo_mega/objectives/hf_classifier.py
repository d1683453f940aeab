"""An objective that is a reward model of transformers: a sequence classifier with one logit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from gapo_mega.config import ObjectiveConfig, Section
from gapo_mega.objectives.base import ObjectiveKind
from gapo_mega.objectives.conversation import ConversationTokenizer
from gapo_mega.objectives.options import read_options
from gapo_mega.types import Prompt

logger = logging.getLogger(__name__)

_SUFFIX = "ForSequenceClassification"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class HfClassifierOptions(Section):
    """``options`` of kind ``hf_classifier``."""

    model: str = Field(
        description=f"directory or hub name of a model that AutoModel{_SUFFIX} loads, with one label"
    )
    batch_size: int = Field(16, ge=1, description="conversations of one forward pass")
    device: str = Field("auto", description="cpu, cuda or cuda:N; auto: the current CUDA device, else cpu")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="compute type")
    max_tokens: int | None = Field(
        None, ge=1, description="longer conversations lose their beginning; none: what the model can take"
    )
    chat_template: str | None = Field(
        None, description="Jinja text or .jinja file; none: the tokenizer's own"
    )
    offload: bool = Field(False, description="on a GPU: keep the model in CPU memory between uses")
    sign: Literal[1, -1] = Field(1, description="-1 for models of costs, where lower is better")


class HfClassifier(ObjectiveKind):
    """The logit of ``options.model`` for the conversation, times ``options.sign``.

    Building reads the model's configuration and tokenizer only; the weights are loaded when the first
    responses are scored. Code that comes with a model is never run.
    """

    kind: ClassVar[str] = "hf_classifier"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._options = read_options(config, HfClassifierOptions)
        try:
            self._device = _checked_device(self._options.device)
            hf_config = _read_config(_name(self._options.model))
            _check_classifier(hf_config, self._options.model)
            self._conversations = ConversationTokenizer(
                self._options.model,
                self._options.chat_template,
                self._options.max_tokens,
                getattr(hf_config.get_text_config(), "max_position_embeddings", None),
            )
        except ValueError as error:
            raise self._error(f"options: {error}") from error
        self._model: PreTrainedModel | None = None

    @torch.no_grad()
    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        try:
            rows = self._conversations.token_ids(prompts, responses)
        except ValueError as error:
            raise self._error(f"options: {error}") from error
        if self._model is None:
            self._model = self._load()
        device = _current(self._device)
        model = self._model.to(device)
        try:
            return self._scores(model, rows, device)
        finally:
            if self._options.offload:
                model.to("cpu")

    def _scores(self, model: PreTrainedModel, rows: list[list[int]], device: torch.device) -> list[float]:
        """One score a row, in the order of ``rows``."""
        pad_id = self._pad_id(model, rows)
        scores = [0.0] * len(rows)
        # Neighbours of similar length need little padding; the longest first, so that memory runs out at once.
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        for start in range(0, len(order), self._options.batch_size):
            batch = order[start : start + self._options.batch_size]
            tokens_BT, mask_BT = _right_padded([rows[index] for index in batch], pad_id)
            logits = model(input_ids=tokens_BT.to(device), attention_mask=mask_BT.to(device)).logits
            for index, logit in zip(batch, logits[:, 0].tolist(), strict=True):
                scores[index] = self._options.sign * logit
        return scores

    def _pad_id(self, model: PreTrainedModel, rows: list[list[int]]) -> int:
        """The id to pad with, which is also set in the model's configuration.

        A decoder's logit is read at the last token that is not ``pad_token_id``. Where the model names no such
        token that is the last one, so the id must not be one that a conversation ends with (as it would
        be with the common choice of ``eos``).
        """
        config = model.config.get_text_config()
        if self._named_pad_id is not None:
            return self._named_pad_id
        last_ids = {row[-1] for row in rows}
        candidates = (self._conversations.pad_id, *range(len(last_ids) + 1))
        config.pad_token_id = next(token_id for token_id in candidates if token_id not in last_ids)
        return int(config.pad_token_id)

    def _load(self) -> PreTrainedModel:
        name = _name(self._options.model)
        # Only one rank of a replica scores: its random state must stay that of the others.
        with torch.random.fork_rng(devices=[]):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=_DTYPES[self._options.dtype], trust_remote_code=False, output_loading_info=True
            )
        if report["missing_keys"]:
            raise self._error(
                f"options: model: {self._options.model!r} lacks the weights {sorted(report['missing_keys'])}, "
                "accepted: a trained classifier"
            )
        loaded: PreTrainedModel = model.eval()
        named = loaded.config.get_text_config().pad_token_id
        # Old Llama checkpoints say -1, which is no id and means none.
        self._named_pad_id = named if named is not None and named >= 0 else None
        logger.info("objective %s: loaded %s", self.name, self._options.model)
        return loaded
