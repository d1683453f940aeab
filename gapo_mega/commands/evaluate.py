"""``gapo-mega evaluate``: answers prompts with several models, scores the responses, compares the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gapo_mega.commands import launch
from gapo_mega.commands.options import OVERWRITE, ConfigFile, Models, Overrides, Processes
from gapo_mega.files import local

if TYPE_CHECKING:
    from gapo_mega.config import Config

_NO_REFERENCE = "none"


def evaluate(
    config: ConfigFile,
    model: Models,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", parser=local, metavar="PATH", help="Directory. [output_dir/evaluation]"),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="File, directory, hub name or package:NAME with prompts. [the run's held-out prompts]",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --prompts: at most this many, from the first on.")
    ] = None,
    judges: Annotated[
        Path | None,
        typer.Option(
            "--objectives",
            parser=local,
            metavar="PATH",
            help="YAML file with further objectives, beside those of the run.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="[NAME=]PATH", help="Model that the KL is measured from, or none. [the first]"),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="Also the share of responses whose score is above NUMBER."),
    ] = None,
    refusals: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Phrases of a refusal: gcg, first_person, or a file.")
    ] = "gcg",
    judge: Annotated[
        Path | None,
        typer.Option(
            parser=local,
            metavar="PATH",
            help="YAML file of a judge behind an OpenAI-compatible endpoint, which compares pairs. [none]",
        ),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The most likely token, in place of samples; without KL.")
    ] = False,
    resamples: Annotated[int, typer.Option(min=100, help="Draws of the bootstrap.")] = 9999,
    nproc: Processes = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Generate anew what an earlier call has left in --out.")
    ] = False,
) -> None:
    """Compare models on the same prompts: scores by any objectives, KL, length, refusals.

    Goes on where an earlier call with the same settings stopped, and adds models and objectives to what is
    there. Runs as one process, as a process of torchrun, or starts local processes itself (--nproc).
    """
    from gapo_mega.config.loading import load
    from gapo_mega.evaluation.intervals import Resampling
    from gapo_mega.evaluation.refusals import phrases
    from gapo_mega.objectives.pairwise import PairwiseOptions
    from gapo_mega.planning import methods
    from gapo_mega.runs.evaluate import Evaluation, Request
    from gapo_mega.runs.evaluated_models import find_models, find_reference
    from gapo_mega.runs.processes import Alone

    settings = methods.load(config, overrides or [])
    if judges is not None:
        settings = _with_judges(settings, judges)
    if limit is not None and prompts is None:
        raise ValueError(f"--limit: found {limit} without --prompts, accepted: data.heldout_prompts={limit}")
    thresholds = dict(_threshold(text) for text in threshold or [])
    named = find_models(model)
    listed = phrases(refusals)
    base = named[0]
    if reference is not None and reference != _NO_REFERENCE:
        base = find_reference(reference, named)
    request = Request(
        models=named,
        reference=None if reference == _NO_REFERENCE else base,
        out=out or local(settings.output_dir) / "evaluation",
        refusals=(refusals, listed),
        prompts=prompts,
        limit=limit,
        greedy=greedy,
        overwrite=overwrite,
        thresholds=thresholds,
        how=Resampling(resamples=resamples, seed=settings.seed),
        judge=None if judge is None else (load(judge, [], kind=PairwiseOptions), f"--judge {judge}"),
    )
    if nproc is not None:
        launch.refuse_under_torchrun(nproc)
        # Here, because torchrun buries the error of a worker.
        Evaluation(settings, request, Alone(), nproc).check()
        options: dict[str, Sequence[object]] = {
            "--config": [config],
            "--model": model,
            "--out": [request.out],
            "--prompts": [prompts],
            "--limit": [limit],
            "--objectives": [judges],
            "--reference": [reference],
            "--threshold": threshold or [],
            "--refusals": [refusals],
            "--resamples": [resamples],
            "--judge": [judge],
        }
        flags = [flag for flag, wanted in (("--greedy", greedy), (OVERWRITE, overwrite)) if wanted]
        launch.start(nproc, ["evaluate", *_written(options), *flags, *(overrides or [])])
    launch.quiet_other_ranks()
    comparison = Evaluation(settings, request).run()
    if comparison is not None:  # of the main rank
        from gapo_mega.evaluation.comparison_tables import markdown

        print(markdown(comparison))
        print(f"wrote {request.out}")


def _written(options: Mapping[str, Sequence[object]]) -> list[str]:
    """Options as they stand on a command line; one that is None does not."""
    return [
        f"{option}={value}"  # in one word, because a value may begin with "-"
        for option, values in options.items()
        for value in values
        if value is not None
    ]


def _with_judges(settings: Config, file: Path) -> Config:
    """``settings`` with the objectives of ``file`` after its own."""
    from gapo_mega.config.fields import MOST_ROWS
    from gapo_mega.config.judges import JudgesConfig
    from gapo_mega.config.loading import load

    further = load(file, [], kind=JudgesConfig).objectives
    names = {objective.name for objective in settings.objectives}
    for objective in further:
        if objective.name in names:
            raise ValueError(
                f"--objectives: found {objective.name!r} in {file}, which is an objective of the run or of "
                "the file already; accepted: another name"
            )
        names.add(objective.name)
    if len(names) > MOST_ROWS:
        raise ValueError(f"--objectives: found {len(names)} with those of the run, accepted: {MOST_ROWS}")
    return settings.model_copy(update={"objectives": [*settings.objectives, *further]})


def _threshold(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not (equals and name and abs(value) < float("inf")):
        raise ValueError(f"--threshold: found {text!r}, accepted: NAME=NUMBER, such as harmless=0")
    return name, value
