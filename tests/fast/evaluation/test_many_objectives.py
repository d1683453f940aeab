"""Pictures of many objectives with long names: every name can be read, and no panel is squeezed."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure, FigureBase
from matplotlib.text import Text

from gapo_mega.config import GradientConfig
from gapo_mega.evaluation.heldout_curves import draw_heldout
from gapo_mega.evaluation.plots import draw_cosines, draw_overview, draw_rewards
from gapo_mega.evaluation.series import Series
from gapo_mega.evaluation.summary import Change

NAMES = [f"{'a very long name of an objective ' * (1 + i % 3)}{i}" for i in range(6)]
STEPS = np.arange(1.0, 13.0)


@pytest.fixture(scope="module")
def series() -> Series:
    values = {f"cosine/{a}/{b}": np.cos(STEPS) for a, b in combinations(NAMES, 2)}
    for name in NAMES:
        values |= {f"{key}/{name}": STEPS for key in ("reward", "grad_norm", "heldout")}
        values |= {f"heldout_gain/{name}": STEPS - 1, f"heldout_gain_error/{name}": 0 * STEPS}
    return Series(STEPS, {**values, "kl": STEPS})


def check(figure: Figure, names: int) -> None:
    """``names`` texts that begin as the objectives' do lie beside each other, within the picture."""
    figure.draw_without_rendering()
    texts: list[Text] = [text for part in (figure, *figure.subfigs) for text in legend_of(part)]
    texts += [text for axes in figure.get_axes() for text in axes.get_children() if isinstance(text, Text)]
    boxes = [text.get_window_extent() for text in texts if text.get_text().startswith(NAMES[0][:10])]
    assert len(boxes) == names
    around = figure.bbox.padded(0.18 * figure.dpi)  # so much white is saved around the figure
    assert all(around.containsx(x) for box in boxes for x in box.intervalx)
    assert all(around.containsy(y) for box in boxes for y in box.intervaly)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    sizes = [axes.get_window_extent().size / figure.dpi for axes in figure.get_axes()]
    assert min(map(min, sizes)) > 0.4, "a panel is squeezed"


def legend_of(figure: FigureBase) -> list[Text]:
    return [text for legend in figure.legends for text in legend.get_texts()]


def test_the_overview(series: Series) -> None:
    summary = {name: Change(before=1.0, after=2.0, standard_error=0.1, samples=9) for name in NAMES}
    figure = Figure(figsize=(12.0, 12.4), layout="constrained")
    draw_overview(figure, series, NAMES, summary, GradientConfig(), NAMES, "after (step 280)", 1.2)
    check(figure, 6 + 6 + 15)


@pytest.mark.parametrize("draw", [draw_rewards, draw_heldout])
def test_panels_of_rewards(draw: object, series: Series) -> None:
    figure = Figure(figsize=(5.6, 10.2), layout="constrained")
    draw(figure, series, NAMES)  # type: ignore[operator]
    check(figure, 6)


def test_the_legend_of_all_pairs_hides_none_and_tells_them_apart(series: Series) -> None:
    figure = Figure(figsize=(5.6, 5.3), layout="constrained")
    pairs = list(combinations(NAMES, 2))
    draw_cosines(figure, series, pairs)
    check(figure, 15)
    (axes,), (legend,) = figure.axes, figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    lines = [line for line in axes.lines if "·" in str(line.get_label())]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(pairs)
