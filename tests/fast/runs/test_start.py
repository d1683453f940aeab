"""What a training reads beside its own model."""

from __future__ import annotations

from pathlib import Path

from gapo_mega.runs.fingerprints import of_weights
from gapo_mega.runs.start import score_models_in
from tests.helpers.fake_runs import configuration


def test_score_models_of_objectives_count_by_their_weights(tmp_path: Path) -> None:
    """Trained again under the same name, they are other objectives."""
    model = tmp_path / "reward"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"first")
    options = {"model": str(model), "max_tokens": 100, "dtype": "fp32"}
    objectives = [
        {"name": "a", "function": "m:f"},
        {"name": "b", "kind": "hf_classifier", "options": options},
    ]
    config = configuration(tmp_path, objectives=objectives)
    before = score_models_in(config)
    assert before == {"objectives.1.options.model": of_weights(model)}
    (model / "model.safetensors").write_bytes(b"again")
    assert score_models_in(config) != before
