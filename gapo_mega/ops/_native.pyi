from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

max_rows: int
has_cuda: bool

def cuda_archs() -> list[str]: ...
def instruction_sets() -> list[str]: ...
def gramian(
    rows: Sequence[int],
    lengths: Sequence[int],
    dtypes: Sequence[int],
    segments: npt.NDArray[np.int64] | None,
    weights: Sequence[int],
    inverse_root: tuple[float, float] | None,
    out: int,
    threads: int,
    isa: str,
) -> None: ...
def combine(
    rows: Sequence[int],
    lengths: Sequence[int],
    dtypes: Sequence[int],
    weights: Sequence[float],
    out: Sequence[int],
    out_dtype: int,
    threads: int,
    isa: str,
) -> None: ...
def accumulate(
    rows: Sequence[int],
    coefficients: int,
    terms: int,
    dtype: int,
    count: int,
    stride: int,
    length: int,
    overwrite: bool,
    threads: int,
    isa: str,
) -> None: ...
def min_norm(gram: int, m: int, exclude_zero: bool, weights: int) -> int: ...
def duality_gap(gram: int, m: int, weights: int) -> float: ...

# These exist only if has_cuda is true.

class Probe:
    @property
    def obstacle(self) -> int: ...
    @property
    def driver(self) -> int: ...
    @property
    def runtime(self) -> int: ...
    @property
    def error(self) -> str: ...

def cuda_probe(device: int) -> Probe: ...

class Plan:
    @property
    def table(self) -> list[int]: ...

def cuda_plan(lengths: Sequence[int], segments: npt.NDArray[np.int64] | None) -> Plan: ...
def cuda_workspace_size(m: int, device: int) -> int: ...
def cuda_gramian(
    rows: Sequence[int],
    lengths: Sequence[int],
    dtypes: Sequence[int],
    weights: Sequence[int],
    inverse_root: tuple[float, float] | None,
    plan: Plan,
    table: int,
    workspace: int,
    out: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_combine(
    rows: Sequence[int],
    lengths: Sequence[int],
    dtypes: Sequence[int],
    weights: int,
    out: Sequence[int],
    out_dtype: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_min_norm(
    gram: int, m: int, exclude_zero: bool, weights: int, status: int, device: int, stream: int
) -> None: ...
