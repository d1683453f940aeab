"""What weights from running means should be, in float64 and from the models that a run exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapo_mega.types import Experience
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.logits import chosen_logprobs
from tests.helpers.policy_gradients import Reference
from tests.helpers.ranks import check_averages


class Reinforce(Reference):
    """The gradients of ``check_averages.reinforce``, written down anew."""

    @staticmethod
    def losses_from(logits: Tensor, batch: Experience) -> list[Tensor]:
        assert batch.advantages_MBT is not None
        chosen = chosen_logprobs(logits, batch.tokens_BT)
        mask = batch.response_mask_BT[:, 1:]
        return [
            -(advantages_BT[:, 1:] * chosen)[mask].mean() for advantages_BT in batch.advantages_MBT.double()
        ]


def assert_as_reference(found: dict[str, Any], exported: Path, tolerance: float) -> None:
    """Compare what ``check_averages.run`` found with means kept in float64, within a share of the norms."""
    beta, mean = check_averages.AVERAGE, torch.zeros(())
    assert found["skipped"] == [False] * check_averages.STEPS
    for step in range(check_averages.STEPS):
        rows = Reinforce(exported / str(step), check_averages.batch_of(step)).rows()
        mean = beta * mean + (1 - beta) * rows
        corrected = mean / (1 - beta ** (step + 1))
        gram = torch.tensor(found["gram"][step], dtype=torch.float64)
        averaged = torch.tensor(found["averaged"][step], dtype=torch.float64)
        assert gram_error(gram, rows @ rows.T) <= 1e-5
        assert gram_error(averaged, corrected @ corrected.T) <= tolerance
        weights = torch.tensor(found["weights"][step], dtype=torch.float64)
        expected = check_averages.method()(corrected @ corrected.T)
        torch.testing.assert_close(weights, expected, rtol=10 * tolerance, atol=0)
        # The means matter: from the gradients alone the weights would be others.
        alone = check_averages.method()(rows @ rows.T)
        assert torch.allclose(weights, alone, rtol=20 * tolerance) == (step == 0)
