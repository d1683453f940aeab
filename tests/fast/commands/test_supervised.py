"""Dry runs of the commands that train on data: what they print and refuse, and that nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig
from tests.helpers.here import Here
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

KINDS = {"sft": SftConfig, "train-reward": RewardModelConfig, "train-pairs": PairsConfig}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "GAPO_MEGA_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return Here(monkeypatch, capsys)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The file of a run by command; all read the same rows."""
    tiny_llama(tmp_path / "model", vocab=101)
    byte_tokenizer(tmp_path / "model", CHAT_TEMPLATE)
    asked = {"role": "user", "content": "Hi"}
    answers = {k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
    row = {"messages": [asked, *answers["chosen"]], "prompt": [asked], **answers}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 5)
    data = {"source": str(tmp_path / "rows.jsonl")}
    objectives = [{"name": name, "data": data} for name in ("helpful", "harmless")]
    sections: dict[str, dict[str, Any]] = {
        "sft": {"data": data},
        "train-reward": {"data": data},
        "train-pairs": {"objectives": objectives},
    }
    found = {}
    for name, own in sections.items():
        settings = {
            "output_dir": str(tmp_path / "run"),
            "batch_size": 4,
            "micro_batch_size": 2,
            "model": {"path": str(tmp_path / "model"), "max_tokens": 60},
            "logging": {"tensorboard": False},
            **own,
        }
        found[name] = tmp_path / f"{name}.yaml"
        found[name].write_text(yaml.safe_dump(settings))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_a_dry_run_prints_configuration_layout_and_data(
    files: dict[str, Path], here: Here, tmp_path: Path, name: str
) -> None:
    arguments = (name, "-c", str(files[name]), "seed=9", "parallel.tensor=2", "--dry-run", "--world", "4")
    code, out, _ = here(*arguments)
    config = KINDS[name].model_validate(yaml.safe_load(out))
    assert (code, config.seed, config.parallel.tensor) == (0, 9, 2)
    assert "# layout: 4 processes = tensor 2 x pipeline 1 x data 2" in out
    rows = "4 rows of each of 2 objectives" if name == "train-pairs" else "4 rows"
    assert f"# step: {rows}, 2 on a data-parallel rank, in microbatches of 2" in out
    checked = [line for line in out.splitlines() if "checked 5 usable rows of the first 5" in line]
    assert len(checked) == (2 if name == "train-pairs" else 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", KINDS)
def test_a_dry_run_refuses_what_the_run_would(files: dict[str, Path], here: Here, name: str) -> None:
    run = (name, "-c", str(files[name]))
    assert here.refused(*run, "--world", "2").startswith("--world: found 2 without --dry-run")
    dry = (*run, "--dry-run", "--world", "3")
    assert here.refused(*dry, "parallel.tensor=2").startswith("parallel: found tensor 2 x pipeline 1 = 2")
    assert here.refused(*dry).startswith("batch_size: found 4, accepted")
    assert here.refused(*run, "--dry-run", "model.max_tokens=100000").startswith("model.max_tokens: found")
    source = "objectives.0.data.source" if name == "train-pairs" else "data.source"
    files[name].write_text(files[name].read_text().replace("rows.jsonl", "absent.jsonl"))
    message = here.refused(*run, "--dry-run")
    assert message.startswith(f"{source}: file") and message.count("absent.jsonl") == 1


def test_pairs_are_checked_with_their_aggregation(files: dict[str, Path], here: Here) -> None:
    run = ("train-pairs", "-c", str(files["train-pairs"]), "--dry-run")
    wrong = here.refused(*run, "aggregation.name=p_gapo", "aggregation.options.preference=[0.2,0.3,0.5]")
    assert "preference: found 3 numbers, accepted: one for each of the 2" in wrong
