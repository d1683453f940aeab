"""The two forms of a layer's products in ``gradients.forward: one_pass``, timed side by side on one device.

``python benchmarks/one_pass_forms.py [--device cuda] [--dtype bf16]`` prints, for each shape of a weight,
number of objectives and length of sequences, the time of tiles over that of products for every row. Above 1
the latter win. ``accumulator.is_short`` is the rule that the engine follows.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from gapo_mega.engine.megatron.gradients.accumulator import Accumulator, is_short

LENGTHS = (16, 32, 48, 64, 128, 256, 512)
SHAPES = ((576, 576), (3072, 576), (576, 1536))  # of SmolLM2-135M
SEQUENCES, ROUNDS = 8, 7


class Rows:
    """Memory of all rows but the last for one parameter."""

    def __init__(self, parameter: nn.Parameter, count: int) -> None:
        self.parameters = [parameter]
        self._rows = torch.zeros(count, parameter.numel(), device=parameter.device)

    def of(self, parameter: nn.Parameter) -> Tensor:
        return self._rows


def ratio(shape: tuple[int, int], rows: int, length: int, device: torch.device, dtype: torch.dtype) -> float:
    """Median time of tiles over that of products for every row, in turns."""
    out, width = shape
    weight = nn.Parameter(torch.empty(shape, device=device), requires_grad=False)
    weight.main_grad = torch.zeros(shape, device=device)  # type: ignore[attr-defined]
    accumulator = Accumulator(Rows(weight, rows - 1))  # type: ignore[arg-type]
    accumulator.take(torch.randn(rows, SEQUENCES), device)
    input_SBI = torch.randn(length, SEQUENCES, width, device=device).to(dtype)
    grad_SBO = torch.randn(length, SEQUENCES, out, device=device).to(dtype)
    seconds: dict[str, list[float]] = {"tile": [], "row": []}
    for _ in range(ROUNDS):
        for name, form in (("tile", accumulator.linear_by_tile), ("row", accumulator.linear_by_row)):
            _wait(device)
            start = time.perf_counter()
            form(weight, input_SBI, grad_SBO, 1.0)
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return statistics.median(seconds["tile"]) / statistics.median(seconds["row"])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"{name}, {options.dtype}, {SEQUENCES} sequences; time of tiles / of products for every row;")
    print("(r): the engine takes products for every row")
    print(f"{'weight':>11} {'m':>3} " + " ".join(f"{f'T={length}':>9}" for length in LENGTHS))
    for shape in SHAPES:
        for rows in (2, 4, 8):
            cells = []
            for length in LENGTHS:
                taken = " (r)" if is_short(length, rows, device.type) else ""
                cells.append(f"{ratio(shape, rows, length, device, dtype):.2f}{taken}")
            print(f"{shape[0]:>5}x{shape[1]:<5} {rows:>3} " + " ".join(f"{cell:>9}" for cell in cells))


if __name__ == "__main__":
    main()
