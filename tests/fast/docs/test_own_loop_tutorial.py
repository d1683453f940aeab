"""Runs docs/tutorial/own_loop.md block by block, and does its five lines once more in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.helpers.pages import blocks


def test_page_runs_and_does_what_torch_does() -> None:
    found = [block.code for block in blocks("docs/tutorial/own_loop.md") if block.language == "python"]
    assert len(found) == 6
    names: dict[str, Any] = {}
    exec(found[0], names)
    start = [parameter.detach().clone() for parameter in names["model"].parameters()]
    for code in found[1:]:
        exec(code, names)
    trained = [parameter.detach().clone() for parameter in names["model"].parameters()]

    # Two objectives and p = 1: w_i = 1 / (2 |g_i|), scaled to the mean norm.
    model, parameters = names["model"], list(names["model"].parameters())
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    for _ in range(20):
        rows = [
            nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters, retain_graph=True)).double()
            for loss in names["losses"]()
        ]
        norms = [row.norm() for row in rows]
        direction = sum(norms) / 2 * (rows[0] / norms[0] + rows[1] / norms[1]) / 2
        step = nn.utils.parameters_to_vector(parameters).detach().double() - 0.05 * direction
        nn.utils.vector_to_parameters(step.float(), parameters)
    # Twenty steps in fp32, which the next gradients see.
    for found_value, expected in zip(trained, model.parameters(), strict=True):
        torch.testing.assert_close(found_value, expected.detach(), rtol=1e-4, atol=1e-5)
