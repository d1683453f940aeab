"""gapo_mega's kernels against this machine's ceilings and against the usual ways to do the same.

    python benchmarks/kernels.py --threads 1,2 --sizes 16,20,24 --rounds 5

Measures how fast memory is read and copied, then times Gram matrix, combination and whole step for m rows
of N elements; ceilings, ours and peers (torch, numpy, TorchJD) take turns, round by round. Prints tables
beside the targets and writes kernels-DEVICE.json and kernels-DEVICE.png.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

# Settings that slow numpy's BLAS down, or change which of its kernels run: it is compared as it comes.
BLAS_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
REMOVED = "GAPO_BENCHMARK_REMOVED"  # what was taken out of the environment, for the record
MOST_ROWS = 16

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def cores() -> int:
    """Processors that this process may use."""
    return len(psutil.Process().cpu_affinity())


def default_threads() -> str:
    """One and all, or something of each size between on large machines."""
    return ",".join(map(str, sorted({1, max(1, cores() // 4) if cores() > 8 else 1, cores()})))


def parse_numbers(option: str, text: str, low: int, high: int) -> list[int]:
    """Ascending numbers from a list with commas.

    Raises:
        ValueError: something else.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not low <= numbers[0] <= numbers[-1] <= high:
        raise ValueError(
            f"{option}: found {text!r}, accepted: numbers from {low} to {high}, separated by commas"
        )
    return numbers


def parse_choices(option: str, text: str, accepted: tuple[str, ...]) -> list[str]:
    """Words from a list with commas.

    Raises:
        ValueError: a word that is not accepted.
    """
    words = list(dict.fromkeys(text.split(",")))
    if not set(words) <= set(accepted):
        raise ValueError(f"{option}: found {text!r}, accepted: {', '.join(accepted)}, separated by commas")
    return words


@app.command(help=__doc__)
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU where there is one")] = "auto",
    threads: Annotated[str, typer.Option(help="numbers of threads (CPU only)")] = default_threads(),
    rows: Annotated[str, typer.Option(help="numbers of rows m, up to 16")] = "2,4,6,8",
    dtypes: Annotated[str, typer.Option(help="element types: float32, bfloat16")] = "float32,bfloat16",
    sizes: Annotated[str, typer.Option(help="log2 of the numbers of elements N")] = "16,18,20,22,24,26",
    rounds: Annotated[int, typer.Option(min=1, help="rounds; figures are medians over them")] = 7,
    stagger: Annotated[
        int,
        typer.Option(
            min=0, help="bytes by which each row begins further into its page; the trainer's use 1088"
        ),
    ] = 0,
    out: Annotated[Path, typer.Option(help="folder for the JSON file and the picture")] = Path(
        "runs/benchmarks"
    ),
) -> None:
    """Run, report, write."""
    # torch and numpy are imported from here on only: the environment had to be set before.
    import kernel_report
    import kernel_run

    try:
        settings = kernel_run.Settings(
            device=kernel_run.choose_device(device),
            threads=parse_numbers("threads", threads, 1, 1024),
            rows=parse_numbers("rows", rows, 1, MOST_ROWS),
            dtypes=parse_choices("dtypes", dtypes, ("float32", "bfloat16")),
            sizes=parse_numbers("sizes", sizes, 6, 34),
            rounds=rounds,
            stagger=stagger // 16 * 16,
        )
        result: dict[str, Any] = kernel_run.run(settings, removed=os.environ.get(REMOVED, ""))
    except (ValueError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    kernel_report.print_tables(result)
    for path in kernel_report.write(result, out):
        typer.echo(f"written: {path}")


def start_clean() -> None:
    """Start this process again without ``BLAS_SETTINGS``: BLAS reads them while it is loaded."""
    removed = {name: os.environ[name] for name in BLAS_SETTINGS if name in os.environ}
    if not removed:
        return
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment[REMOVED] = " ".join(f"{name}={value}" for name, value in removed.items())
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


if __name__ == "__main__":
    start_clean()
    app()
