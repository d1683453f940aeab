"""What wandb keeps of a run without a network; its client is a process of its own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from gapo_mega import optional
from gapo_mega.config import LoggingConfig
from gapo_mega.runs.log import RunLog
from tests.helpers.logged_runs import PICTURES, finished, log_all

pytestmark = pytest.mark.skipif(not optional.wandb().usable, reason="wandb is not installed")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_a_resumed_run_is_the_same_one(tmp_path: Path) -> None:
    config = LoggingConfig(wandb=True, tensorboard=False, progress=False)
    for done, last in ((0, 2), (2, 3)):
        with RunLog(tmp_path, ["a"], config, total_steps=3) as log:
            log.truncate_after(done)
            for step in range(done + 1, last + 1):
                log.write(step, {"reward/a": 0.1 * step})
        if done == 0:
            first = (tmp_path / "wandb_id").read_text()
    assert (tmp_path / "wandb_id").read_text() == first
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*{first}"))) == 2


def test_everything_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = finished(tmp_path)
    log_all(directory, {"name": "wandb", "options": {"project": "tests", "group": "g"}})
    assert [record for record in caplog.records if record.name.startswith("gapo_mega")] == []
    importlib.import_module("wandb").teardown()  # its process writes the last bytes when it ends
    (run,) = (directory / "wandb").glob("offline-run-*")
    media = run / "files" / "media"
    (heldout,) = media.glob("table/heldout_*.json")
    table = json.loads(heldout.read_text())
    assert table["columns"][:3] == ["objective", "before", "after"]
    assert [row[0] for row in table["data"]] == ["concise", "plain"]
    assert list(media.glob("table/answers_*.json"))
    for name in PICTURES:
        (picture,) = media.glob(f"images/report/{name}_*.png")
        assert picture.read_bytes() == (directory / "report" / f"{name}.png").read_bytes()
    (page,) = media.glob("html/report/page_*.html")
    assert "<p>The report.</p>" in page.read_text()
    (records,) = run.glob("run-*.wandb")
    content = records.read_bytes()  # the settings, and the numbers of the summary
    for text in (b"gapo_mega.demo.rewards:concise", b"summary/objectives/plain/after", b"reward/concise"):
        assert text in content
