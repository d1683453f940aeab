"""The report: every part is written, numbers and texts arrive, foreign markup does not run."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

from gapo_mega.config import Config, GradientConfig
from gapo_mega.evaluation.heldout_curves import curve, draw_heldout
from gapo_mega.evaluation.plots import draw_before_after, draw_progress, draw_weights
from gapo_mega.evaluation.report import SamplePair, write_report
from gapo_mega.evaluation.series import Series, read_series
from gapo_mega.evaluation.standing import Best, Standing
from gapo_mega.evaluation.summary import Change, paired_summary, read_standing, write_summary
from gapo_mega.evaluation.terms import cosines_with_direction, parameters_measured


def run_directory(path: Path, names: list[str], steps: int) -> Path:
    """A run's files with smooth synthetic numbers; step 2 was skipped."""
    config = Config(
        output_dir=str(path),
        model={"path": "a/model"},  # type: ignore[arg-type]
        data={"source": "prompts.jsonl"},  # type: ignore[arg-type]
        objectives=[{"name": name, "function": "module:function"} for name in names],  # type: ignore[list-item]
    )
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, **_row(names, step)}) + "\n")
    rng = np.random.default_rng(0)
    before = rng.normal(size=(len(names), 10))
    write_summary(path / "summary.json", paired_summary(before, before + rng.random(before.shape), names), 75)
    return path


def _row(names: list[str], step: int) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for i, name in enumerate(names):
        norm = None if step == 2 else 10.0**i
        row |= {f"reward/{name}": step * (i + 1.0), f"grad_norm/{name}": norm, f"weight/{name}": 0.1**i}
        row |= {f"predicted_change/{name}": norm, f"loss/{name}": 0.0}
        row |= {f"cosine/{name}/{other}": -0.1 for other in names[i + 1 :]}
    row |= {"kl": 0.01 * step, "gradient_norm": 1.0, "skipped": float(step == 2), "tokens_per_second": 100.0}
    return row | {"memory/peak_bytes": 2.0**31, "time/rollout": 3.0, "time/gram": 0.5}


def sample(names: list[str]) -> SamplePair:
    numbers = dict.fromkeys(names, 0.125)
    return SamplePair("Why <script>alert(1)</script>?", "a & b\nsecond line", "", numbers, numbers)


@pytest.mark.parametrize(("names", "steps"), [(["one"], 1), (["a", "b"], 12), (["a", "b", "c"], 25)])
def test_report_is_complete(tmp_path: Path, names: list[str], steps: int) -> None:
    run = run_directory(tmp_path / "run", names, steps)
    settings = dict(matplotlib.rcParams)
    page = write_report(run, [sample(names)])
    assert dict(matplotlib.rcParams) == settings
    assert page == run / "report" / "index.html"
    assert {path.stat().st_mode & 0o777 for path in (page, run / "summary.json")} == {0o600}
    expected = {"overview", "rewards", "gradient_norms", "progress", "weights", "kl", "before_after"}
    expected |= {"cosines"} if len(names) > 1 else set()
    assert {path.stem for path in page.parent.glob("*.png")} == expected
    for path in page.parent.glob("*.png"):
        assert np.asarray(imread(path)).std() > 0.01, f"{path.name} is blank"
    text = page.read_text()
    # The overview repeats others, and no picture is on the page twice.
    assert text.count("data:image/png;base64,") == len(expected) - 1
    assert "http://" not in text and "https://" not in text and "<script" not in text
    assert html.escape("Why <script>alert(1)</script>?") in text and "a &amp; b\nsecond line" in text
    facts = json.loads((run / "summary.json").read_text())["objectives"][names[0]]
    assert f"<td>{facts['before']:.4g}</td>" in text and f"<td>{facts['after']:.4g}</td>" in text
    assert "1 min 15 s" in text and "2.00 GiB" in text


def test_report_without_held_out_prompts(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", ["a", "b"], 3)
    (run / "summary.json").unlink()
    text = write_report(run, []).read_text()
    assert "Held-out" not in text and not (run / "report" / "before_after.png").exists()


def test_a_run_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no steps in .*metrics\.jsonl"):
        write_report(tmp_path, [])


def test_moving_average_leaves_skipped_steps_out(tmp_path: Path) -> None:
    values = np.arange(30.0)
    values[7] = math.nan
    series = Series(np.arange(1.0, 31.0), {"x": values})
    assert series.window == 3
    expected = [np.nanmean(values[max(0, i - 1) : i + 2]) for i in range(30)]
    # The two sums run in different orders.
    np.testing.assert_allclose(series.smooth("x"), expected, rtol=1e-12)


def test_null_becomes_nan_and_late_keys_are_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": null}\n{"step": 2, "a": 2.5, "b": 1}\n')
    series = read_series(tmp_path)
    np.testing.assert_array_equal(series["a"], [math.nan, 2.5])
    np.testing.assert_array_equal(series["b"], [math.nan, 1.0])


def test_whiskers_span_two_standard_errors() -> None:
    figure = Figure()
    draw_before_after(figure, {"a": Change(before=1.0, after=3.0, standard_error=0.25, samples=5)})
    (bars,) = (c for c in figure.axes[0].containers if isinstance(c, BarContainer))
    assert [bar.get_height() for bar in bars.patches] == [1.0, 3.0]
    (whisker,) = (c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer))
    (segment,) = whisker.lines[2][0].get_segments()
    np.testing.assert_allclose(segment, [[1, 2.5], [1, 3.5]])


def test_contributions_to_the_direction() -> None:
    """Weights 1 and 0.1 on norms 1 and 10 contribute equally."""
    names = ["a", "b"]
    one = np.ones(2)
    values = {"weight/a": one, "grad_norm/a": one, "weight/b": 0.1 * one, "grad_norm/b": 10 * one}
    figure = Figure()
    draw_weights(figure, Series(np.array([1.0, 2.0]), values), names)
    tops = [patch.get_data().values for patch in figure.axes[0].patches]
    np.testing.assert_allclose(tops, [[0.5, 0.5], [1.0, 1.0]], rtol=1e-12)


def test_a_last_line_that_was_not_finished_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "a": 1.5}\n{"step": 2, "a": 2.5}\n'
    for rest in ('{"step": 3, "a', "{", '{"step": 3, "a": "\xe9', '{"step": 3}\n'[:-2]):
        path.write_bytes((whole + rest).encode("latin-1"))
        assert read_series(tmp_path).steps.tolist() == [1, 2], rest
    path.write_text(whole + '{"step": 3, "a": 3.5}')  # an editor may leave the line break out
    assert read_series(tmp_path)["a"].tolist() == [1.5, 2.5, 3.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "a\n{"step": 2}\n', r"metrics\.jsonl: line 1: found '{\"step\": 1, \"a', accepted"),
        ('{"step": 1}\n{"step"\n', r"line 2: found '{\"step\"', accepted: a JSON object with a step"),
        ('{"step": 1}\n\n{"step": 2}\n', r"line 2: found '', accepted"),
        ('{"step": 1}\n[2]\n', r"line 2: found '\[2\]', accepted"),
        ('{"step": 1, "a": "x"}\n', r"step 1: found a 'x', accepted: a number or null"),
        ('{"step": 1, "a": true}\n', r"step 1: found a True, accepted: a number or null"),
        ('{"st', r"found no steps in .*metrics\.jsonl"),
    ],
)
def test_any_other_broken_line_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_series(tmp_path)


@pytest.mark.parametrize(
    ("gradients", "words"),
    [
        ({}, "all parameters"),
        ({"scope": "last_layer"}, "the output layer"),
        ({"scope": "last_block"}, "the output layer and the last transformer layer"),
        ({"scope": [[0, 2], [5, 6]]}, "transformer layers 0 to 1, 5"),
    ],
)
def test_the_report_says_over_which_parameters_gradients_were_measured(
    tmp_path: Path, gradients: dict[str, object], words: str
) -> None:
    assert parameters_measured(GradientConfig.model_validate(gradients)) == words
    run = run_directory(tmp_path / "run", ["a", "b"], 3)
    document = yaml.safe_load((run / "config.yaml").read_text()) | {"gradients": gradients}
    (run / "config.yaml").write_text(yaml.safe_dump(document))
    text = write_report(run, []).read_text()
    assert f"inner products of their gradients over {words}," in text
    assert f"gradient over {words}" in text  # in captions
    assert "full-parameter" not in text


def test_the_page_says_what_a_change_allows_to_say(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", ["a", "b"], 3)
    write_summary(run / "summary.json", {"a": Change(0.0, 1.0, 1e-9, 2), "b": Change(0.0, 1.0, 0.1, 50)}, 1)
    text = write_report(run, []).read_text()
    assert '<td class="muted">too few prompts</td>' in text and '<td class="better">better</td>' in text
    assert "a: too few prompts to tell a change from chance (2 of at least 10)" in text
    assert "one run cannot tell" in text and "unlikely" not in text


def test_skipped_steps_are_counted_by_what_is_known_of_them(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", ["a", "b"], 6)
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["nonfinite/a"] = 1.0
    rows[4]["skipped"] = 1.0  # for another reason
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "2 (in 1 a gradient was not finite)" in write_report(run, []).read_text()


def test_a_run_whose_numbers_are_not_known_says_so(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", ["a"], 2)
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({k: None if k in UNKNOWN else v for k, v in row.items()}) + "\n" for row in rows)
    )
    text = write_report(run, []).read_text()
    assert text.count("<dd>not known</dd>") == 2 and ">nan" not in text


UNKNOWN = ("tokens_per_second", "memory/peak_bytes")


def test_a_phase_that_few_steps_have_counts_over_all_of_them(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", ["a"], 4)
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[1:]:
        del row["time/rollout"]  # one rollout of 3 seconds for four updates
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<span>0.75 s</span>" in write_report(run, []).read_text()


def test_throughput_is_tokens_over_seconds(tmp_path: Path) -> None:
    """Four updates of a rollout share 800 tokens; the first one takes 10 seconds, the others 2."""
    run = run_directory(tmp_path / "run", ["a"], 4)
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, seconds in zip(rows, (10.0, 2.0, 2.0, 2.0), strict=True):
        row |= {"tokens_per_second": 200 / seconds, "time/step": seconds}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<dd>50 tokens/s</dd>" in write_report(run, []).read_text()  # not the median's 100


def lines_of(values: dict[str, list[float]], names: list[str]) -> np.ndarray:
    figure = Figure()
    series = Series(np.arange(1.0, 1 + len(values["skipped"])), {k: np.array(v) for k, v in values.items()})
    draw_progress(figure, series, names)
    curves = [line.get_ydata() for line in figure.axes[0].lines if line.get_label() in names]
    return np.stack([np.asarray(curve, dtype=float) for curve in curves], axis=1)


def test_cosines_with_the_direction_are_those_of_the_vectors() -> None:
    """Whatever the norm of the whole update is, which a scope makes another one; none at skipped steps."""
    rows = np.random.default_rng(5).normal(size=(2, 7))
    weights = np.array([0.3, 0.7])
    direction = weights @ rows
    expected = rows @ direction / np.linalg.norm(rows, axis=1) / np.linalg.norm(direction)
    change = rows @ direction
    values = {"skipped": [0.0, 1.0], "gradient_norm": [123.0, 123.0]}
    for i, name in enumerate("ab"):
        values |= {f"grad_norm/{name}": [float(np.linalg.norm(rows[i]))] * 2}
        values |= {f"weight/{name}": [weights[i], 0.0], f"predicted_change/{name}": [change[i], 0.0]}
    found = lines_of(values, ["a", "b"])
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    assert np.isnan(found[1]).all()


def test_a_direction_that_cancels_has_no_cosines() -> None:
    norms = np.array([[2.0, 2.0]])
    found = cosines_with_direction(norms, np.array([[0.5, 0.5]]), np.array([[1e-16, -1e-16]]))
    np.testing.assert_array_equal(found, [[0.0, 0.0]])


def test_weights_of_skipped_steps_are_not_drawn() -> None:
    values = {"weight/a": [0.5, 0.0], "grad_norm/a": [1.0, 1.0], "skipped": [0.0, 1.0]}
    figure = Figure()
    draw_weights(figure, Series(np.array([1.0, 2.0]), {k: np.array(v) for k, v in values.items()}), ["a"])
    (line,) = figure.axes[1].lines
    np.testing.assert_array_equal(np.asarray(line.get_ydata(), dtype=float), [0.5, math.nan])


def test_lone_surrogates_do_not_keep_a_report_from_being_written(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", ["a"], 2)
    pair = SamplePair("why \udc80?", "\ud83d\ude00", "b\x00", {"a": 1.0}, {"a": 1.0})
    text = write_report(run, [pair]).read_text(encoding="utf-8")
    assert "why \ufffd?" in text and "\U0001f600" in text


def evaluated(path: Path, steps: int, every: int) -> Path:
    """A run that was evaluated: objective a scores 1 before training and gains 0.5 an evaluation."""
    run = run_directory(path, ["a", "b"], steps)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[every - 1 :: every]:
        gain = 0.5 * row["step"] / every
        row |= {"heldout/a": 1 + gain, "heldout_gain/a": gain, "heldout_gain_error/a": 0.125}
        row |= {"heldout/b": 3.0, "heldout_gain/b": 0.0, "heldout_gain_error/b": None}
        row |= {"heldout_criterion": gain, "heldout_best_step": 2.0 * every}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_curves_begin_before_training(tmp_path: Path) -> None:
    series = read_series(evaluated(tmp_path / "run", 12, 4))
    steps, scores, errors = curve(series, "a")
    assert (steps.tolist(), scores.tolist()) == ([0.0, 4.0, 8.0, 12.0], [1.0, 1.5, 2.0, 2.5])
    assert errors.tolist() == [0.0, 0.125, 0.125, 0.125]
    assert curve(series, "b")[2].tolist() == [0.0] * 4  # not known, so no bar
    figure = Figure()
    draw_heldout(figure, series, ["a", "b"])
    (line, *_), (ring,) = ([x for x in figure.axes[0].lines if len(x.get_xdata()) == n] for n in (4, 1))  # type: ignore[arg-type]
    assert list(line.get_ydata()) == [1.0, 1.5, 2.0, 2.5]  # type: ignore[arg-type]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([4.0], [1.5])  # type: ignore[arg-type]


def test_a_running_run_says_how_far_it_is(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", 12, 4)
    (run / "summary.json").unlink()
    found = {"a": Change(1.0, 2.5, 0.125, 5), "b": Change(3.0, 3.0, math.nan, 5)}
    standing = Standing(12, 12, 200, ended=False, best=Best("a", 12, 2.5, 3))
    text = write_report(run, [sample(["a", "b"])], (found, standing)).read_text()
    assert re.search(r"Running: step 12 of 200, written at \d{4}-\d\d-\d\d \d\d:\d\d UTC", text)
    assert "The best so far is step 12, the best of 3 evaluations by a (2.5)." in text
    assert "<th>step 12</th>" in text and "<th>after</th>" not in text
    assert "too few prompts to tell a change from chance (5 of at least 10)" in text
    assert "Wall-clock" not in text and (run / "report" / "heldout.png").is_file()
    assert text.count("Mean reward on held-out prompts while training") == 2  # caption and alternative text


def test_the_end_says_which_step_it_is(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", 12, 4)
    standing = Standing(8, 12, 20, ended=True, best=Best("a", 8, 2.0, 3))
    write_summary(run / "summary.json", {"a": Change(1.0, 2.0, 0.1, 50)}, 60.0, standing=standing)
    assert read_standing(run / "summary.json") == standing
    text = write_report(run, []).read_text()
    assert "Ended after step 12 of 20, stopped early, written at" in text
    assert "<th>after (step 8)</th>" in text and "is of step 8, the best of 3 evaluations by a (2)" in text
    assert "numbers and intervals are too favourable" in text


def test_a_summary_of_an_earlier_version_claims_no_step(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", ["a"], 2)
    assert read_standing(run / "summary.json") is None
    assert "<th>after</th>" in write_report(run, []).read_text()
