"""One update of a tiny model with any normalization and entropy settings, beside transformers in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from gapo_mega import aggregation, losses
from gapo_mega.types import Experience
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.ranks import check_engine

LOW, HIGH = 0.03, 0.06  # of the ratio, whose logarithm differs by 0.05: some tokens are held on either side
LONGEST = 17


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: model, layout, normalization, entropy_beta, entropy, sections; perhaps dropped, rows
    whose response does not count.

    Gives the report's losses, gram, and facts of the policy; those of two updates at the same parameters.
    """
    config = check_engine.make_config(
        arguments["model"],
        arguments["layout"],
        {"name": "sgd", "distributed": False, "lr": 1e-30},  # keeps the parameters
        **{
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": LONGEST},
            "algorithm": {"entropy_beta": arguments["entropy_beta"]},
            "logging": {"entropy": arguments["entropy"]},
            **arguments["sections"],
        },
    )
    engine = check_engine.build_engine(config)
    batch = check_engine.local_part(_batch(arguments.get("dropped", [])), engine)
    loss = losses.build(
        "ppo", clip_epsilon=LOW, clip_epsilon_high=HIGH, normalization=arguments["normalization"]
    )
    aggregator = aggregation.build("gapo", p=1)
    reports = [engine.update_policy(batch, loss, aggregator) for _ in range(2)]
    assert all(report.policy is not None for report in reports)
    return {
        "losses": [report.losses for report in reports],
        "gram": [report.gram.tolist() for report in reports],
        "policy": [dataclasses.asdict(report.policy) for report in reports if report.policy is not None],
    }


def _batch(dropped: Sequence[int]) -> Experience:
    batch = check_engine.global_batch(200)
    mask_BT = batch.response_mask_BT.clone()
    mask_BT[list(dropped)] = False
    return dataclasses.replace(batch, response_mask_BT=mask_BT)


def expected(
    directory: Path, normalization: str, entropy_beta: float, dropped: Sequence[int] = ()
) -> dict[str, Any]:
    """The same from the whole batch at once, by transformers and autograd in float64."""
    batch = _batch(dropped)
    model = LlamaForCausalLM.from_pretrained(directory).double()
    logprobs_BTV = model(input_ids=batch.tokens_BT).logits.log_softmax(-1)[:, :-1]
    chosen_BT = logprobs_BTV.gather(-1, batch.tokens_BT[:, 1:, None]).squeeze(-1)
    entropy_BT = -(logprobs_BTV.exp() * logprobs_BTV).sum(-1)
    mask_BT = batch.response_mask_BT[:, 1:]
    log_ratio_BT = chosen_BT - chosen_BT.detach() - batch.old_logprobs_BT[:, 1:].double()
    assert batch.advantages_MBT is not None
    found, rows, clipped = [], [], []
    for advantages_BT in batch.advantages_MBT[:, :, 1:].double():
        rho_BT = log_ratio_BT.exp()
        free_BT, held_BT = rho_BT * advantages_BT, rho_BT.clamp(1 - LOW, 1 + HIGH) * advantages_BT
        value = mean(-torch.min(free_BT, held_BT) - entropy_beta * entropy_BT, mask_BT, normalization)
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        found.append(float(value.detach()))
        below, above = (held_BT < free_BT) & (advantages_BT < 0), (held_BT < free_BT) & (advantages_BT > 0)
        clipped.append([float(x[mask_BT].double().mean()) for x in (below, above)])
    log_ratio = log_ratio_BT.detach()[mask_BT]
    gram = torch.stack(rows) @ torch.stack(rows).T
    policy = {
        "clipped": {name: [shares[i] for shares in clipped] for i, name in enumerate(("low", "high"))},
        "kl": float((log_ratio.exp() - 1 - log_ratio).mean()),
        "ratio_min": math.exp(log_ratio.min()),
        "ratio_max": math.exp(log_ratio.max()),
        "entropy_estimate": -float(chosen_BT.detach()[mask_BT].mean()),
        "entropy": float(entropy_BT.detach()[mask_BT].mean()),
    }
    return {"losses": found, "gram": gram, "policy": policy}


def mean(values_BT: Tensor, mask_BT: Tensor, normalization: str) -> Tensor:
    """Over the whole batch, row by row."""
    rows = [row[mask] for row, mask in zip(values_BT, mask_BT, strict=True) if mask.any()]
    if normalization == "token_mean":
        return torch.cat(rows).mean()
    if normalization == "sequence_mean":
        return torch.stack([row.mean() for row in rows]).mean()
    return torch.stack([row.sum() / LONGEST for row in rows]).mean()


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """By what was measured: the greatest difference over its size, of both updates."""
    size = max(map(abs, wanted["losses"]))
    worst: dict[str, float] = {"losses": 0.0, "gram": 0.0}
    for losses_M, gram, policy in zip(found["losses"], found["gram"], found["policy"], strict=True):
        worst["gram"] = max(worst["gram"], gram_error(torch.tensor(gram).double(), wanted["gram"]))
        loss_error = max(abs(a - b) for a, b in zip(losses_M, wanted["losses"], strict=True))
        worst["losses"] = max(worst["losses"], loss_error / size)
        for name, value in policy.items():
            if name == "clipped":
                error = max(
                    abs(a - b)
                    for bound, shares in value.items()
                    for a, b in zip(shares, wanted["policy"][name][bound], strict=True)
                )
            elif value is None:
                continue
            else:
                error = abs(value / wanted["policy"][name] - 1)
            worst[name] = max(worst.get(name, 0.0), error)
    return worst
