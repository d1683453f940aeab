"""Chat templates: finding one (Jinja text, a ``.jinja`` file, the tokenizer), and rendering it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gapo_mega.data.bounded_template import rendered
from gapo_mega.files import local, read_text
from gapo_mega.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIX = ".jinja"


def template_text(tokenizer: PreTrainedTokenizerBase, given: str | None, parameter: str) -> str:
    """The Jinja text of ``given``: the text itself, or a file's; for None, the tokenizer's own.

    Raises ``ValueError``, beginning with ``parameter``, for a file that is not there and for a tokenizer
    that has no template.
    """
    accepted = f"accepted: Jinja text or the path of a {SUFFIX} file"
    name = tokenizer.name_or_path
    if given is None or not given.endswith(SUFFIX):
        try:
            return str(tokenizer.get_chat_template(given))
        except ValueError:
            raise ValueError(
                f"{parameter}: not given, and the tokenizer of {name!r} has none; {accepted}"
            ) from None
    path = local(given)
    if not os.path.isfile(path):  # False for a name that no file system takes, too
        raise ValueError(f"{parameter}: file {path} not found; {accepted}")
    try:
        return read_text(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{parameter}: file {path} not readable: {error}") from None


class ChatTemplate:
    """Writes conversations as the text that a model reads, special tokens included.

    Whoever tokenizes the text must not add special tokens again.

    Args:
        text: Jinja text (see ``template_text``); none: the tokenizer's own template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._text = text

    def render(self, messages: Sequence[Message], *, asked: bool = False) -> str:
        """The conversation as text; ``asked`` appends what makes the assistant answer.

        Raises ``jinja2.TemplateError`` where the template refuses the messages, is not valid, or takes too
        long or makes too much (``TemplateLimit``).
        """
        if not messages:
            raise ValueError("found a conversation without a message, accepted: at least one")
        values: dict[str, Any] = {
            key: _plain(value) for key, value in self._tokenizer.special_tokens_map.items()
        }
        return rendered(
            self._tokenizer.get_chat_template(self._text),
            {
                **values,
                "messages": [
                    {key: value for key, value in message.items() if value is not None}
                    for message in messages
                ],
                "tools": None,
                "documents": None,
                "add_generation_prompt": asked,
            },
        )


def _plain(token: Any) -> Any:
    """A special token, or several, as text."""
    return [str(one) for one in token] if isinstance(token, list | tuple) else str(token)
