"""The order of passes that the plan goes through, against the tables of Megatron-core's own schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.pipeline_parallel import schedules

from gapo_mega.planning.schedule import microbatch_group, schedule


@pytest.mark.parametrize("virtual", [2, 3])
@pytest.mark.parametrize(("pipeline", "microbatches"), [(2, 2), (2, 5), (2, 8), (3, 8), (4, 4), (4, 9)])
def test_order_and_lead_are_megatron_s(pipeline: int, microbatches: int, virtual: int) -> None:
    group = microbatch_group(microbatches, pipeline)
    table = schedules.get_schedule_table(microbatches, virtual, group)
    for stage in range(pipeline):
        communicator: Any = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: pipeline, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=virtual,
        )
        _, _, ahead, _ = schedules.get_pp_rank_microbatches(
            microbatches, virtual, group, p2p_communicator=communicator
        )
        passes = list(schedule(pipeline, virtual, stage, microbatches))
        forwards = [number for forward, number in passes if forward]
        backwards = [virtual - 1 - number for forward, number in passes if not forward]
        order = [chunk for _, chunk in table]
        assert forwards == order[: len(forwards)] and backwards == order[: len(backwards)]
        before = next(index for index, (forward, _) in enumerate(passes) if not forward)
        # In the steady state a forward precedes every backward.
        assert before == (ahead if ahead == len(order) else ahead + 1)
