"""Names of files mean what they say, everywhere in the package; texts are UTF-8."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gapo_mega.files import expanded, local, read_text
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.directory import HFDirectory
from gapo_mega.models.huggingface.location import companions_of, resolve
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from tests.helpers.tiny import byte_tokenizer, tiny_llama

PACKAGE = Path(__file__).resolve().parents[2] / "gapo_mega"


def test_only_a_leading_tilde_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    monkeypatch.setenv("RUNS", "elsewhere")
    assert expanded("~/a") == "/homes/me/a" and expanded("~") == "/homes/me"
    for text in (
        "a/~/b",
        "$RUNS/a",
        "${RUNS}",
        "a[1]?*.jsonl",
        "org/name",
        "./~",
        "~nobody-of-that-name/a",
        "",
    ):
        assert expanded(text) == text
    assert local("~/x") == Path("/homes/me/x")


def test_nothing_else_in_the_package_expands_names() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), word)
        for path in PACKAGE.rglob("*.py")
        for word in re.findall(
            r"expanduser|expandvars|glob\.glob|\biglob\b", path.read_text(encoding="utf-8")
        )
    }
    assert found == {("files.py", "expanduser")}


def test_a_model_directory_is_the_one_that_is_named(tmp_path: Path) -> None:
    for number, name in enumerate(("m1", "m[1]*?", "m")):
        tiny_llama(tmp_path / name, vocab=104 + number)
        byte_tokenizer(tmp_path / name, chat_template=name)
    place = tmp_path / "m[1]*?"
    assert read_config(companions_of(resolve(str(place)))).vocab_size == 105
    assert HFDirectory(place).config.vocab_size == 105
    assert read_tokenizer(place).chat_template == "m[1]*?"


def test_a_text_is_utf8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é\n".encode("utf-8-sig"))
    assert read_text(path) == "é\n"
    path.write_bytes(b"a\nb\n\xe9t\xe9\n")
    with pytest.raises(ValueError, match=r"^line 3: found the byte 0xe9, accepted: UTF-8$"):
        read_text(path)
