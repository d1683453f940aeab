"""The compute type for ``make demo``: ``python -m gapo_mega.demo.dtype`` prints ``bf16`` or ``fp32``.

The flags of a processor do not tell. Some multiply bf16 several times faster than fp32, others have the
instructions and are slower with them, and some emulate them. So it times one product in each type.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

# Tokens, inputs and outputs of a matrix product of the demo's model.
_SIZES = 256, 576, 1536
_SECONDS = 0.5  # after which no further turn begins; two of each run before
_MOST_TURNS = 20
# bf16 costs elsewhere what it saves in products: norms, softmax and optimizer work in fp32.
_WORTH = 0.9


def choose(seconds: Mapping[str, float]) -> str:
    """``bf16`` if its product is clearly faster, else ``fp32``."""
    return "bf16" if seconds["bf16"] < _WORTH * seconds["fp32"] else "fp32"


def least_seconds(products: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Least seconds of each product, in turns: what else runs on the machine meets all of them.

    ``products`` run once and return the seconds that this took.
    """
    for run in products.values():  # compiles and allocates
        run()
    least = {name: run() for name, run in products.items()}
    spent, turns = 0.0, 1
    while spent < _SECONDS and turns < _MOST_TURNS:
        found = {name: run() for name, run in products.items()}
        least = {name: min(least[name], found[name]) for name in products}
        spent, turns = spent + sum(found.values()), turns + 1
    return least


def products_on(device: torch.device) -> dict[str, Callable[[], float]]:
    """One product in each type, for ``least_seconds``."""
    return {"fp32": _product(torch.float32, device), "bf16": _product(torch.bfloat16, device)}


def _product(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    tokens, inputs, outputs = _SIZES
    left = torch.full((tokens, inputs), 0.5, dtype=dtype, device=device)
    right = torch.full((outputs, inputs), 0.5, dtype=dtype, device=device)

    def run() -> float:
        started = time.perf_counter()
        result = left @ right.t()
        float(result[0, 0])  # waits for a device
        return time.perf_counter() - started

    return run


def main() -> None:
    """Print the type."""
    # A process of the demo has one core.
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(choose(least_seconds(products_on(device))))


if __name__ == "__main__":
    main()
