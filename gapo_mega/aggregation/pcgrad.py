"""PCGrad, or gradient surgery: every gradient loses what conflicts with the others, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.base import cosine_matrix
from gapo_mega.aggregation.on_host import HostMethod, Solution
from gapo_mega.ops import Aggregated


@dataclass(kw_only=True)
class Pcgrad(HostMethod):
    """For each i: ``c = e_i``, then for the others j in random order: ``c_j -= (G c)_j / G_jj`` where
    ``(G c)_j < 0``; ``w`` is the sum of all ``c``.

    ``seed``: of the stream that the orders come from, together with the number of steps that the optimizer
    took, which a checkpoint holds. So all ranks draw the same, and a resumed run goes on as if it had never
    stopped. The weights depend on the order of the objectives, as in the paper.

    Source: Yu et al., arXiv 2001.06782.
    """

    name: ClassVar[str] = "pcgrad"
    in_every_audit: ClassVar[bool] = False
    symmetric: ClassVar[bool] = False

    seed: int = 0
    _steps: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: found {self.seed!r}, accepted: an integer >= 0 and < 2^31")

    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        # The generator uses the lowest 32 bits.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._steps) % 2**32)
        cosines, norms = cosine_matrix(gram), gram.diagonal().sqrt()
        weights = torch.zeros_like(norms)
        for i in range(len(norms)):
            lengths = torch.zeros_like(norms)  # c_j ||g_j|| / ||g_i||, which no scale makes overflow
            lengths[i] = 1.0
            for j in torch.randperm(len(norms), generator=generator).tolist():
                if j != i:
                    lengths[j] -= (cosines[j] @ lengths).clamp(max=0.0)
            weights += lengths * (norms[i] / norms)
        return Solution(weights)

    def commit(self, found: Aggregated) -> None:
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"steps"}:
            raise ValueError(f"aggregation {self.name}: found state {sorted(state)}, accepted: steps")
        self._steps = int(state["steps"])
