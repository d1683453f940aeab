"""Links in model directories, and that no code which comes with a model ever runs."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.directory import HFDirectory, companions_in
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from gapo_mega.models.huggingface.writing import copy_companions
from tests.helpers.tiny import byte_tokenizer, tiny_llama

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    (tmp_path / "secret").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "notes", "chat_template.jinja"])
@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "further/../../secret"])
def test_a_link_out_of_the_directory_is_refused_and_not_copied(model: Path, name: str, target: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / "further").mkdir()
    (model / name).symlink_to(target)
    message = rf"^model\.path: .*{name} leads to /.*, outside of /.*model; accepted: a model whose files lie"
    for read in (read_config, read_tokenizer, HFDirectory):
        with pytest.raises(ValueError, match=message):
            read(model)
    with pytest.raises(ValueError, match=message):
        list(companions_in(model))
    with pytest.raises(ValueError, match=message):
        copy_companions(model, model.parent / "copy")
    assert not (model.parent / "copy" / name).exists()


def test_a_folder_of_templates_that_lies_elsewhere_is_refused(model: Path) -> None:
    (model.parent / "templates").mkdir()
    (model / "additional_chat_templates").symlink_to(model.parent / "templates")
    with pytest.raises(ValueError, match="additional_chat_templates leads to"):
        read_config(model)


def test_weights_that_lie_elsewhere_are_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.rename(model.parent / "elsewhere.safetensors")
    weights.symlink_to("../elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors leads to"):
        HFDirectory(model)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(model: Path, name: str) -> None:
    weights = model / "model.safetensors"
    place = model / name
    weights.rename(place)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    try:
        with pytest.raises(ValueError, match=r"elsewhere\.safetensors leads to"):
            HFDirectory(model)
    finally:
        place.unlink()


def test_links_within_and_the_hubs_cache_are_taken(model: Path, tmp_path: Path) -> None:
    """Every file of the hub's cache is a link to ``blobs`` beside the snapshots; a directory may be one."""
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "main"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "link").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "link"):
        assert HFDirectory(place).names and read_tokenizer(place)
        copy_companions(place, tmp_path / f"copy of {place.name}")
    (snapshot / "again.json").symlink_to("config.json")
    assert read_config(snapshot).model_type == "llama"
    (snapshot / "out").symlink_to("../../../secret")
    with pytest.raises(ValueError, match="out leads to"):
        read_config(snapshot)


def calls_without_a_word_on_code(file: Path) -> list[str]:
    """Calls that load something of a model by a method which may run code that comes with it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in ("from_pretrained", "from_config"):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        value = given.get("trust_remote_code")
        if not isinstance(value, ast.Constant) or value.value is not False:
            found.append(f"{file}, line {node.lineno}")
    return found


def test_every_loader_says_that_no_code_is_to_be_run() -> None:
    """Without a word, transformers asks at a terminal."""
    files = [
        file for folder in ("gapo_mega", "benchmarks", "tools") for file in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 100
    assert [place for file in files for place in calls_without_a_word_on_code(file)] == []


@pytest.mark.parametrize("read", [read_config, read_tokenizer])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(
    model: Path, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "mine.py").write_text(f"open({str(model.parent / 'was run')!r}, 'w')\n")
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((model / name).read_text())
        wanted = ["mine.T", None] if key == "AutoTokenizer" else "mine.C"
        content |= {"model_type": "mine", "auto_map": {key: wanted}, "tokenizer_class": "MineTokenizer"}
        (model / name).write_text(json.dumps(content))

    def ask(*arguments: object) -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", ask)
    try:
        assert callable(read)
        read(model)
    except ValueError as error:
        assert "\n" not in str(error)
    assert not (model.parent / "was run").exists()
