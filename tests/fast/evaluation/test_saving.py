"""Pictures are saved whole, whatever is longer than its place, and with a margin around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.image import imread

from gapo_mega.evaluation.saving import MARGIN, STYLE, save

LONG = "a long text " * 8


def picture(path: Path, change: Callable[[Figure], object], write: Callable[[Figure, Path], object]) -> Path:
    with style.context(STYLE):
        figure = Figure(figsize=(3.0, 2.0), layout="constrained")
        figure.suptitle("title")
        panel, other = figure.subfigures(1, 2)
        for part in (panel, other):
            part.subplots().plot([0.0, 1.0], [2.0, 1.0], label="line")
        change(panel)
        write(figure, path)
    return path


def tight(figure: Figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", pad_inches=MARGIN)


def ink(path: Path) -> tuple[np.ndarray, tuple[int, ...]]:
    """The pixels that are not white, and how wide the white around them is on every side."""
    pixels = np.asarray(imread(path))
    dark = (pixels[..., :3] < 0.98).any(axis=-1)
    rows, columns = (np.flatnonzero(dark.any(axis=axis)) for axis in (1, 0))
    height, width = dark.shape
    return dark, (rows[0], height - 1 - rows[-1], columns[0], width - 1 - columns[-1])


def test_a_picture_has_the_size_of_its_figure_and_a_margin(tmp_path: Path) -> None:
    dark, margins = ink(picture(tmp_path / "a.png", lambda panel: None, save))
    pad = round((MARGIN - STYLE["figure.constrained_layout.w_pad"]) * STYLE["figure.dpi"])
    assert dark.shape == (300 + 2 * pad, 450 + 2 * pad)
    assert min(margins) >= round(MARGIN * STYLE["figure.dpi"]) - 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
@pytest.mark.parametrize(
    "change",
    [
        lambda panel: panel.text(0.5, 0.5, LONG),
        lambda panel: panel.axes[0].set_title(LONG, loc="left"),
        lambda panel: panel.axes[0].set_xlabel(LONG),
        lambda panel: panel.axes[0].set_ylabel(LONG),
        lambda panel: panel.axes[0].set_yticks([1.5], ["9" * 80]),
    ],
    ids=["figure", "title", "x", "y", "tick"],
)
def test_a_text_that_is_longer_than_its_place_is_not_cut(
    tmp_path: Path, change: Callable[[Figure], object]
) -> None:
    dark, margins = ink(picture(tmp_path / "a.png", change, save))
    assert min(margins) >= round(MARGIN * STYLE["figure.dpi"]) - 3
    expected, _ = ink(picture(tmp_path / "b.png", change, tight))
    np.testing.assert_array_equal(dark, expected)


def test_a_space_between_words_at_the_edge_hides_no_word(tmp_path: Path) -> None:
    def change(panel: Figure) -> None:
        panel.text(1.0, 0.5, "a" + " " * 200 + "b")

    expected, _ = ink(picture(tmp_path / "b.png", change, tight))
    np.testing.assert_array_equal(ink(picture(tmp_path / "a.png", change, save))[0], expected)


def test_a_long_legend_is_not_cut(tmp_path: Path) -> None:
    def change(panel: Figure) -> None:
        panel.axes[0].lines[0].set_label(LONG)
        panel.axes[0].legend().set_in_layout(False)

    dark, margins = ink(picture(tmp_path / "a.png", change, save))
    assert dark.shape[1] > 500 and min(margins) >= round(MARGIN * STYLE["figure.dpi"]) - 3
