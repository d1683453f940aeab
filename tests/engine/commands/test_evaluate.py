"""The whole command in this process: prompts of one's own, a further objective, a judge with a socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.commands.evaluate import evaluate
from gapo_mega.evaluation.answers import read_answers
from tests.helpers.http_services import Answer, services
from tests.helpers.perturbed import perturbed
from tests.helpers.run_files import write_run_file

JUDGES = "objectives:\n  - {name: wordy, function: 'tests.helpers.rewards:vowels'}\n"


def always_the_first(number: int, content: dict[str, Any]) -> Answer:
    return 200, json.dumps({"choices": [{"message": {"content": "[[A]]"}}]}).encode(), {}


def test_a_judge_and_a_further_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run_file(tmp_path)
    perturbed(tmp_path / "model", tmp_path / "tuned", seed=1)
    (tmp_path / "judges.yaml").write_text(JUDGES)
    questions = [f"Why is {color} a colour?" for color in ("red", "blue", "green", "white")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions))
    with services() as start:
        service = start(always_the_first)
        url = service.url.removesuffix("/score")
        (tmp_path / "judge.yaml").write_text(f"url: {url}\nmodel: m\nrubrics: {{kind: be kind}}\n")
        evaluate(
            tmp_path / "run.yaml",
            [f"base={tmp_path / 'model'}", f"tuned={tmp_path / 'tuned'}"],
            prompts=str(tmp_path / "own.jsonl"),
            limit=3,
            judges=tmp_path / "judges.yaml",
            judge=tmp_path / "judge.yaml",
            threshold=["wordy=0.1"],
        )
    out = tmp_path / "run" / "evaluation"
    answers = read_answers(out / "tuned" / "responses.jsonl")
    assert [answer.prompt for answer in answers] == questions[:3]
    assert set(answers[0].scores) == {"concise", "plain", "wordy"}
    document = json.loads((out / "evaluation.json").read_text())
    shares = [answer.scores["wordy"] > 0.1 for answer in answers]
    assert document["models"]["tuned"]["measures"]["above/wordy"]["mean"] == pytest.approx(sum(shares) / 3)
    (judged,) = document["judge"]
    assert (judged["first"], judged["consistent"], judged["ties"]) == (1.0, 0.0, 1.0)
    assert "kind: tuned against base" in (out / "index.html").read_text()
    printed = capsys.readouterr().out
    assert "| wordy > 0.1 (share) |" in printed
    assert f"wrote {out}" in printed
