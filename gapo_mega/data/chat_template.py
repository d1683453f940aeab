"""Where a chat template comes from: Jinja text, a ``.jinja`` file, or the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIX = ".jinja"


def template_text(tokenizer: PreTrainedTokenizerBase, given: str | None, parameter: str) -> str:
    """The Jinja text of ``given``: the text itself, or a file's; the tokenizer's own where nothing is given.

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
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"{parameter}: file {path} not found; {accepted}")
    return path.read_text(encoding="utf-8")
