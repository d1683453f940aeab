"""An objective that is a reward model of transformers: a sequence classifier with one logit."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from gapo_mega.config import LocalPath, ObjectiveConfig, Section, TemplatePath
from gapo_mega.models.card import card_of
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.objectives.base import Objective, ObjectiveKind, Outline
from gapo_mega.objectives.conversation import ConversationTokenizer, location
from gapo_mega.objectives.options import read_options
from gapo_mega.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_SUFFIX = "ForSequenceClassification"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class HfClassifierOptions(Section):
    """``options`` of kind ``hf_classifier``."""

    model: LocalPath = Field(
        description=f"directory or hub name of a model that AutoModel{_SUFFIX} loads, with one label"
    )
    batch_size: int = Field(16, ge=1, description="conversations of one forward pass")
    device: str = Field("auto", description="cpu, cuda or cuda:N; auto: the current CUDA device, else cpu")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="compute type")
    max_tokens: int | None = Field(
        None, ge=1, description="longer conversations lose their beginning; none: what the model can take"
    )
    chat_template: TemplatePath | None = Field(
        None, description="Jinja text or .jinja file; none: the tokenizer's own"
    )
    offload: bool = Field(False, description="on a GPU: keep the model in CPU memory between uses")
    sign: Literal[1, -1] = Field(1, description="-1 for models of costs, where lower is better")


class HfClassifier(ObjectiveKind):
    """The logit of ``options.model`` for the conversation, times ``options.sign``.

    Building reads only the model's configuration and tokenizer; the first responses load the weights. Code
    that comes with a model never runs.
    """

    kind: ClassVar[str] = "hf_classifier"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._options = read_options(config, HfClassifierOptions)
        try:
            _check_device(self._options.device)
            hf_config = _classifier_config(self._options.model)
            self._conversations = ConversationTokenizer(
                self._options.model,
                self._options.chat_template,
                self._options.max_tokens,
                hf_config.get_text_config().to_dict().get("max_position_embeddings"),
            )
            self._conversations.check_vocabulary(hf_config)
            self._named_pad_id = _named_pad_id(hf_config)
        except ValueError as error:
            raise self._error(f"options: {error}") from error
        self._model: PreTrainedModel | None = None

    @classmethod
    def outline(cls, config: ObjectiveConfig) -> Objective:
        options = read_options(config, HfClassifierOptions)
        return cls(config) if card_of(options.model) is None else Outline(config.name, None)

    @torch.no_grad()
    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        try:
            rows = self._conversations.token_ids(prompts, responses)
        except ValueError as error:
            raise self._error(f"options: {error}") from error
        model = self.load()
        device = _resolved(self._options.device)
        nn.Module.to(model, device)  # in place; the wrapper of transformers hides its arguments
        try:
            return self._scores(model, rows, device)
        finally:
            if self._options.offload:
                nn.Module.to(model, "cpu")

    def load(self) -> PreTrainedModel:
        """The model, read into CPU memory at the first call. Scoring calls it.

        Raises ``ValueError`` where weights are missing, as the head's are in a model that is no classifier.
        """
        if self._model is None:
            self._model = self._read()
        return self._model

    def _scores(self, model: PreTrainedModel, rows: list[list[int]], device: torch.device) -> list[float]:
        """One score per row, in the order of ``rows``."""
        pad_id = self._pad_id(model, rows)
        scores = [0.0] * len(rows)
        # Similar lengths together need little padding; the longest come first, so that memory runs out early.
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        for start in range(0, len(order), self._options.batch_size):
            batch = order[start : start + self._options.batch_size]
            tokens_BT, mask_BT = _right_padded([rows[index] for index in batch], pad_id)
            logits = model(input_ids=tokens_BT.to(device), attention_mask=mask_BT.to(device)).logits
            for index, logit in zip(batch, logits[:, 0].tolist(), strict=True):
                scores[index] = self._options.sign * logit
        return scores

    def _pad_id(self, model: PreTrainedModel, rows: list[list[int]]) -> int:
        """The id to pad with; where the model names none, it is also set in the model's configuration.

        A decoder's logit is read at the last token that is not ``pad_token_id``, so a chosen id must not be
        one that a conversation ends with (as the common choice ``eos`` is).
        """
        if self._named_pad_id is not None:
            return self._named_pad_id
        config = model.config.get_text_config()
        free = set(range(config.vocab_size)) - {row[-1] for row in rows}
        config.pad_token_id = self._conversations.pad_id if self._conversations.pad_id in free else min(free)
        return int(config.pad_token_id)

    def _read(self) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification

        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                location(self._options.model),
                dtype=_DTYPES[self._options.dtype],
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise self._error(
                f"options: model: found {self._options.model!r}, accepted: one with weights ({reason})"
            ) from error
        if report["missing_keys"]:
            raise self._error(
                f"options: model: {self._options.model!r} lacks {sorted(report['missing_keys'])}, "
                "accepted: a trained classifier"
            )
        loaded: PreTrainedModel = model.eval()
        logger.info("objective %s: loaded %s", self.name, self._options.model)
        return loaded


def _classifier_config(model: str) -> PreTrainedConfig:
    """The configuration of a classifier with one label. ``ValueError`` for anything else."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = read_config(location(model), "model")
    names = config.architectures or []
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or not all(
        name.endswith(_SUFFIX) for name in names
    ):
        found = ", ".join(names) or f"model_type {config.model_type}"
        raise ValueError(f"model: found {found} in {model!r}, accepted: a model of a class ...{_SUFFIX}")
    if config.num_labels != 1:
        raise ValueError(
            f"model: found num_labels {config.num_labels} in {model!r}, accepted: 1 (a reward is one logit)"
        )
    return config


def _named_pad_id(config: PreTrainedConfig) -> int | None:
    """The padding id that the model itself names. Old Llama checkpoints say -1, which means none."""
    text_config = config.get_text_config()
    named, vocab = text_config.pad_token_id, text_config.to_dict().get("vocab_size")
    if isinstance(named, int) and vocab is not None and named >= vocab:
        raise ValueError(f"model: found pad_token_id {named}, accepted: less than the vocab_size {vocab}")
    return named if isinstance(named, int) and named >= 0 else None


def _check_device(device: str) -> None:
    """``ValueError`` unless ``device`` is there. Nothing is allocated on it."""
    if device in ("auto", "cpu"):
        return
    if re.fullmatch(r"cuda(:\d+)?", device) is None:
        raise ValueError(f"device: found {device!r}, accepted: auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise ValueError(
            f"device: found {device!r}, but torch sees {count} CUDA devices; accepted: auto or cpu"
        )


def _resolved(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)  # cuda without a number is the current device


def _right_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, int64 ``[B, T]``."""
    longest = max(map(len, rows))
    tokens = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(tokens), torch.tensor(mask)
