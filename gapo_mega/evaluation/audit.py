"""What every aggregation method would have done in a run: read from its log, nothing is trained.

Each step's norms and cosines give its Gram matrix back, and a method is a function of that alone. Methods
differ in the length of their direction, so what is compared is the change that a step of *unit* length
promises an objective relative to its steepest one: the cosine of the direction with its gradient.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from gapo_mega.aggregation import Aggregator, Diagnosis, build, diagnose, methods
from gapo_mega.aggregation.gapo import Gapo
from gapo_mega.config import Config, GradientConfig
from gapo_mega.config.loading import load
from gapo_mega.evaluation.audit_plot import Curve, write_picture
from gapo_mega.evaluation.report import CONFIG_FILE
from gapo_mega.evaluation.series import METRICS_FILE, Array
from gapo_mega.registry import unknown

# Steps from which on the wait is worth a progress bar.
MANY_STEPS = 1000
# Options that methods are shown with besides the run's own; {} are the defaults.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {"gapo": ({"p": 1.0}, {"p": 2.0})}
# Left out, this option of a method has the same number for every objective.
EQUAL_WHEN_LEFT_OUT = {"p_gapo": "preference", "weighted_sum": "weights"}
# Of a sum of terms of either sign: what is below this share of their size is rounding.
_ROUNDING = 1e-12
# The log's norms and cosines hold the Gram matrix up to a few units in the last place.
_AGREEMENT = 1e-9

_LEGEND = (
    "share: w over the sum of |w|. cosine: of the direction with the objective's gradient, the change that a "
    "step of unit length promises; over the steps. hurt: steps where it is negative. conflict: steps that "
    "hurt an objective, and which one most often. corner: steps with weight 0 for an objective that has a "
    "gradient. All of it is to first order and along this run: another method would have led elsewhere."
)


@dataclass(frozen=True)
class Recording:
    """What ``metrics.jsonl`` holds of S steps with M objectives."""

    names: list[str]
    steps: list[int]
    left_out: list[int]  # steps without finite gradients, or that the run skipped for another reason
    grams: Tensor  # [S, M, M] float64
    weights: Array  # [S, M] as logged


@dataclass(frozen=True)
class Candidate:
    """A method with its options; ``note`` is what a reader should know about them."""

    label: str
    aggregator: Aggregator
    note: str


@dataclass(frozen=True)
class Verdict:
    """What one method does at each of S steps to M objectives."""

    candidate: Candidate
    weights: Array  # [S, M]
    predicted_change: Array  # [S, M] (G w)_i
    cosines: Array  # [S, M]; 0 where the direction or the gradient is zero
    direction_norms: Array  # [S]
    hurt: NDArray[np.bool_]  # [S, M]
    corner: NDArray[np.bool_]  # [S]

    @property
    def conflict(self) -> NDArray[np.bool_]:
        """Steps that hurt an objective."""
        return np.asarray(self.hurt.any(axis=1))

    @property
    def shares(self) -> Array:
        """Weights whose absolute values sum to 1; 0 where all are 0."""
        total = np.abs(self.weights).sum(axis=1, keepdims=True)
        shares: Array = self.weights / np.where(total == 0, 1.0, total)
        return shares


@dataclass(frozen=True)
class Audit:
    """The verdicts on every method, the run's own first unless it was not asked for."""

    recording: Recording
    gradients: GradientConfig
    verdicts: list[Verdict]
    warning: str | None  # where the log's weights are not those of the run's own method


def run_audit(
    run_dir: Path, only: Sequence[str] = (), out: Path | None = None, console: Console | None = None
) -> None:
    """Audit the run in ``run_dir``: ``audit.csv`` and ``audit.png`` into ``out``, a table to ``console``.

    ``out`` is ``run_dir/audit`` if left out; ``only`` names the methods to show, all if empty. Raises
    ``ValueError`` for what cannot be read, asked or written.
    """
    console = console or Console()
    audit = audit_run(run_dir, only)
    directory = run_dir / "audit" if out is None else out
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_csv(audit, directory / "audit.csv")
        write_picture(directory / "audit.png", *curves(audit))
    except OSError as error:
        raise ValueError(
            f"--out: cannot write to {directory} ({error.strerror}), accepted: a directory to write to"
        ) from None
    print_audit(audit, run_dir.resolve().name, console)
    # A path must stay in one piece to be copied.
    for file in ("audit.csv", "audit.png"):
        console.print(f"wrote {directory / file}", soft_wrap=True, markup=False, highlight=False)


def audit_run(run_dir: Path, only: Sequence[str] = ()) -> Audit:
    """Ask every method, or those in ``only``, what it would have done at each step of ``run_dir``."""
    for name in only:
        if name not in methods():
            raise ValueError(unknown("--method", name, sorted(methods())))
    if not run_dir.is_dir():
        raise ValueError(f"run directory: {run_dir} not found, accepted: a directory that a run has written")
    config = load(run_dir / CONFIG_FILE)
    recording = read_recording(run_dir, [objective.name for objective in config.objectives])
    own, *others = candidates(config)
    wanted = [c for c in others if not only or c.aggregator.name in only]
    verdicts = judge([own, *wanted], recording)
    warning = disagreement(verdicts[0], recording)
    if only and own.aggregator.name not in only:
        verdicts = verdicts[1:]
    return Audit(recording, config.gradients, verdicts, warning)


def read_recording(run_dir: Path, names: Sequence[str]) -> Recording:
    """Every step's Gram matrix and weights. Raises ``ValueError`` where there are none."""
    path = run_dir / METRICS_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    # The last line of a run that is writing it right now is not complete.
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    rows = [_row(line, f"{path}: line {number}") for number, line in enumerate(lines, 1)]
    for row in rows:
        _check(row, names, path)
    usable = [(row, gram) for row in rows if (gram := _gram(row, names)) is not None]
    if not usable:
        raise ValueError(
            f"run directory: found {len(rows)} steps in {path}, none of them with finite gradients, "
            "accepted: a directory that a run has written"
        )
    steps = [int(row["step"]) for row, _ in usable]
    return Recording(
        names=list(names),
        steps=steps,
        left_out=sorted({int(row["step"]) for row in rows} - set(steps)),
        grams=torch.stack([gram for _, gram in usable]),
        weights=np.array([[row[f"weight/{name}"] for name in names] for row, _ in usable], dtype=float),
    )


def _row(line: str, place: str) -> dict[str, Any]:
    """A step's metrics. Raises ``ValueError`` for anything else."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not _is_number(row.get("step")):
        raise ValueError(f"{place}: found {line.strip()[:60]!r}, accepted: a JSON object with a step")
    return row


def _check(row: dict[str, Any], names: Sequence[str], path: Path) -> None:
    """Norms and cosines are there and what they can be, or null; weights are numbers, or null."""
    most = 1 + 1e-6  # a logged cosine is rounded
    limits = {
        **{f"grad_norm/{name}": (0.0, math.inf) for name in names},
        **{f"weight/{name}": (-math.inf, math.inf) for name in names},
        **{f"cosine/{a}/{b}": (-most, most) for a, b in combinations(names, 2)},
    }
    for key, (least, greatest) in limits.items():
        if key not in row:
            raise ValueError(
                f"{path}: step {row['step']} has no {key!r}, accepted: the metrics of every objective "
                f"in {CONFIG_FILE} ({', '.join(names)})"
            )
        value = row[key]
        if value is not None and not (_is_number(value) and least <= value <= greatest):
            raise ValueError(
                f"{path}: step {row['step']}: found {key} {value!r}, accepted: a number"
                + (f" from {least:.0f} to {greatest:.0f}" if math.isfinite(least) else "")
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _gram(row: dict[str, Any], names: Sequence[str]) -> Tensor | None:
    """``G_ij = ||g_i|| ||g_j|| cos_ij``; None for a skipped step, which has no weights to compare with."""
    norms = [row[f"grad_norm/{name}"] for name in names]
    if row.get("skipped") or None in norms:
        return None
    gram = torch.diag(torch.tensor(norms, dtype=torch.float64) ** 2)
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        if norms[i] == 0 or norms[j] == 0:
            continue  # their cosine is null
        cosine = row[f"cosine/{a}/{b}"]
        if cosine is None:
            return None
        gram[i, j] = gram[j, i] = norms[i] * cosine * norms[j]
    return gram


def candidates(config: Config) -> list[Candidate]:
    """The run's own method with its options, then all others with their defaults."""
    given = config.aggregation
    own = build(given.name, **given.options)
    found = [Candidate(_label(own, given.options), own, _note(given.name, given.options, "this run"))]
    for name in sorted(methods()):
        variants = VARIANTS.get(name, () if name == given.name else ({},))
        for options in variants:
            aggregator = build(name, **options)
            if not _same_direction(aggregator, own):
                found.append(Candidate(_label(aggregator, options), aggregator, _note(name, options)))
    return found


def _same_direction(a: Aggregator, b: Aggregator) -> bool:
    """Alike but for the length of the direction and what happens to zero gradients."""
    if type(a) is not type(b):
        return False
    plain: dict[str, Any] = {"scale": "none", "zero_gradient": "exclude"}
    return replace(a, **plain) == replace(b, **plain)


def _label(aggregator: Aggregator, options: dict[str, Any]) -> str:
    if isinstance(aggregator, Gapo):
        options = {"p": aggregator.p, **options}  # what gapo does hinges on it
    shown = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items()
    ]
    return " ".join([aggregator.name, *shown])


def _note(name: str, options: dict[str, Any], *notes: str) -> str:
    option = EQUAL_WHEN_LEFT_OUT.get(name)
    if option is not None and options.get(option) is None:
        notes = (*notes, f"equal {option}")
    return ", ".join(notes)


def judge(asked: Sequence[Candidate], recording: Recording) -> list[Verdict]:
    """Every candidate at every step, in the order of the steps: a method may remember earlier ones."""
    weights: list[list[Tensor]] = [[] for _ in asked]
    found: list[list[Diagnosis]] = [[] for _ in asked]
    steps = tqdm(recording.grams, desc="audit", unit="step", disable=len(recording.steps) < MANY_STEPS)
    for step, gram in zip(recording.steps, steps, strict=True):
        for index, candidate in enumerate(asked):
            try:
                answer = candidate.aggregator.weigh_or_raise(gram)
            except ValueError as error:
                raise ValueError(f"step {step}, {candidate.label}: {error}") from error
            candidate.aggregator.commit(answer)
            weights[index].append(answer.weights)
            found[index].append(diagnose(gram, answer.weights))
    return [_verdict(*parts) for parts in zip(asked, weights, found, strict=True)]


def _verdict(candidate: Candidate, weights: Sequence[Tensor], found: Sequence[Diagnosis]) -> Verdict:
    count = len(weights[0])
    return Verdict(
        candidate=candidate,
        weights=torch.stack(list(weights)).numpy(),
        predicted_change=torch.stack([d.predicted_change for d in found]).numpy(),
        cosines=torch.stack([_cosines(d, w) for d, w in zip(found, weights, strict=True)]).numpy(),
        direction_norms=np.array([d.direction_norm for d in found]),
        hurt=np.array([[i in d.hurt for i in range(count)] for d in found]),
        corner=np.array([d.corner for d in found]),
    )


def _cosines(diagnosis: Diagnosis, weights: Tensor) -> Tensor:
    """``(G w)_i / (||d|| ||g_i||)``, the cosine between the direction and every gradient."""
    norms = diagnosis.norms
    slopes = torch.where(norms > 0, diagnosis.predicted_change / norms, 0.0)
    # sqrt(w'Gw) has half the digits where gradients cancel; ||d|| >= |<d, g_i>| / ||g_i|| has them all.
    length = max(diagnosis.direction_norm, float(slopes.abs().max()))
    if length <= _ROUNDING * float((norms * weights.abs()).sum()):
        return torch.zeros_like(norms)
    return slopes / length


def disagreement(own: Verdict, recording: Recording) -> str | None:
    """A warning where the run's own method gives other weights than the log has.

    Compared is what the difference changes, ``G (w - w')`` in units of the gradients: of gradients that
    are nearly parallel the weights may differ by far more than rounding while the direction does not.
    """
    difference = torch.from_numpy(own.weights - recording.weights)
    norms = recording.grams.diagonal(dim1=1, dim2=2).sqrt()
    effect = (recording.grams @ difference[:, :, None])[:, :, 0].abs() / torch.where(norms > 0, norms, 1.0)
    reach = (norms * torch.from_numpy(np.abs(own.weights) + np.abs(recording.weights))).sum(dim=1)
    apart = effect.amax(dim=1) / torch.where(reach > 0, reach, 1.0)
    # Not "apart > ...": a weight that the log has as null is NaN here.
    wrong = int((~(apart <= _AGREEMENT)).sum())
    if wrong == 0:
        return None
    step = int(apart.nan_to_num(nan=math.inf).argmax())
    objective = int((norms * difference.abs())[step].nan_to_num(nan=math.inf).argmax())
    return (
        f"at {wrong} of {len(recording.steps)} steps the logged weights are not those of "
        f"{own.candidate.label}; the largest difference: step {recording.steps[step]}, "
        f"{recording.names[objective]}, logged {recording.weights[step, objective]:.10g}, recomputed "
        f"{own.weights[step, objective]:.10g} (another version, or {CONFIG_FILE} was edited)"
    )


def curves(audit: Audit) -> tuple[list[str], Array, list[Curve]]:
    """Objectives, all steps of the run, and one curve a method with NaN at the steps left out."""
    recording = audit.recording
    steps = np.array(sorted([*recording.steps, *recording.left_out]), dtype=float)
    places = np.searchsorted(steps, recording.steps)
    found = []
    for verdict in audit.verdicts:
        cosines = np.full((len(steps), len(recording.names)), math.nan)
        cosines[places] = verdict.cosines
        hurt = verdict.hurt.mean(axis=0)
        found.append(Curve(verdict.candidate.label, cosines, hurt, float(verdict.conflict.mean())))
    return recording.names, steps, found


def write_csv(audit: Audit, path: Path) -> None:
    """One line per step and method, every number in full precision."""
    names = audit.recording.names
    kinds = ("weight", "predicted_change", "cosine", "hurt")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        columns = [f"{kind}/{name}" for kind in kinds for name in names]
        writer.writerow(["step", "method", "conflict", "corner", "direction_norm", *columns])
        for index, step in enumerate(audit.recording.steps):
            for v in audit.verdicts:
                facts = [int(v.conflict[index]), int(v.corner[index]), float(v.direction_norms[index])]
                numbers = [*v.weights[index], *v.predicted_change[index], *v.cosines[index]]
                hurt = [int(x) for x in v.hurt[index]]
                writer.writerow([step, v.candidate.label, *facts, *map(float, numbers), *hurt])


def print_audit(audit: Audit, title: str, console: Console) -> None:
    """The table, what its columns mean, and what was found on the way."""
    console.print(audit_table(audit, title))
    for line in (_LEGEND, *_origin(audit)):
        console.print(line, style="dim", markup=False, highlight=False)
    if audit.warning is not None:
        console.print(f"warning: {audit.warning}", style="yellow", markup=False, highlight=False)


def _origin(audit: Audit) -> list[str]:
    """Where the numbers come from."""
    gradients, recording = audit.gradients, audit.recording
    lines = [
        f"Inner products as the run measured them: metric {gradients.metric}, scope {gradients.scope}, "
        f"store {gradients.store} ({gradients.store_dtype})."
    ]
    if gradients.metric == "adam":
        lines.append("Metric adam: norms, cosines and changes are weighted by 1 / (sqrt(v) + eps) of Adam.")
    if gradients.scope != "full":
        lines.append("Only the parameters in scope are seen; the update was of all.")
    if recording.left_out:
        count = len(recording.left_out)
        lines.append(f"Left out: {count} of {count + len(recording.steps)} steps, skipped by the run.")
    return lines


def audit_table(audit: Audit, title: str) -> Table:
    """One row a method, with a line for every objective in it."""
    names = audit.recording.names
    table = Table(
        title=f"{escape(title)}: every method, asked at each step ({len(audit.recording.steps)})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_lines=True,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", style="bold", overflow="fold", min_width=16)
    table.add_column("objective", overflow="fold")
    for column in ("share", "cosine\nmean", "cosine\nlowest", "hurt", "conflict", "corner"):
        table.add_column(column, justify="right", no_wrap=True)
    for verdict in audit.verdicts:
        candidate = verdict.candidate
        note = f"\n[not bold dim]{escape(candidate.note)}[/]" if candidate.note else ""
        table.add_row(
            escape(candidate.label) + note,
            "\n".join(escape(name) for name in names),
            "\n".join(f"{share:.3f}" for share in verdict.shares.mean(axis=0)),
            "\n".join(_signed(cosine) for cosine in verdict.cosines.mean(axis=0)),
            "\n".join(_signed(cosine) for cosine in verdict.cosines.min(axis=0)),
            "\n".join(f"{hurt:.1%}" for hurt in verdict.hurt.mean(axis=0)),
            _conflict(verdict, names),
            f"{verdict.corner.mean():.1%}",
        )
    return table


def _signed(cosine: float) -> str:
    text = f"{cosine:+.3f}"
    return f"[red]{text}[/red]" if cosine < -0.0005 else text  # -0.000 is rounding or hardly more


def _conflict(verdict: Verdict, names: Sequence[str]) -> str:
    share = f"{verdict.conflict.mean():.1%}"
    if not verdict.conflict.any():
        return share
    worst = names[int(verdict.hurt.sum(axis=0).argmax())]
    return f"[red]{share}[/red]\n{escape(worst)}"
