"""The phases of a run in which it is disturbed, by the functions of the package that they are in."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """``module:function`` is where it begins; it ends when that function returns.

    ``main_only``: only rank 0 comes there. ``timed``: so long that its places are milliseconds, not events.
    ``background``: only of runs that write checkpoints while they train. ``threaded``: in a thread of
    its own.
    """

    name: str
    entries: tuple[str, ...]
    main_only: bool = False
    timed: bool = False
    background: bool = False
    threaded: bool = False


_ENGINE = "gapo_mega.engine.megatron"
_GRADIENTS = f"{_ENGINE}.gradients"

PHASES = (
    Phase("rollout", ("gapo_mega.rollout.collect:Collector.collect",)),
    Phase("score", ("gapo_mega.rollout.score:Scorer.score", "gapo_mega.rollout.score:Scorer.agreed_scores")),
    Phase("backward", (f"{_GRADIENTS}.kept_rows:Shards.measure", f"{_GRADIENTS}.one_pass:OnePass.measure")),
    # Inner products, the method's weights, and the combination in the gradient buffer.
    Phase("combine", (f"{_GRADIENTS}.kept_rows:Shards.direction",)),
    Phase("optimizer", (f"{_ENGINE}.model.optimizer:Trainable.step",)),
    Phase("checkpoint write", ("gapo_mega.runs.loop:RunLoop._save",)),
    # Flushed, listed with checksums and renamed; then older ones go.
    Phase(
        "checkpoint rename",
        (
            "gapo_mega.runs.checkpoints:CheckpointFolder._complete",
            "gapo_mega.runs.checkpoints:CheckpointFolder._remove_old",
        ),
        main_only=True,
    ),
    # Files of a checkpoint while training goes on, and their index, which all ranks make of them.
    Phase(
        "background write",
        (f"{_ENGINE}.checkpoint.background:BackgroundSave._write",),
        background=True,
        threaded=True,
    ),
    Phase("background index", (f"{_ENGINE}.checkpoint.background:BackgroundSave.finish",), background=True),
    Phase("log write", ("gapo_mega.runs.log:RunLog.write",), main_only=True),
    Phase("export", (f"{_ENGINE}.engine:MegatronEngine.export_hf",)),
    Phase("report", ("gapo_mega.evaluation.report:write_report",), main_only=True, timed=True),
    # Leftovers go, the configuration is written, the checkpoint is loaded, the log is cut.
    Phase(
        "resume",
        (
            "gapo_mega.runs.session:Session.begin",
            "gapo_mega.runs.loop:RunLoop._resume",
            "gapo_mega.runs.log:RunLog.truncate_after",
            "gapo_mega.runs.cut_lines:keep_cut_lines",
        ),
    ),
)
BY_NAME = {phase.name: phase for phase in PHASES}
TIMED = [phase.name for phase in PHASES if phase.timed]
THREADED = [phase.name for phase in PHASES if phase.threaded]


def of_runs(background: bool) -> tuple[Phase, ...]:
    """Those of a run; ``background``: one that writes checkpoints while it trains."""
    return tuple(phase for phase in PHASES if background or not phase.background)


def first(background: bool) -> tuple[str, ...]:
    """Those of an undisturbed run; a run that goes on has the last one, too."""
    return tuple(phase.name for phase in of_runs(background)[:-1])


def places() -> dict[str, dict[str, str]]:
    """Phase by the end of the file's name and the function's name. Raises where a function is not there."""
    found: dict[str, dict[str, str]] = {}
    for phase in PHASES:
        for entry in phase.entries:
            module, _, path = entry.partition(":")
            inner: object = importlib.import_module(module)
            for part in path.split("."):
                inner = getattr(inner, part)
            code = inner.__code__  # type: ignore[attr-defined]
            file = "/" + module.replace(".", "/") + ".py"
            assert code.co_filename.endswith(file), code.co_filename
            found.setdefault(code.co_name, {})[file] = phase.name
    return found
