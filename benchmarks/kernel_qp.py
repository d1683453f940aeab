"""The minimum-norm point of small Gram matrices: time of a call, and how well the answer fulfils the
optimality conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from kernel_contenders import MGDA, OURS, UPGRAD, torchjd
from kernel_timing import Clock, Contender, nothing, time_rounds
from torch import Tensor

from gapo_mega import ops
from gapo_mega.ops import _native

SEEDS = 10
SOLVER = "ours, solver alone"
DEVICE = "ours, on the device"


def grams(m: int, seed: int) -> dict[str, Tensor]:
    """Gram matrices by family: generic ones, and two that are hard for solvers."""
    generator = torch.Generator().manual_seed(1000 * m + seed)
    generic = torch.randn(m, max(2, m // 2 + seed % m), generator=generator, dtype=torch.float64)
    scales = 10 ** (8 * torch.rand(m, 1, generator=generator, dtype=torch.float64))
    repeated = torch.randint(m, (m,), generator=generator)
    rows = {
        "generic": generic,
        "norm ratios to 1e8": generic * scales,
        "duplicated rows": (generic * scales)[repeated],
    }
    found = {family: matrix @ matrix.T for family, matrix in rows.items()}
    return {family: (gram + gram.T) / 2 for family, gram in found.items()}


def residual(gram: Tensor, weights: Tensor) -> float:
    """Largest violation of (Gw)_i = w'Gw (support) or >= (elsewhere), over the sizes of the summands.

    The arithmetic is rational, so that this is the solver's error alone. Infinite for weights off the
    simplex.
    """
    g = [[Fraction(x) for x in row] for row in gram.tolist()]
    numbers = weights.tolist()
    if not all(math.isfinite(x) for x in numbers):
        return math.inf
    w = [Fraction(x) for x in numbers]
    total = sum(w, Fraction(0))
    if min(w) < 0 or abs(total - 1) > Fraction(1, 10**12):
        return math.inf
    w = [x / total for x in w]
    y = [sum((a * b for a, b in zip(row, w, strict=True)), Fraction(0)) for row in g]
    level = sum((a * b for a, b in zip(w, y, strict=True)), Fraction(0))
    worst = Fraction(0)
    for i, row in enumerate(g):
        size = sum((abs(a) * b for a, b in zip(row, w, strict=True)), abs(level))
        if size:
            excess = (y[i] - level) / size
            worst = max(worst, abs(excess) if w[i] else -excess)
    return float(worst)


def _solver_alone(gram: Tensor) -> Tensor:
    weights = torch.empty(len(gram), dtype=torch.float64)
    _native.min_norm(gram.data_ptr(), len(gram), False, weights.data_ptr())
    return weights


def _solver_calls(matrices: Sequence[Tensor]) -> Callable[[], None]:
    """The compiled function without what surrounds it in ``ops.min_norm``."""
    weights = torch.empty(len(matrices[0]), dtype=torch.float64)
    m, addresses = len(weights), [gram.data_ptr() for gram in matrices]

    # The parameter keeps the memory behind the addresses alive as long as this call.
    def run(memory: object = (weights, matrices), target: int = weights.data_ptr()) -> None:
        for address in addresses:
            _native.min_norm(address, m, False, target)

    return run


def _calls(solver: Callable[[Tensor], Tensor], matrices: Sequence[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for gram in matrices:
            solver(gram)

    return run


def _device_calls(matrices: Sequence[Tensor]) -> Callable[[], None]:
    weights = torch.empty(len(matrices[0]), dtype=torch.float64, device=matrices[0].device)
    status = torch.empty(1, dtype=torch.int32, device=matrices[0].device)

    def run() -> None:
        for gram in matrices:
            ops.min_norm_(weights, status, gram)

    return run


def _on_device(gram: Tensor) -> Tensor:
    weights = torch.empty(len(gram), dtype=torch.float64, device=gram.device)
    ops.min_norm_(weights, torch.empty(1, dtype=torch.int32, device=gram.device), gram)
    return weights


def measure(
    m: int, device: str, clock: Clock, rounds: int, on_round: Callable[[], Any] = nothing
) -> list[dict[str, Any]]:
    """A record per family and contender: ``seconds`` of one call, ``residual`` of the worst answer.

    UPGrad's weights solve another problem: they have no residual here.
    """
    records: list[dict[str, Any]] = []
    problems = [grams(m, seed) for seed in range(SEEDS)]
    for family in problems[0]:
        matrices = [problem[family].to(device) for problem in problems]
        solvers: dict[str, Callable[[Tensor], Tensor]] = {}
        contenders = []
        if device == "cuda":
            solvers[DEVICE] = _on_device
            contenders.append(Contender(DEVICE, "ours", _device_calls(matrices)))
        else:
            solvers = {OURS: ops.min_norm, SOLVER: _solver_alone}
            contenders.append(Contender(OURS, "ours", _calls(ops.min_norm, matrices)))
            contenders.append(Contender(SOLVER, "ours", _solver_calls(matrices)))
        for label, name in ((MGDA, "MGDAWeighting"), (UPGRAD, "UPGradWeighting")):
            weighting = torchjd(name)
            if weighting is not None:
                solvers[label] = weighting
                contenders.append(Contender(label, "peer", _calls(weighting, matrices)))
        times = time_rounds(contenders, clock, rounds, on_round=on_round)
        for name, seconds in times.medians().items():
            record = {"rows": m, "family": family, "contender": name, "seconds": seconds / SEEDS}
            record["round_seconds"] = [value / SEEDS for value in times.seconds[name]]
            if name != UPGRAD:
                record["residual"] = max(residual(g, solvers[name](g)) for g in matrices)
            records.append(record)
        for name, why in times.failed.items():
            records.append({"rows": m, "family": family, "contender": name, "failed": why})
    return records
