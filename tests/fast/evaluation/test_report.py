"""The report: every part is written, numbers and texts arrive, foreign markup does not run."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

from gapo_mega.config import Config
from gapo_mega.evaluation.plots import draw_before_after, draw_weights
from gapo_mega.evaluation.report import SamplePair, write_report
from gapo_mega.evaluation.series import Series, read_series
from gapo_mega.evaluation.summary import Change, paired_summary, write_summary


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
    expected = {"overview", "rewards", "gradient_norms", "progress", "weights", "kl", "before_after"}
    expected |= {"cosines"} if len(names) > 1 else set()
    assert {path.stem for path in page.parent.glob("*.png")} == expected
    for path in page.parent.glob("*.png"):
        assert np.asarray(imread(path)).std() > 0.01, f"{path.name} is blank"
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(expected)
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


def test_shares_are_contributions_to_the_direction() -> None:
    """Weights 1 and 0.1 on norms 1 and 10 contribute equally."""
    names = ["a", "b"]
    one = np.ones(2)
    values = {"weight/a": one, "grad_norm/a": one, "weight/b": 0.1 * one, "grad_norm/b": 10 * one}
    figure = Figure()
    draw_weights(figure, Series(np.array([1.0, 2.0]), values), names)
    tops = [patch.get_data().values for patch in figure.axes[0].patches]
    np.testing.assert_allclose(tops, [[0.5, 0.5], [1.0, 1.0]], rtol=1e-12)
