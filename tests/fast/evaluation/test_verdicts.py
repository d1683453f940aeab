"""Methods beyond the paper's, and those that look at more than gradients, in an audit."""

from __future__ import annotations

from pathlib import Path

from gapo_mega import aggregation
from gapo_mega.evaluation.audit import audit_run
from tests.helpers.audited_runs import random_grams, write_run


def test_every_method_is_asked_where_it_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, random_grams(3))
    names = sorted(aggregation.methods())
    audit = audit_run(run, names)
    assert sorted({v.candidate.aggregator.name for v in audit.verdicts}) == names
    upgrad = next(v for v in audit.verdicts if v.candidate.aggregator.name == "upgrad")
    assert not upgrad.hurt.any() and audit.warning is None


def test_a_method_that_looks_at_scores_is_told_to_be_asked_without_them(tmp_path: Path) -> None:
    """Its weights differ from the log's, which nobody has edited."""
    method = {"name": "gapo", "options": {"rates": "adaptive"}}
    audit = audit_run(write_run(tmp_path, random_grams(2), method))
    assert audit.warning is not None and audit.warning.startswith(
        "gapo p=1 rates=adaptive also looks at scores"
    )
    assert audit.verdicts[0].candidate.note == "this run"
