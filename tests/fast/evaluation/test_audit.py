"""The audit of a run: a log written from known Gram matrices against the methods asked directly."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from gapo_mega import aggregation
from gapo_mega.cli import app
from gapo_mega.evaluation import verdicts
from gapo_mega.evaluation.audit import audit_run, curves, print_audit, run_audit
from gapo_mega.evaluation.audit_plot import same_lines
from gapo_mega.evaluation.recording import read_recording
from gapo_mega.evaluation.verdicts import Candidate, judge
from tests.helpers.aggregators import OnHost
from tests.helpers.audited_runs import GAPO, NAMES, SKIPPED, random_grams, write_run

# Norms and cosines give the Gram matrix back to a few units in the last place, the solver adds a few more.
ROUND_TRIP = 1e-9


def opposing() -> list[Tensor]:
    """A long and a short gradient at 120 degrees: an equal sum of the two hurts the short one."""
    return [torch.tensor([[100.0, -5.0], [-5.0, 1.0]], dtype=torch.float64)] * 3


@pytest.fixture
def console() -> Console:
    return Console(width=80, record=True, quiet=False)


def text_of(directory: Path, console: Console, only: Sequence[str] = ()) -> str:
    print_audit(audit_run(directory, only), "run", console)
    return console.export_text()


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_every_method_is_asked_with_the_gram_matrix_of_the_step(tmp_path: Path, m: int) -> None:
    grams = random_grams(m)
    audit = audit_run(write_run(tmp_path, grams))
    assert audit.warning is None
    assert audit.recording.left_out == [SKIPPED]
    assert audit.recording.steps == [1, 2, 4, 5, 6, 7, 8]
    labels = ["gapo p=1 scale=mean_norm", "gapo p=2", "mgda", "p_gapo", "weighted_sum"]
    assert [v.candidate.label for v in audit.verdicts] == labels
    methods = [aggregation.build("gapo", **GAPO["options"]), aggregation.build("gapo", p=2)]  # type: ignore[arg-type]
    methods += [aggregation.build(name) for name in labels[2:]]
    for verdict, method in zip(audit.verdicts, methods, strict=True):
        for index, step in enumerate(audit.recording.steps):
            gram = grams[step - 1]
            weights = method(gram)
            np.testing.assert_allclose(verdict.weights[index], weights, rtol=ROUND_TRIP, atol=0)
            norms = gram.diagonal().sqrt()
            change = torch.where(norms > 0, gram @ weights / norms, 0.0)
            length = (weights @ gram @ weights).sqrt()
            expected = change / length if length > 0 else torch.zeros(m)
            np.testing.assert_allclose(verdict.cosines[index], expected, rtol=0, atol=1e-8)
            facts = aggregation.diagnose(gram, weights)
            assert verdict.hurt[index].nonzero()[0].tolist() == facts.hurt
            assert verdict.corner[index] == facts.corner


def test_the_table_is_made_of_means_over_the_steps(tmp_path: Path, console: Console) -> None:
    grams = [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1.0, 4.0], [4.0, 4.0])]
    audit = audit_run(write_run(tmp_path, grams, {"name": "mgda", "options": {}}))
    # Orthogonal gradients: w_i is proportional to 1 / ||g_i||^2, the cosines are ||d|| / ||g_i||.
    np.testing.assert_allclose(audit.verdicts[0].shares, [[0.8, 0.2], [0.5, 0.5]], rtol=1e-12)
    cosines = [[math.sqrt(0.8), math.sqrt(0.2)], [math.sqrt(0.5)] * 2]
    np.testing.assert_allclose(audit.verdicts[0].cosines, cosines, rtol=1e-12)
    print_audit(audit, "run", console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    row = text[text.index("mgda") :].splitlines()
    assert row[0].split() == ["mgda", "helpful", "0.650", "+0.801", "+0.707", "0.0%", "0.0%", "0.0%"]
    assert row[1].split() == ["this", "run", "harmless", "0.350", "+0.577", "+0.447", "0.0%"]
    assert "equal preference" in text and "equal weights" in text


def test_weighted_sum_hurts_where_gapo_and_mgda_do_not(tmp_path: Path, console: Console) -> None:
    audit = audit_run(write_run(tmp_path, opposing()))
    by_label = {v.candidate.label: v for v in audit.verdicts}
    total = by_label.pop("weighted_sum")
    assert total.conflict.all() and total.hurt[:, 1].all() and not total.hurt[:, 0].any()
    assert not any(v.conflict.any() for v in by_label.values())
    assert by_label["mgda"].corner.tolist() == [False] * 3
    # (G w)_2 of w = (1/2, 1/2) over ||d|| = sqrt(91) / 2.
    np.testing.assert_allclose(total.cosines[:, 1], -4 / math.sqrt(91), rtol=1e-12)
    print_audit(audit, "run", console)
    assert "100.0%    0.0%" in console.export_text().split("weighted_sum")[1].splitlines()[0]


def test_opposite_gradients_cancel_and_promise_nothing(tmp_path: Path) -> None:
    gram = torch.tensor([[4.0, -4.0], [-4.0, 4.0]], dtype=torch.float64)
    for verdict in audit_run(write_run(tmp_path, [gram])).verdicts:
        np.testing.assert_allclose(verdict.cosines, 0, atol=1e-7)
        assert not verdict.conflict.any()


def test_corners_are_counted(tmp_path: Path) -> None:
    """Parallel gradients of different length: MGDA takes the short one alone, GAPO with p = 1 both."""
    gram = torch.tensor([[4.0, 19.0], [19.0, 100.0]], dtype=torch.float64)
    audit = audit_run(write_run(tmp_path, [gram]))
    assert {v.candidate.label: bool(v.corner[0]) for v in audit.verdicts} == {
        "gapo p=1 scale=mean_norm": False,
        "gapo p=2": True,
        "mgda": True,
        "p_gapo": False,
        "weighted_sum": False,
    }


@pytest.mark.parametrize("m", [2, 4])
def test_files_hold_every_step_and_method(tmp_path: Path, m: int, console: Console) -> None:
    run = write_run(tmp_path / "run", random_grams(m))
    settings = dict(matplotlib.rcParams)
    run_audit(run, console=console)
    assert dict(matplotlib.rcParams) == settings
    audit = audit_run(run)
    with (run / "audit" / "audit.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = [v.candidate.label for v in audit.verdicts]
    assert [(int(r["step"]), r["method"]) for r in rows] == [
        (step, label) for step in audit.recording.steps for label in labels
    ]
    for number, row in enumerate(rows):
        index, verdict = number // len(labels), audit.verdicts[number % len(labels)]
        for i, name in enumerate(NAMES[:m]):
            assert float(row[f"weight/{name}"]) == verdict.weights[index, i]
            assert float(row[f"predicted_change/{name}"]) == verdict.predicted_change[index, i]
            assert float(row[f"cosine/{name}"]) == verdict.cosines[index, i]
            assert int(row[f"hurt/{name}"]) == verdict.hurt[index, i]
        assert float(row["direction_norm"]) == verdict.direction_norms[index]
        assert (int(row["conflict"]), int(row["corner"])) == (verdict.conflict[index], verdict.corner[index])
    assert np.asarray(imread(run / "audit" / "audit.png")).std() > 0.01
    assert "Left out: 1 of 8 steps" in console.export_text()


def test_curves_leave_a_gap_and_coinciding_methods_share_a_line(tmp_path: Path) -> None:
    """For two gradients GAPO with p = 1 and equal preferences is the bisector of the two."""
    grams = [gram for gram in random_grams(2) if not bool((gram.diagonal() == 0).any())]
    names, steps, found = curves(audit_run(write_run(tmp_path, grams)))
    assert names == NAMES[:2] and steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert all(np.isnan(curve.cosines).all(axis=1).tolist() == [s == 2 for s in steps] for curve in found)
    assert same_lines(found) == [0, 1, 2, 0, 4]


def test_methods_can_be_limited(tmp_path: Path) -> None:
    run = write_run(tmp_path, opposing())
    shown = [v.candidate.label for v in audit_run(run, ["mgda", "weighted_sum"]).verdicts]
    assert shown == ["mgda", "weighted_sum"]
    assert [v.candidate.label for v in audit_run(run, ["gapo"]).verdicts] == [
        "gapo p=1 scale=mean_norm",
        "gapo p=2",
    ]


@pytest.mark.parametrize(
    ("method", "label", "note"),
    [
        ({"name": "p_gapo", "options": {"preference": [0.75, 0.25]}}, "preference=[0.75, 0.25]", "this run"),
        ({"name": "weighted_sum", "options": {}}, "weighted_sum", "this run, equal weights"),
        ({"name": "gapo", "options": {}}, "gapo p=1", "this run"),
    ],
)
def test_the_runs_own_method_comes_first(
    tmp_path: Path, method: dict[str, Any], label: str, note: str
) -> None:
    audit = audit_run(write_run(tmp_path, random_grams(2), method))
    own, *others = [v.candidate for v in audit.verdicts]
    assert audit.warning is None
    assert own.label.endswith(label) and own.note == note
    assert own.label not in [other.label for other in others]
    assert {c.aggregator.name for c in [own, *others]} == {"gapo", "mgda", "p_gapo", "weighted_sum"}


def test_a_log_that_the_configuration_does_not_explain_is_told(tmp_path: Path, console: Console) -> None:
    run = write_run(tmp_path, random_grams(2))
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["weight/harmless"] *= 1.5
    rows[5]["weight/harmless"] *= 1 + 1e-7
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = " ".join(text_of(run, console).split())
    assert "warning: at 2 of 7 steps the logged weights are not those of gapo p=1 scale=mean_norm" in text
    assert f"step 5, harmless, logged {rows[4]['weight/harmless']:.10g}, recomputed" in text
    # It is told whatever methods are shown.
    assert "warning: at 2 of 7 steps" in " ".join(text_of(run, console, ["mgda"]).split())
    # Other weights of the very same direction are no other method.
    twins = torch.ones(2, 2, dtype=torch.float64)
    run = write_run(tmp_path / "twins", [twins])
    path = run / "metrics.jsonl"
    row = json.loads(path.read_text()) | {"weight/helpful": 0.25, "weight/harmless": 0.75}
    path.write_text(json.dumps(row) + "\n")
    assert audit_run(run).warning is None


def test_an_edited_configuration_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, random_grams(2))
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("p: 1\n", "p: 2\n"))
    warning = audit_run(run).warning
    assert warning is not None and "gapo p=2" in warning


def test_metric_and_scope_of_the_run_are_told(tmp_path: Path, console: Console) -> None:
    plain = text_of(write_run(tmp_path / "plain", opposing()), console)
    assert "metric euclidean, scope full, store shards (fp32)" in " ".join(plain.split())
    assert "Metric adam" not in plain
    adam = text_of(write_run(tmp_path / "adam", opposing(), gradients={"metric": "adam"}), console)
    assert "metric adam, scope full" in " ".join(adam.split())
    assert "weighted by 1 / (sqrt(v) + eps)" in " ".join(adam.split())
    run = write_run(tmp_path / "part", opposing(), gradients={"scope": "last_layer"})
    assert "Only the parameters in scope are seen" in " ".join(text_of(run, console).split())


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path, random_grams(2))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "grad_no')
    assert audit_run(run).recording.steps[-1] == 8


def test_the_runs_own_method_of_the_users_may_be_asked_for(tmp_path: Path) -> None:
    """Its name is accepted like those of shipped methods; a name that nobody has is not."""
    (tmp_path / "mine.py").write_text(
        "from gapo_mega.aggregation.mgda import Mgda\nclass Mine(Mgda):\n    name = 'mine'\n"
    )
    method = {"name": f"{tmp_path / 'mine.py'}:Mine", "options": {}}
    run = write_run(tmp_path / "run", random_grams(2), method)
    assert [v.candidate.aggregator.name for v in audit_run(run, ["mine"]).verdicts] == ["mine"]
    with pytest.raises(ValueError, match=r"--method: found 'yours'.*accepted: .*mine"):
        audit_run(run, ["yours"])


def test_a_step_that_was_skipped_with_finite_gradients_is_left_out(tmp_path: Path) -> None:
    """The solver did not converge: no weights were used that could be compared with."""
    run = write_run(tmp_path, opposing())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1] |= {"skipped": 1.0, "weight/helpful": 0.0, "weight/harmless": 0.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    audit = audit_run(run)
    assert audit.recording.left_out == [2] and audit.warning is None


def test_a_method_with_memory_remembers_the_steps_of_the_run(tmp_path: Path) -> None:
    """Each step's n^2 is the squared norm plus half of the last n^2; the skipped third step is not there."""
    recording = read_recording(write_run(tmp_path, random_grams(3)), NAMES[:3])
    (verdict,) = judge([Candidate("remembering", OnHost(), "")], recording)
    squares = torch.zeros(3, dtype=torch.float64)
    for gram, weights in zip(recording.grams, torch.from_numpy(verdict.weights), strict=True):
        squares = gram.diagonal() + 0.5 * squares
        expected = torch.where(gram.diagonal() > 0, squares.rsqrt(), 0.0)
        torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)


def test_long_runs_have_a_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, opposing())
    audit_run(run)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(verdicts, "MANY_STEPS", 3)
    audit_run(run)
    assert "audit" in capsys.readouterr().err


def without(run: Path, key: str) -> None:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != key}) + "\n" for r in rows))


@pytest.mark.parametrize("key", ["grad_norm/harmless", "weight/helpful", "cosine/helpful/harmless"])
def test_missing_metrics_are_named(tmp_path: Path, key: str) -> None:
    run = write_run(tmp_path, opposing())
    without(run, key)
    with pytest.raises(ValueError, match=rf"step 1 has no '{key}', accepted: .*\(helpful, harmless\)"):
        audit_run(run)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", r"metrics\.jsonl: line 2: found '\[1, 2\]', accepted: a JSON object with a step"),
        ("5", r"line 2: found '5', accepted"),
        ("", r"line 2: found '', accepted"),
        ('{"step": null}', r"line 2: found .*, accepted: a JSON object with a step"),
        ({"grad_norm/helpful": -3.0}, r"step 2: found grad_norm/helpful -3\.0, accepted: a number from 0"),
        ({"grad_norm/helpful": "3"}, r"step 2: found grad_norm/helpful '3', accepted: a number"),
        ({"cosine/helpful/harmless": -5.0}, r"found cosine/helpful/harmless -5\.0, .* from -1 to 1"),
        ({"weight/harmless": [1]}, r"found weight/harmless \[1\], accepted: a number"),
    ],
)
def test_damaged_metrics_are_named(tmp_path: Path, line: Any, message: str) -> None:
    run = write_run(tmp_path, opposing())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[1] = line if isinstance(line, str) else json.dumps(json.loads(lines[1]) | line)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        audit_run(run)


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run directory: .*nowhere not found"):
        audit_run(tmp_path / "nowhere")
    run = write_run(tmp_path / "run", opposing())
    with pytest.raises(
        ValueError, match=r"--method: found 'gap' .*'gapo'.*accepted: aligned_mtl, .*, gapo, .*mgda, .*p_gapo"
    ):
        audit_run(run, ["gap"])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out: cannot write to .*file \(File exists\)"):
        run_audit(run, out=tmp_path / "file")
    nothing = write_run(tmp_path / "nothing", [torch.full((2, 2), math.nan, dtype=torch.float64)] * 2)
    with pytest.raises(ValueError, match=r"found 2 steps in .*, none of them with finite gradients"):
        audit_run(nothing)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="found 0 steps in"):
        audit_run(run)
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"config\.yaml not found"):
        audit_run(run)


def test_command_line(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", opposing()), tmp_path / "elsewhere" / "audit"
    arguments = ["audit", str(run), "--method", "weighted_sum", "--method", "mgda", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    places = [done.stdout.index(text) for text in ("mgda", "weighted_sum", "wrote", "audit.png")]
    assert all(a < b for a, b in pairwise(places)) and "gapo p=" not in done.stdout
    assert {path.name for path in out.iterdir()} == {"audit.csv", "audit.png"}
    assert not (run / "audit").exists()
    refused = CliRunner().invoke(app, ["audit", str(tmp_path / "nowhere")])
    assert isinstance(refused.exception, ValueError) and "\n" not in str(refused.exception)
