"""GGUF files that are no model of a known family, or no whole file."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from gapo_mega.models.gguf.importing import import_gguf


def test_other_files_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"general\.architecture is 'gpt2', accepted: \['llama', 'qwen2', 'qwen3'\]"
    ):
        import_gguf(tmp_path / "other.gguf", tmp_path / "out")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "other.gguf").read_bytes()[:20])
    with pytest.raises(ValueError, match=r"cut\.gguf cannot be read"):
        import_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
