"""Where a chat template comes from, and the texts that it writes, letter by letter."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gapo_mega.data.chat_template import ChatTemplate, template_text

OWN = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = "{% for m in messages %}{{ m.content }}|{% endfor %}"
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n"})


def tokenizer(template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0})), bos_token="<s>", chat_template=template
    )


def test_the_tokenizers_own_template_with_and_without_asking() -> None:
    own = tokenizer(OWN)
    for template in (ChatTemplate(own), ChatTemplate(own, template_text(own, None, "here"))):
        assert template.render(CHAT) == "<s><system> Be brief.\n<user>  Hi\n\n"
        assert template.render(CHAT, asked=True) == "<s><system> Be brief.\n<user>  Hi\n\n<assistant>"
    assert ChatTemplate(own, SHORT).render(CHAT, asked=True) == "Be brief.| Hi\n|"


def test_a_text_a_file_and_a_name(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(SHORT, encoding="utf-8")
    assert template_text(tokenizer(None), str(tmp_path / "own.jinja"), "here") == SHORT
    assert template_text(tokenizer(None), SHORT, "here") == SHORT
    several = tokenizer({"default": OWN, "short": SHORT})
    assert template_text(several, None, "here") == OWN
    assert template_text(several, "short", "here") == SHORT
    assert ChatTemplate(several).render(CHAT[1:]) == "<s><user>  Hi\n\n"
    assert ChatTemplate(several, "short").render(CHAT) == "Be brief.| Hi\n|"


def test_what_is_no_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^here: file .*none.jinja not found; accepted: Jinja text or"):
        template_text(tokenizer(OWN), str(tmp_path / "none.jinja"), "here")
    with pytest.raises(ValueError, match=r"^here: not given, and the tokenizer of '' has none; accepted"):
        template_text(tokenizer(None), None, "here")
    with pytest.raises(TemplateError, match=r"^no tools$"):
        ChatTemplate(tokenizer(OWN)).render([*CHAT, {"role": "tool", "content": "2"}])
    with pytest.raises(TemplateSyntaxError):
        ChatTemplate(tokenizer(OWN), "{% for %}").render(CHAT)
