"""What a training reads beside its own model."""

from __future__ import annotations

from pathlib import Path

from gapo_mega.runs.fingerprints import of_weights
from gapo_mega.runs.start import score_models_in
from tests.helpers.fake_runs import configuration


def test_score_models_of_objectives_count_by_their_weights_and_tokenizer(tmp_path: Path) -> None:
    """Trained again under the same name, or reading texts in another way, they are other objectives."""
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
    (key,) = before
    assert key == "objectives.1.options.model" and before[key].items() > of_weights(model).items()
    seen = [before]
    for name in ("model.safetensors", "config.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_bytes(b"{} ")
        seen.append(score_models_in(config))
        assert seen[-1] not in seen[:-1], name
    (model / "README.md").write_text("no part of it")
    assert score_models_in(config) == seen[-1]
