"""The models that an evaluation names: where they are, and what they are called."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gapo_mega.evaluation.summary import SUMMARY_FILE, read_standing
from gapo_mega.files import local
from gapo_mega.models.huggingface import location
from gapo_mega.runs.checkpoints import CHECKPOINTS_FOLDER, checkpoint_path, complete_steps
from gapo_mega.runs.directory import EXPORT_FOLDER, MANIFEST_FILE, Manifest, read_manifest

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_MODEL, _REFERENCE = "--model", "--reference"
_RESERVED = {".", ".."}


@dataclass(frozen=True)
class NamedModel:
    """A model, and where it lies: a Hugging Face directory or a checkpoint."""

    name: str
    given: str  # as the user named it
    source: Path
    parameter: str = _MODEL


def find_models(given: Sequence[str]) -> list[NamedModel]:
    """The models of ``PATH`` or ``NAME=PATH``: directory or hub name, checkpoint, run directory.

    Of a run that has ended it takes the result: the exported model, or else the checkpoint of its step; of
    another one the newest checkpoint. Raises ``ValueError`` for what is none of these, for a run that has not
    kept its result, and for two models of one name.
    """
    if not given:
        raise ValueError(f"{_MODEL}: found none, accepted: one or more")
    found = [find_model(text) for text in given]
    twice = [name for name, count in Counter(model.name for model in found).items() if count > 1]
    if twice:
        raise ValueError(
            f"{_MODEL}: found two models called {twice[0]!r}, accepted: NAME=PATH with names that differ"
        )
    return found


def find_reference(given: str, models: Sequence[NamedModel]) -> NamedModel:
    """The model of ``models`` that is called ``given``, or else another one, by its place."""
    named = next((model for model in models if given in (model.name, model.given)), None)
    return named or find_model(given, _REFERENCE)


def find_model(text: str, parameter: str = _MODEL) -> NamedModel:
    """One model; errors as ``find_models``."""
    name, equals, path = text.partition("=")
    if not equals or os.path.exists(local(text)):  # "=" may be a character of a path
        name, path = "", text
    elif not _NAME.fullmatch(name) or name in _RESERVED:
        raise ValueError(
            f"{parameter}: found the name {name!r} in {text!r}, accepted: letters, digits, '_', '.' and '-'"
        )
    directory = local(path)
    called = name or _called(directory)
    if not os.path.isfile(directory / MANIFEST_FILE):
        return NamedModel(called, text, location.resolve(path, parameter), parameter)
    return NamedModel(called, text, location.resolve(_of_run(directory, parameter), parameter), parameter)


def _called(directory: Path) -> str:
    """A name from the last part of a path; of what a run keeps below its directory, with the run's name."""
    parts = directory.absolute().parts
    if len(parts) > 2 and parts[-2] == CHECKPOINTS_FOLDER:
        name = f"{parts[-3]}-{parts[-1]}"
    elif len(parts) > 2 and parts[-1] == EXPORT_FOLDER:
        name = parts[-2]
    else:
        name = parts[-1]
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


def _of_run(run: Path, parameter: str) -> Path:
    manifest = read_manifest(run)
    assert manifest is not None
    steps = complete_steps(run / CHECKPOINTS_FOLDER)
    # Without its end the run has gone on since it exported.
    ended = manifest.finished is not None and (not steps or steps[-1] <= manifest.finished)
    export = run / EXPORT_FOLDER
    if (ended or not steps) and (export / "config.json").is_file():
        return export
    if not steps:
        raise ValueError(
            f"{parameter}: found {run}, a run without a checkpoint or an exported model, accepted: one that "
            "has written one"
        )
    result = _result_of(run, manifest) if ended else steps[-1]
    if result not in steps:
        raise ValueError(
            f"{parameter}: found {run}, whose result is the policy of step {result}, without a checkpoint of "
            f"that step or an exported model; accepted: one of its checkpoints by its path (steps "
            f"{', '.join(map(str, steps))}), or another run"
        )
    return checkpoint_path(run / CHECKPOINTS_FOLDER, result)


def _result_of(run: Path, manifest: Manifest) -> int:
    """The step of the policy that a run has ended with: its last one, or the best of its evaluations."""
    assert manifest.finished is not None
    summary = run / SUMMARY_FILE
    standing = read_standing(summary) if summary.is_file() else None
    return manifest.finished if standing is None else standing.step
