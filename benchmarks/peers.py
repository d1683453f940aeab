"""One update of a policy with several objectives: gapo_mega against the usual ways to do the same.

    python benchmarks/peers.py --objectives 2,4 --out benchmarks/results/peers.json

Same model, batch, losses and optimizer for torch.autograd by hand, TorchJD (autojac and autogram) and
gapo_mega's engine with each of its gradient strategies. Checks that their Gram matrices agree, measures each
one's peak memory and then, in turns, its time; all figures are also given as multiples of the step for one
objective on the same stack. Prints a table and writes a JSON file and, with --plot, a picture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from kernels import MOST_ROWS, parse_numbers

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def parse_strategies(texts: list[str]) -> dict[str, dict[str, Any]]:
    """``NAME=JSON`` with a section ``gradients``, or the NAME of one that is known.

    Raises:
        ValueError: neither of the two.
    """
    from peer_entries import known_strategies

    known = known_strategies()
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, given, section = text.partition("=")
        if not given and name in known:
            found[name] = known[name]
            continue
        try:
            value = json.loads(section)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(
                f"strategy: found {text!r}, accepted: NAME={{...}} in JSON, or {', '.join(known)}"
            )
        found[name] = value
    return found or known


def parse_size(text: str) -> dict[str, int]:
    """Fields of ``peer_jobs.ModelSize`` from ``hidden=512,layers=8``.

    Raises:
        ValueError: another field, or no positive number.
    """
    accepted = ("hidden", "layers", "vocabulary", "feed_forward", "heads")
    size: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if name not in accepted or not number.isdecimal() or int(number) == 0:
            raise ValueError(f"size: found {part!r}, accepted: {', '.join(accepted)}, each =NUMBER")
        size[name] = int(number)
    return size


@app.command(help=__doc__)
def main(
    out: Annotated[Path, typer.Option(help="the JSON file")] = Path("runs/benchmarks/peers-cpu.json"),
    plot: Annotated[Path | None, typer.Option(help="a PNG file for the picture")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face directory; none: a random Llama of 34 M parameters")
    ] = None,
    size: Annotated[
        str, typer.Option(help="of the random one, such as hidden=512,layers=8,vocabulary=8192")
    ] = "",
    sequences: Annotated[int, typer.Option(min=2, help="sequences of the batch")] = 8,
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = 128,
    objectives: Annotated[str, typer.Option(help="numbers m of objectives")] = "2,4",
    rounds: Annotated[int, typer.Option(min=1, help="timed steps of each; figures are medians")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="of torch")] = 2,
    attention: Annotated[str, typer.Option(help="of transformers: sdpa (its default) or eager")] = "sdpa",
    microbatches: Annotated[int, typer.Option(min=1, help="of ours; the peers take the batch at once")] = 1,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="of ours, once each: a known name, or NAME=JSON with the section gradients"),
    ] = None,
    leave_out: Annotated[list[str] | None, typer.Option(help="contenders to leave out, once each")] = None,
) -> None:
    """Run, report, write."""
    import peer_report
    import peer_run
    from peer_entries import has_torchjd

    try:
        settings = peer_run.Settings(
            model=None if model is None else str(model),
            sequences=sequences,
            length=length,
            objectives=parse_numbers("objectives", objectives, 2, MOST_ROWS),
            rounds=rounds,
            threads=threads,
            attention=attention,
            microbatches=microbatches,
            strategies=parse_strategies(strategy or []),
            leave_out=leave_out or [],
            size=parse_size(size),
        )
        if not has_torchjd():
            typer.echo(peer_run.INSTALL_TORCHJD, err=True)
        for result in peer_run.run(settings):
            peer_report.write(result, out)
    except (ValueError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    peer_report.print_table(result)
    typer.echo(f"written: {out}")
    if plot is not None:
        import peer_plot

        peer_plot.draw(result, plot)
        typer.echo(f"written: {plot}")


if __name__ == "__main__":
    app()
