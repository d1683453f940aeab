"""``gapo-mega soup``: merges models that differ in their weights only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from gapo_mega.commands.options import DTYPES
from gapo_mega.files import local

_ROUNDING = 1e-9  # by which weights that a program printed may miss 1


def soup(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="PATH",
            help="Hugging Face directory or hub name, or Megatron checkpoint; once for every model.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", parser=local, metavar="PATH", help="The directory to write.")],
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="One number for each model, 1 in all: 0.3,0.7 or 1/3,2/3 or -0.5,1.5. [all alike]",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. [as in the models]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a directory that exists.")] = False,
) -> None:
    """Merge models of one architecture: every weight is the weighted sum of theirs.

    The first model gives configuration, tokenizer and chat template. A Megatron checkpoint is converted to a
    temporary directory beside --out first, which takes its size on the disk.
    """
    numbers = parse_weights(weights, len(model))
    _check(model, out, dtype, overwrite)
    _write(model, numbers, out, dtype, overwrite)
    print(f"wrote {out}")


def parse_weights(text: str | None, models: int) -> list[float]:
    """One weight a model: numbers or fractions with commas between them, 1 in all; None: all alike.

    Weights may be negative. Others than those that sum to 1 would scale the whole network, norms included.
    Raises ``ValueError`` for anything else.
    """
    if models < 2:
        raise ValueError(f"--model: found {models}, accepted: two or more")
    if text is None:
        return [1 / models] * models
    try:
        found = [_number(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"--weights: found {text!r}, accepted: numbers with commas between them, such as 0.3,0.7"
        ) from None
    if len(found) != models:
        raise ValueError(f"--weights: found {len(found)} for {models} models, accepted: one for each")
    total = math.fsum(found)
    if abs(total - 1) > _ROUNDING:
        raise ValueError(
            f"--weights: found {text} with the sum {total:.9g}, accepted: weights with the sum 1 (task "
            "arithmetic gives the base model, too, a weight: 1 less the sum of the others)"
        )
    return found


def _number(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    value = float(numerator) / float(denominator) if slash else float(numerator)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _check(models: list[str], out: Path, dtype: str | None, overwrite: bool) -> None:
    """Refuse what can be refused before a model is looked at."""
    from gapo_mega.models.huggingface.writing import refuse_inside

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: found {dtype!r}, accepted: {', '.join(DTYPES)}")
    for model in models:
        refuse_inside(local(model), out, "--out")
    if out.exists() and not overwrite:
        raise ValueError(f"--out: {out} exists already; name another directory, or --overwrite")


def _write(models: list[str], weights: list[float], out: Path, dtype: str | None, overwrite: bool) -> None:
    import torch

    from gapo_mega.engine.base import checkpoint_converter
    from gapo_mega.models.huggingface.location import is_megatron_checkpoint, resolve
    from gapo_mega.models.huggingface.soup import write_soup
    from gapo_mega.scratch import remove_left, scratch

    found = [resolve(model, "--model") for model in models]
    prefix = f".{out.name}.models-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be written: {error}") from error
    remove_left(out.parent, prefix)
    with scratch(out.parent, prefix) as (folder, _):
        sources = []
        for number, path in enumerate(found):
            if is_megatron_checkpoint(path):
                converted = folder / str(number)
                checkpoint_converter().to_hf(path, converted)
                path = converted
            sources.append(path)
        kind: torch.dtype | None = None if dtype is None else getattr(torch, DTYPES[dtype])
        write_soup(sources, weights, out, dtype=kind, overwrite=overwrite)
