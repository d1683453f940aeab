"""Conversations as a reward model reads them: its own tokenizer and its own chat template.

Responses arrive as text. The policy's token ids mean other things to another tokenizer, so they are never
reused, not even where both models are of the same family.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError, TemplateSyntaxError

from gapo_mega.data.bounded_template import TemplateLimit
from gapo_mega.data.chat_template import ChatTemplate, template_text
from gapo_mega.files import local
from gapo_mega.models.huggingface.token_ids import check_vocabulary
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from gapo_mega.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

_TRIAL = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


class ConversationTokenizer:
    """Renders ``prompt.answered(response)`` with a reward model's chat template, and tokenizes it.

    The template writes every special token; the tokenizer adds none. A conversation of more than
    ``max_tokens`` tokens loses its *beginning*, so that the response and what closes it stay; a first token
    that is the tokenizer's ``bos`` or ``cls`` token is kept in front, since models rely on it. A warning in
    the log counts the conversations that were cut.

    Args:
        tokenizer: directory (or hub name) of the reward model.
        chat_template: Jinja text, or the path of a ``.jinja`` file; none: the tokenizer's own.
        max_tokens: the longest conversation, in tokens; none: ``model_max_length`` of the tokenizer, which
            for many tokenizers is no limit at all.
        positions: how many positions the model has; ``max_tokens`` must not exceed it.

    Raises:
        ValueError: there is no tokenizer or no template, the template is broken or leaves the response out,
            or ``max_tokens`` is out of range. The message begins with the parameter's name.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        chat_template: str | None = None,
        max_tokens: int | None = None,
        positions: int | None = None,
    ) -> None:
        if max_tokens is not None and not 1 <= max_tokens <= (positions or max_tokens):
            upper = "" if positions is None else f" to {positions}, the positions of the model"
            raise ValueError(f"max_tokens: found {max_tokens}, accepted: from 1{upper}")
        self._tokenizer = read_tokenizer(location(tokenizer), "model")
        text = template_text(self._tokenizer, chat_template, "chat_template")
        self._template = ChatTemplate(self._tokenizer, text)
        self.max_tokens: int = max_tokens or min(
            self._tokenizer.model_max_length, positions or self._tokenizer.model_max_length
        )
        self._check_template()

    def check_vocabulary(self, config: PreTrainedConfig) -> None:
        """Raise ``ValueError`` for a token without a row of the model's embedding.

        Models without a vocabulary (of bytes or characters) have no ``vocab_size``.
        """
        vocab = config.get_text_config().to_dict().get("vocab_size")
        if vocab is not None:
            check_vocabulary(self._tokenizer, vocab, "model")

    @property
    def pad_id(self) -> int:
        """An id of the vocabulary to pad with: ``pad``, else ``eos``, else 0. Callers mask the padding."""
        for token_id in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if isinstance(token_id, int):
                return token_id
        return 0

    def texts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[str]:
        """What the reward model reads, as text with its special tokens written out.

        Raises ``ValueError`` where the template refuses a conversation, naming the prompt's index.
        """
        return [self._rendered(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def token_ids(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[int]]:
        """Ids of the conversations, in the order given, each at most ``max_tokens`` long and not padded.

        A conversation without tokens (an empty response, in a template of nothing else) becomes one
        ``pad_id``.
        """
        if not prompts:
            return []
        texts = self.texts(prompts, responses)
        # verbose=False: ``_cut`` deals with lengths beyond model_max_length.
        rows: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        too_long = sum(len(row) > self.max_tokens for row in rows)
        if too_long:
            logger.warning(
                "%d of %d conversations are longer than %d tokens of the reward model: their start is cut",
                too_long,
                len(rows),
                self.max_tokens,
            )
        return [self._cut(row) or [self.pad_id] for row in rows]

    def _rendered(self, prompt: Prompt, response: str) -> str:
        try:
            return self._template.render(prompt.answered(response))
        except TemplateError as error:
            raise ValueError(
                f"chat_template: refuses the conversation of prompt {prompt.index}: {_one_line(error)}; "
                "accepted: a template for such conversations"
            ) from None

    def _check_template(self) -> None:
        try:
            rendered = self._template.render(_TRIAL)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"chat_template: found {_one_line(error)} in line {error.lineno}, accepted: a Jinja template"
            ) from None
        except TemplateLimit as error:
            raise ValueError(f"chat_template: {error}; accepted: a template within it") from None
        except TemplateError:
            return  # it may want other roles than these two; the real conversations will tell
        if _TRIAL[-1]["content"] not in rendered:
            raise ValueError(
                "chat_template: found a template that leaves out what the assistant says, accepted: one that "
                "writes every message's content"
            )

    def _cut(self, row: list[int]) -> list[int]:
        if len(row) <= self.max_tokens:
            return row
        opening = {self._tokenizer.bos_token_id, self._tokenizer.cls_token_id}
        head = row[:1] if row[0] in opening and self.max_tokens > 1 else []
        return head + row[len(row) - self.max_tokens + len(head) :]


def location(model: str | Path) -> str:
    """The name to give transformers: a directory with ``~`` replaced, or the hub name as it is."""
    directory = local(model)
    return str(directory) if os.path.isdir(directory) else str(model)


def _one_line(error: Exception) -> str:
    """The first line of a message, which is what tells most."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
