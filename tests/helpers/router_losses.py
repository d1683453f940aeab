"""Losses of experts' routers and their gradient, by transformers and autograd in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from gapo_mega.types import TokenBatch


def router_losses(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Auxiliary and z loss with a graph, summed over layers, over the tokens of prompts and responses."""
    seen: list[tuple[Tensor, Tensor]] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [
        gate.register_forward_pre_hook(lambda m, inputs: seen.append((inputs[0], m.weight))) for gate in gates
    ]
    model.model(input_ids=batch.tokens_BT)
    for hook in hooks:
        hook.remove()
    assert len(seen) == model.config.num_hidden_layers
    real_BT = torch.arange(batch.tokens_BT.shape[1]) < batch.lengths_B[:, None]
    experts, chosen = seen[0][1].shape[0], model.config.num_experts_per_tok
    aux, z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for hidden, weight in seen:
        logits_NE = functional.linear(hidden.reshape(-1, weight.shape[1]), weight)
        # Of transformers for one layer: k times the mean over the k choices.
        aux = aux + load_balancing_loss_func((logits_NE,), experts, chosen, real_BT.long()) / chosen
        z = z + logits_NE[real_BT.flatten()].logsumexp(dim=-1).square().mean()
    return aux, z


def router_gradient(model: Any, batch: TokenBatch, aux: float, z: float) -> Tensor:
    """The gradient of ``aux`` times the one plus ``z`` times the other, flat, by all parameters in order."""
    losses = router_losses(model, batch)
    parameters = list(model.parameters())
    found = torch.autograd.grad(aux * losses[0] + z * losses[1], parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )
