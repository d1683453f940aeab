"""The options of ``convert``, checked before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gapo_mega.commands.convert import Conversion
from tests.helpers.tiny import tiny_mistral


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor": 3}, r"--tp: found 3, accepted: a divisor of the model's \d+ key-value heads"),
        ({"pipeline": 3}, r"--pp: found 3, accepted: a divisor of the model's 2 layers"),
        ({"dtype": "int8"}, r"--dtype: found 'int8', accepted: fp32, bf16, fp16"),
        ({"target_kind": "onnx"}, r"--format: found 'onnx', accepted: hf, megatron"),
        ({"target_kind": "hf"}, r"--format: found hf, but .* is that already"),
        ({"source": "/no/such/folder"}, r"--from: /no/such/folder not found"),
        ({"source": "/no/such.gguf"}, r"--from: file /no/such\.gguf not found"),
    ],
)
def test_bad_options_are_told_at_once(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = tiny_mistral(tmp_path / "hf").config.name_or_path or str(tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        Conversion(**{"source": source, "target": tmp_path / "out", **options}).check()


@pytest.mark.parametrize("target", [".", "..", "../hf/../hf"])
def test_a_target_that_holds_the_source_is_refused(tmp_path: Path, target: str) -> None:
    """--overwrite would delete what is converted, and its neighbours."""
    source = tmp_path / "hf"
    tiny_mistral(source)
    with pytest.raises(
        ValueError, match=r"^--to: found .*, which holds .*hf, accepted: a directory beside it"
    ):
        Conversion(source=str(source), target=source / target, overwrite=True).check()
    Conversion(source=str(source), target=tmp_path / "hf2", overwrite=True).check()
