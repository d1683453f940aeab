"""What TensorBoard's own reader finds in the event files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.logged_runs import LAST, PICTURES, finished, log_all


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = finished(tmp_path_factory.mktemp("logged"))
    log_all(directory, {"name": "tensorboard"}, resume_at=2)
    return directory


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "images": 0}).Reload()


def test_every_step_once(events: EventAccumulator) -> None:
    found = events.Scalars("reward/concise")
    assert [event.step for event in found] == [1, 2, 3, 4]
    assert [event.value for event in found] == [0.5, 1.0, 1.5, 2.0]


def text(events: EventAccumulator, tag: str) -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    (value,) = event.tensor_proto.string_val
    return str(value.decode())


def test_configuration_and_tables(run: Path, events: EventAccumulator) -> None:
    recorded = (run / "config.yaml").read_text().splitlines()
    assert text(events, "configuration").splitlines() == [f"    {line}" for line in recorded]
    summary = json.loads((run / "summary.json").read_text())
    heldout = text(events, "heldout").splitlines()
    assert len(heldout) == 2 + len(summary["objectives"])
    for line, (name, change) in zip(heldout[2:], summary["objectives"].items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == name
        assert [float(cell) for cell in cells[1:3]] == pytest.approx(
            [change["before"], change["after"]], rel=1e-5
        )
    answers = text(events, "answers").splitlines()
    assert [line.split(" | ")[0] for line in answers[2:]] == [f"| prompt {i}" for i in range(6)]


def test_the_summary_s_numbers(run: Path, events: EventAccumulator) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (event,) = events.Scalars("summary/objectives/plain/after")
    assert event.step == LAST
    assert event.value == pytest.approx(summary["objectives"]["plain"]["after"], rel=1e-6)  # float32
    assert events.Scalars("summary/seconds")[0].value == summary["seconds"]


def test_pictures_are_those_of_the_report(run: Path, events: EventAccumulator) -> None:
    for name in PICTURES:
        (event,) = events.Images(f"report/{name}")
        shown = image.imread(io.BytesIO(event.encoded_image_string))
        assert np.array_equal(shown, image.imread(run / "report" / f"{name}.png"))
