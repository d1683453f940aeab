"""What the command refuses before anything is built, and what it hands to the processes that it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.commands import launch
from gapo_mega.commands.evaluate import evaluate
from tests.helpers.perturbed import perturbed
from tests.helpers.run_files import write_run_file

JUDGES = "objectives:\n  - {name: polite, function: 'gapo_mega.demo.rewards:plain'}\n"
JUDGE = "{url: 'http://127.0.0.1:9/v1', model: m, rubrics: {kind: be kind}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_run_file(folder)
    perturbed(folder / "model", folder / "tuned", seed=1)
    (folder / "judges.yaml").write_text(JUDGES)
    (folder / "same.yaml").write_text(JUDGES.replace("polite", "plain"))
    (folder / "judge.yaml").write_text(JUDGE)
    return folder


def call(folder: Path, *models: str, **options: Any) -> None:
    evaluate(folder / "run.yaml", [str(folder / model) for model in models or ("model", "tuned")], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 3}, r"^--limit: found 3 without --prompts, accepted: data.heldout_prompts=3"),
        ({"threshold": ["plain"]}, r"^--threshold: found 'plain', accepted: NAME=NUMBER"),
        ({"threshold": ["plain=nan"]}, r"^--threshold: found 'plain=nan', accepted"),
        ({"threshold": ["plane=1"]}, r"^--threshold: found 'plane', accepted: concise, plain$"),
        ({"refusals": "gcq"}, r"^--refusals: found 'gcq', accepted"),
        (
            {"judges": "same.yaml"},
            r"^--objectives: found 'plain' in .*same.yaml, which is an objective of the",
        ),
        ({"judges": "run.yaml"}, r"unknown key, the nearest is 'objectives'"),
        ({"judge": "judges.yaml"}, r"unknown key.*judges.yaml\)$"),
        ({"reference": "nobody"}, r"^--reference: found 'nobody', which is neither"),
        ({"prompts": "nowhere.jsonl"}, r"^--prompts: "),
        (
            {"overrides": ["data.heldout_prompts=0"]},
            r"^data.heldout_prompts: found 0, accepted: at least 1",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("judges", "judge"):
        if name in options:
            options = {**options, name: folder / options[name]}
    monkeypatch.setattr(launch, "quiet_other_ranks", lambda: None)
    with pytest.raises(ValueError, match=message) as error:
        call(folder, **options)
    assert "\n" not in str(error.value)
    assert not (folder / "run").exists()


def test_a_judge_needs_two_models(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^--judge: found one model, accepted: two or more"):
        call(folder, "model", judge=folder / "judge.yaml", nproc=2)


def test_processes_get_every_option(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, Sequence[str]]] = []
    monkeypatch.setattr(launch, "start", lambda processes, arguments: started.append((processes, arguments)))

    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    monkeypatch.setattr(launch, "quiet_other_ranks", stop)
    with pytest.raises(Stopped):
        call(
            folder,
            overrides=["seed=3"],
            out=folder / "out",
            prompts="package:prompts",
            limit=5,
            judges=folder / "judges.yaml",
            reference=f"other={folder / 'tuned'}",
            threshold=["plain=0.5", "polite=1"],
            refusals="first_person",
            judge=folder / "judge.yaml",
            greedy=True,
            resamples=200,
            nproc=2,
            overwrite=True,
        )
    models = [f"--model={folder / name}" for name in ("model", "tuned")]
    expected = [
        *("evaluate", f"--config={folder / 'run.yaml'}", *models, f"--out={folder / 'out'}"),
        *("--prompts=package:prompts", "--limit=5", f"--objectives={folder / 'judges.yaml'}"),
        *(f"--reference=other={folder / 'tuned'}", "--threshold=plain=0.5", "--threshold=polite=1"),
        *("--refusals=first_person", "--resamples=200", f"--judge={folder / 'judge.yaml'}"),
        *("--greedy", "--overwrite", "seed=3"),
    ]
    assert started == [(2, expected)]
