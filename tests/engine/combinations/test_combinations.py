"""The tool that sweeps all combinations: what it runs, in which order, and that it sees what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gapo_mega.models.shape import ModelShape
from tests.helpers.combinations import comparison, reporting, running
from tests.helpers.combinations.__main__ import main
from tests.helpers.combinations.comparison import Observed
from tests.helpers.combinations.reference import (
    Reference,
    directory_of,
    reference_of,
    shapes_of,
    write_models,
)
from tests.helpers.combinations.settings import AXES, Setting, combinations, parse_where
from tests.helpers.ranks import check_combination, worlds

PLAIN = {
    **{axis: values[0] for axis, values in AXES.items()},
    "distributed": "true",
    "tied": "true",
    "microbatches": "several",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("combinations")
    write_models(folder)
    yield folder
    worlds.leave()


@pytest.fixture(scope="module")
def shapes(models: Path) -> dict[str, ModelShape]:
    return shapes_of(models)


class TestSettings:
    def test_refused_in_the_project_s_own_words(self, shapes: dict[str, ModelShape]) -> None:
        """The part without sequence parallelism, tied, in fp32: counted from the rules as documented."""
        where = parse_where(
            [
                *("model=dense", "sequence_parallel=false", "tied=true", "dtype=fp32", "recompute=none"),
                *("temperature=0.7", "sampling=plain"),
            ]
        )
        found = combinations(shapes, where)
        assert found.total == 19 * 3 * 3 * 2**3 * 3 * 5 * 2 == len(found.valid) + sum(found.refused.values())
        # By what can be combined (docs/gradients.md), for one kind of microbatches.
        separate_full = 2 * 2 + 2  # rows x metric, none x metric
        separate_part = 1 + 1 + 2 * 2  # last layer, last block, two ranges of layers in either metric
        one_pass = 2  # fp32 rows of the whole gradient in either metric
        piped = separate_full + separate_part + one_pass
        one = piped + 2 * 2 + 2 + (1 + 1 + 2 * 2)  # and a shared forward
        several = piped + 2  # which then has fp32 rows of the whole gradient alone
        # Without a pipeline (4 layouts), with context ranks (2), which pack nothing, with a pipeline (3),
        # which has no shared forward, and with an interleaved one (3 and 1), which needs several
        # microbatches; for each of 5 kinds of reduction: parameters are gathered late only where the
        # optimizer is distributed and gradients are reduced early.
        kinds = 4 * (one + 2 * several) + 2 * (one + several) + 3 * 3 * piped + 3 * 2 * piped + piped
        # Instances take one kind. Two sequences of a rank are one microbatch, however they are taken.
        instances = (one + 2 * several) + 3 * one
        assert len(found.valid) == 5 * kinds + instances
        assert any("a pipeline keeps no graph" in message for message in found.refused)

    def test_where(self) -> None:
        assert parse_where(["layout=TP2", "metric=adam"]) == {"layout": "TP2", "metric": "adam"}
        with pytest.raises(ValueError, match=r"--where: found 'lay=TP2', accepted: AXIS=VALUE"):
            parse_where(["lay=TP2"])
        with pytest.raises(ValueError, match=r"--where layout: found 'TP9', accepted: single, TP2"):
            parse_where(["layout=TP9"])

    def test_the_command_names_one_combination(self, shapes: dict[str, ModelShape]) -> None:
        words = reporting.command(Setting(**PLAIN)).split()
        found = combinations(shapes, parse_where([word for word in words if "=" in word]))
        assert found.valid == [Setting(**PLAIN)] and found.total == 1


def seen_by(models: Path, **changes: str) -> tuple[Setting, Observed, Reference]:
    setting = Setting(**{**PLAIN, **changes})
    reference = reference_of(models, setting.model, setting.tied, setting.temperature, setting.sampling)
    seen = check_combination.observe(setting, directory_of(models, setting.model, setting.tied), reference)
    assert seen is not None
    return setting, seen, reference


@pytest.fixture(scope="module")
def adam(models: Path) -> tuple[Setting, Observed, Reference]:
    """A run with every check there is."""
    return seen_by(models, metric="adam")


class TestComparison:
    def test_agrees(self, adam: tuple[Setting, Observed, Reference]) -> None:
        setting, seen, reference = adam
        found = comparison.errors(setting, seen, reference)
        assert set(found) == set(comparison.CHECKS)
        assert comparison.verdict(setting, found)["worst"] <= 1.0

    @pytest.mark.parametrize(
        ("wrong", "checks"),
        [
            ({"metric": "euclidean"}, {"gram 2"}),
            ({"scope": "layers_1-2"}, {"gram 1", "gram 2"}),
            ({"scope": "layers_0,2"}, {"gram 1", "gram 2"}),
        ],
    )
    def test_another_combination_s_reference(
        self, adam: tuple[Setting, Observed, Reference], wrong: dict[str, str], checks: set[str]
    ) -> None:
        setting, seen, reference = adam
        assert checks <= failing(dataclasses.replace(setting, **wrong), seen, reference)

    @pytest.mark.parametrize(("temperature", "sampling"), [("0.7", "plain"), ("1.0", "edited")])
    def test_drawn_from_another_distribution(
        self, models: Path, adam: tuple[Setting, Observed, Reference], temperature: str, sampling: str
    ) -> None:
        setting, seen, _ = adam
        other = reference_of(models, setting.model, setting.tied, temperature, sampling)
        # Not the first loss: every reference starts from ratios to its own log-probabilities.
        assert {"gram 1", "direction 1", "gram 2", "loss 2"} <= failing(setting, seen, other)

    @pytest.mark.parametrize(
        ("part", "checks"),
        [
            ("weights", {"gram 2", "loss 2", "change 1"}),
            ("momentum", {"direction 1"}),
            ("second", {"gram 2", "second moment 1"}),
        ],
    )
    def test_one_tensor_wrong_by_a_per_cent(
        self, adam: tuple[Setting, Observed, Reference], part: str, checks: set[str]
    ) -> None:
        setting, seen, reference = adam
        name = "model.layers.1.mlp.down_proj.weight"
        held = getattr(seen, part)
        changes: dict[str, Any] = {part: {**held, name: held[name] * 1.01}}
        tampered = dataclasses.replace(seen, **changes)
        assert failing(setting, tampered, reference) == checks

    def test_parameters_that_were_not_updated(self, adam: tuple[Setting, Observed, Reference]) -> None:
        """The second step is of other parameters than the first: it would not do to skip the update."""
        setting, seen, reference = adam
        stale = dataclasses.replace(seen, weights=reference.start)
        assert {"gram 2", "loss 2"} <= failing(setting, stale, reference)

    @pytest.mark.parametrize(
        ("change", "check"),
        [
            (
                lambda r: dataclasses.replace(r, gram=r.gram * torch.tensor([[1.02, 1.01], [1.01, 1.0]])),
                "gram 1",
            ),
            (lambda r: dataclasses.replace(r, gram=r.gram * r.clip_factor**2), "gram 1"),  # after clipping
            (lambda r: dataclasses.replace(r, gram=r.gram * float("nan")), "gram 1"),
            (lambda r: dataclasses.replace(r, weights=r.weights.flip(0)), "weights 1"),
            (lambda r: dataclasses.replace(r, weights=r.weights * 1.01), "norm 1"),
            (lambda r: dataclasses.replace(r, gradient_norm=r.gradient_norm * r.clip_factor), "norm 1"),
            (lambda r: dataclasses.replace(r, losses=r.losses[::-1]), "loss 1"),
            (lambda r: dataclasses.replace(r, actual_change=[-c for c in r.actual_change]), "change 1"),
        ],
    )
    def test_a_wrong_report(
        self, adam: tuple[Setting, Observed, Reference], change: Callable[[Any], Any], check: str
    ) -> None:
        setting, seen, reference = adam
        wrong = dataclasses.replace(seen, reports=[change(seen.reports[0]), seen.reports[1]])
        assert check in failing(setting, wrong, reference)

    @pytest.mark.parametrize("scope", ["last_layer", "last_block"])
    def test_the_tied_output_layer_counts_as_output_layer_only(self, models: Path, scope: str) -> None:
        setting, seen, reference = seen_by(models, scope=scope)
        assert failing(setting, seen, reference) == set()
        both = [grads["model.embed_tokens.weight"] for grads in reference.first.full]
        first = dataclasses.replace(reference.first, head=both)
        assert comparison.gram_error(seen.reports[0].gram, first.gram(scope)) > 1e-2
        other = "last_block" if scope == "last_layer" else "last_layer"
        assert "gram 1" in failing(dataclasses.replace(setting, scope=other), seen, reference)


def failing(setting: Setting, seen: Observed, reference: Reference) -> set[str]:
    """The checks that fail."""
    allowed = comparison.tolerances(setting)
    found = comparison.errors(setting, seen, reference)
    bad = {name for name, error in found.items() if not error <= allowed[name]}
    assert bool(bad) == (comparison.verdict(setting, found)["worst"] > 1.0)
    return bad


class TestResults:
    def test_written_and_read(self, tmp_path: Path) -> None:
        file = tmp_path / "out.jsonl"
        assert running.read(file) == []
        good = running.Outcome(Setting(**PLAIN), {"gram 1": 1e-7}, 0.01, "gram 1", 0.5)
        crashed = running.Outcome(Setting(**{**PLAIN, "layout": "TP2"}), error="no such thing")
        for outcome in (good, crashed):
            running.write(file, outcome)
        assert running.read(file) == [good, crashed]
        assert not good.failed and crashed.failed

    def test_not_a_number_fails(self) -> None:
        assert running.Outcome(Setting(**PLAIN), worst=float("nan")).failed

    def test_batches_keep_the_order_and_have_one_number_of_ranks(self) -> None:
        settings = [Setting(**{**PLAIN, "layout": layout}) for layout in AXES["layout"]] * 3
        batches = running.batches(settings, size=len(AXES["layout"]))
        assert [len(batch) for batch in batches] == [1, 8, 10] * 3
        assert [setting.layout for batch in batches[:3] for setting in batch] == list(AXES["layout"])

    def test_table_and_command(self) -> None:
        setting = Setting(**PLAIN)
        bad = running.Outcome(setting, {"gram 1": 3e-5}, 3.0, "gram 1", 0.5)
        text = reporting.table([bad, running.Outcome(setting, error="crash")])
        (line,) = [line for line in text.splitlines() if line.startswith("layout") and "single" in line]
        assert line.split() == ["layout", "single", "2", "2", "inf"]
        assert "gram 1: error 3e-05, accepted 1e-05" in reporting.failure(bad)
        assert reporting.failure(bad).startswith(
            "FAILED python -m tests.helpers.combinations --where model=dense "
        )


class TestCommand:
    """With a file that has all that is asked for, nothing is launched."""

    WORDS = reporting.command(Setting(**PLAIN)).split()[3:]

    @pytest.mark.parametrize(("worst", "status"), [(0.9, 0), (1.1, 1)])
    def test_the_file_is_resumed_and_decides_the_status(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], worst: float, status: int
    ) -> None:
        file = tmp_path / "out.jsonl"
        running.write(file, running.Outcome(Setting(**PLAIN), {"gram 1": worst * 1e-5}, worst, "gram 1", 0.5))
        running.write(file, running.Outcome(Setting(**{**PLAIN, "layout": "DP2"}), error="not asked for"))
        before = file.read_text()
        assert main([*self.WORDS, "--out", str(file)]) == status
        printed = capsys.readouterr().out
        assert f"1 of 1 combinations run, {status} failed" in printed and "not asked for" not in printed
        assert (reporting.command(Setting(**PLAIN)) in printed) == bool(status)
        assert file.read_text() == before

    def test_nothing_was_run(self) -> None:
        """No time, and other ranks than the layout's."""
        assert main([*self.WORDS, "--limit-minutes", "0"]) == 1
        assert main([*self.WORDS, "--ranks", "2,4"]) == 1

    @pytest.mark.parametrize("words", [["--where", "layout=TP9"], ["--ranks", "3"], ["--ranks", "two"]])
    def test_a_mistake_is_told(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2 and words[0] in capsys.readouterr().err


class FakeLaunch:
    """One that ends, or hangs, once it has given ``count`` results."""

    def __init__(self, jobs: int, count: int, hangs: bool) -> None:
        self.order = list(reversed(range(jobs)))
        self._count, self._hangs = count, hangs

    def results(self) -> list[dict[str, Any]]:
        line = {"result": {"errors": {"gram 1": 1e-7}, "worst": 0.01, "check": "gram 1"}, "seconds": 0.5}
        return [line] * min(self._count, len(self.order))

    def runs(self, seconds: float) -> bool:
        return self._hangs and self._count < len(self.order)

    def stop(self) -> None:
        self._hangs = False

    def report(self) -> str:
        return "exit codes [-11]"


@pytest.mark.parametrize(("hangs", "reason"), [(False, "the ranks ended"), (True, "no end within 0 s")])
def test_a_launch_that_dies_costs_one_combination(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hangs: bool, reason: str
) -> None:
    """What it was at is told of; the others run in a new launch."""
    sizes: list[int] = []

    def start(ranks: int, jobs: list[Any], folder: Path) -> FakeLaunch:
        assert ranks == 2
        sizes.append(len(jobs))
        return FakeLaunch(len(jobs), count=2, hangs=hangs)

    monkeypatch.setattr(running, "start", start)
    monkeypatch.setattr(running, "STALL_SECONDS", 0.0)
    outcomes: list[running.Outcome] = []
    settings = [Setting(**{**PLAIN, "layout": "TP2", "scope": scope}) for scope in AXES["scope"]]
    running.Sweep(tmp_path, outcomes.append, seconds=60).run(settings, workers=1)
    assert sizes == [5, 2]
    # The launch's own order, and within what is left of it again.
    ordered = [settings[index] for index in (4, 3, 2, 0, 1)]
    assert [outcome.setting for outcome in outcomes] == ordered
    assert [outcome.failed for outcome in outcomes] == [False, False, True, False, False]
    assert str(outcomes[2].error).startswith(reason) and "exit codes [-11]" in str(outcomes[2].error)
