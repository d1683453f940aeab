"""A comparison of models as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gapo_mega.evaluation.comparison import Comparison, Difference
from gapo_mega.evaluation.intervals import Estimate
from gapo_mega.evaluation.judged import Judged

_CSV_COLUMNS = (
    *(
        "model",
        "against",
        "measure",
        "value",
        "low",
        "high",
        "prompts",
        "higher",
        "equal",
        "lower",
        "finding",
    ),
)
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {">": "$>$", "<": "$<$", "–": "--"}


@dataclass(frozen=True)
class TextTable:
    """A table of texts; the first column says what a row is."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def text_tables(comparison: Comparison) -> list[TextTable]:
    """The measures of every model, and the differences of every later model from the first."""
    first, *others = [model.name for model in comparison.models]
    tables = [_of_models(comparison)]
    if others:
        tables.append(_of_differences(comparison, first, others))
    if comparison.judged:
        tables.append(_of_judge(comparison.judged))
    return tables


def notes(comparison: Comparison) -> list[str]:
    """What the numbers are."""
    how = comparison.how
    lines = [
        f"{_counted(comparison.prompts, 'prompt')}, {_counted(comparison.samples, 'response')} to each. In "
        f"brackets: {how.confidence:.0%} intervals by bootstrap over the prompts (BCa, {how.resamples} "
        f"resamples, seed {how.seed}). They hold for these models; how much another seed of training "
        "changes, they do not say.",
    ]
    if comparison.differences:
        lines.append(
            "Differences are paired: the same prompts. The shares are those of the prompts on which the "
            "measure is higher / equal / lower. Higher or lower: the interval leaves out 0, which by chance "
            "one in twenty does; nothing is corrected for the number of comparisons."
        )
    if comparison.judged:
        lines.append(
            "The judge saw every pair of first responses in both orders. Preferred: 1 in both, 0.5 for a "
            "draw. A win needs both orders. Consistent: the same preference in both. First: verdicts for the "
            "one that came first; 50% is a judge without that bias."
        )
    return lines


def _of_models(comparison: Comparison) -> TextTable:
    models = comparison.models
    rows = [
        [label, *(interval(model.estimates.get(key)) for model in models)]
        for key, label in comparison.measures.items()
    ]
    for n in models[0].distinct:
        rows.append([f"distinct-{n}", *(number(model.distinct[n]) for model in models)])
    return TextTable("Models", ["", *(model.name for model in models)], rows)


def _of_differences(comparison: Comparison, against: str, others: Sequence[str]) -> TextTable:
    found = {(d.model, d.measure): d for d in comparison.differences if d.against == against}
    rows = [
        [label, *(_difference(found.get((model, key))) for model in others)]
        for key, label in comparison.measures.items()
    ]
    return TextTable(f"Differences from {against}", ["", *others], rows)


def _of_judge(found: Sequence[Judged]) -> TextTable:
    columns = ["", "preferred", "won / tied / lost", "consistent", "first", "no verdict"]
    rows = [
        [
            f"{each.rubric}: {each.model} against {each.against}",
            interval(each.share),
            " / ".join(f"{share:.0%}" for share in (each.wins, each.ties, each.losses)),
            number(each.consistent, ".0%"),
            number(each.first, ".0%"),
            f"{each.silent}",
        ]
        for each in found
    ]
    return TextTable("Judge", columns, rows)


def number(value: float | None, form: str = ".4g") -> str:
    """``value``, or a dash for none."""
    return "–" if value is None else format(value, form)


def interval(found: Estimate | None, form: str = ".4g") -> str:
    """A mean and its interval."""
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return number(found.mean, form)
    return f"{number(found.mean, form)} [{number(found.low, form)}, {number(found.high, form)}]"


def _difference(found: Difference | None) -> str:
    if found is None:
        return "–"
    shares = " / ".join(f"{share:.0%}" for share in (found.higher, found.equal, found.lower))
    return f"{interval(found.estimate, '+.3g')}, {shares}, {found.finding}"


def markdown(comparison: Comparison) -> str:
    """Tables and notes."""

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"

    parts = []
    for table in text_tables(comparison):
        rule = ["---", *["---:"] * (len(table.columns) - 1)]
        parts.append(f"## {table.title}\n\n{row(table.columns)}{row(rule)}{''.join(map(row, table.rows))}")
    return "\n".join([*parts, *(f"{line}\n" for line in notes(comparison))])


def latex(comparison: Comparison) -> str:
    """The tables as ``tabular`` environments with the rules of booktabs, to be put into a document."""

    def row(cells: Sequence[str]) -> str:
        return " & ".join(map(_escaped, cells)) + r" \\" + "\n"

    parts = []
    for table in text_tables(comparison):
        body = "".join(map(row, table.rows))
        columns = "l" + "r" * (len(table.columns) - 1)
        parts.append(
            f"% {table.title}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{row(table.columns)}\\midrule\n"
            f"{body}\\bottomrule\n\\end{{tabular}}\n"
        )
    told = "".join(f"% {line}\n" for line in notes(comparison))
    return "% needs \\usepackage{booktabs}\n" + "\n".join(parts) + told


def _escaped(text: str) -> str:
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w.$-])([-+]\d[\d.e+-]*)", r"$\1$", escaped)  # a minus, and not a hyphen


def csv_text(comparison: Comparison) -> str:
    """One line for each measure of a model, and of every pair of models, in full precision."""
    file = io.StringIO()
    writer = csv.DictWriter(file, _CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for model in comparison.models:
        for key, found in model.estimates.items():
            writer.writerow({"model": model.name, "measure": key, **_numbers(found, comparison.prompts)})
        for n, share in model.distinct.items():
            line = {"model": model.name, "measure": f"distinct/{n}", "value": share}
            writer.writerow(line | {"prompts": comparison.prompts})
    for difference in comparison.differences:
        facts = {key: getattr(difference, key) for key in _FACTS}
        writer.writerow(facts | _numbers(difference.estimate, difference.prompts))
    for each in comparison.judged:
        line = {"model": each.model, "against": each.against, "measure": f"judge/{each.rubric}"}
        line |= {"higher": each.wins, "equal": each.ties, "lower": each.losses}
        writer.writerow(line | _numbers(each.share, each.prompts))
    return file.getvalue()


_FACTS = ("model", "against", "measure", "higher", "equal", "lower", "finding")


def _numbers(found: Estimate, prompts: int) -> dict[str, Any]:
    return {"value": found.mean, "low": found.low, "high": found.high, "prompts": prompts}


def as_json(comparison: Comparison, about: Mapping[str, Any]) -> str:
    """Everything, for programs; ``about`` says what was evaluated."""
    document = {
        **about,
        "prompts": comparison.prompts,
        "samples_per_prompt": comparison.samples,
        "intervals": {**asdict(comparison.how), "method": "BCa bootstrap over prompts"},
        "measures": comparison.measures,
        "models": {
            model.name: {
                "measures": {key: asdict(found) for key, found in model.estimates.items()},
                "distinct": {str(n): share for n, share in model.distinct.items()},
            }
            for model in comparison.models
        },
        "differences": [
            {**asdict(difference), "finding": difference.finding} for difference in comparison.differences
        ],
        "judge": [asdict(each) for each in comparison.judged],
    }
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "evaluation.md": markdown,
    "evaluation.csv": csv_text,
    "evaluation.tex": latex,
}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
