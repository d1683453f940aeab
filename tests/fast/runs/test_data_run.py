"""How held-out items are cut into forward passes over data ranks, and rows are tokenised once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gapo_mega.data import encoding, sequences, token_cache
from gapo_mega.runs import fingerprints
from gapo_mega.runs.data_run import DataRun
from tests.helpers.fake_engine import FakeEngine, layout
from tests.helpers.supervised_runs import KINDS, Learner, prepared, write_inputs


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_item_counts_once(count: int, ranks: int, size: int, in_step: bool) -> None:
    """Ranks that share experts take equally many passes, of which some do not count."""
    passes = []
    for rank in range(ranks):
        place = replace(layout(rank, ranks, ranks), in_step=in_step)
        run: Any = SimpleNamespace(engine=FakeEngine(place), config=SimpleNamespace(micro_batch_size=size))
        passes.append(list(DataRun._own(run, count, [10 - i for i in range(count)])))
    assert sorted(i for own in passes for items, counts in own if counts for i in items) == list(range(count))
    assert all(0 < len(items) <= size for own in passes for items, _ in own)
    if in_step:
        assert len({len(own) for own in passes}) == 1
    else:
        assert all(counts for own in passes for _, counts in own)


@pytest.mark.parametrize(("kinds", "name"), list(zip(KINDS, ("chats", "pairs", "answers"), strict=True)))
def test_the_next_start_reads_the_tokens_of_the_first(
    kinds: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (token_cache, sequences):
        monkeypatch.setattr(module, "PIECE", 16)
    monkeypatch.setenv("GAPO_MEGA_CACHE", str(tmp_path / "cache"))
    inputs = write_inputs(tmp_path / "inputs")

    def rows(directory: Path) -> object:
        run = prepared(kinds, inputs, directory, Learner(), monkeypatch)
        run.session.close()
        return [fingerprints.of_rows(found) for found in run._rows()]

    first = rows(tmp_path / "a")
    assert len(list((tmp_path / "cache" / name).iterdir())) == 3  # of 36 rows; four are held out
    tokenised: list[str] = []
    tokenise = encoding._tokenized

    def noted(tokenizer: Any, texts: list[str], offsets: bool = False) -> Any:
        tokenised.extend(texts)
        return tokenise(tokenizer, texts, offsets)

    monkeypatch.setattr(encoding, "_tokenized", noted)
    assert rows(tmp_path / "b") == first
    assert len(tokenised) <= 16  # of held-out rows, which are too few for a file
