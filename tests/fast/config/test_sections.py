"""Settings of one section that need each other."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gapo_mega.config import OptimizerConfig, ParallelConfig, Section


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (
            ParallelConfig,
            {"virtual_pipeline": 2},
            "parallel.virtual_pipeline: found 2 with parallel.pipeline 1; it needs pipeline >= 2",
        ),
        (
            OptimizerConfig,
            {"overlap_param_gather": True},
            "optimizer.overlap_param_gather: found true with overlap_grad_reduce false, accepted: false (it "
            "needs optimizer.distributed and optimizer.overlap_grad_reduce)",
        ),
        (
            OptimizerConfig,
            {"overlap_param_gather": True, "overlap_grad_reduce": True, "distributed": False},
            "optimizer.overlap_param_gather: found true with distributed false, accepted: false (it needs "
            "optimizer.distributed and optimizer.overlap_grad_reduce)",
        ),
    ],
)
def test_what_lacks_something_is_refused(
    section: type[Section], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        section.model_validate(fields)
    (error,) = caught.value.errors()
    assert error["msg"] == f"Value error, {message}"


def test_what_has_all_is_accepted() -> None:
    assert ParallelConfig(pipeline=2, virtual_pipeline=3).virtual_pipeline == 3
    assert OptimizerConfig(overlap_grad_reduce=True, overlap_param_gather=True).overlap_param_gather
