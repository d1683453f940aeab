"""Whether tokens go through the same experts when they are sampled and when they are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.generation.generate import MegatronGenerator
from gapo_mega.engine.megatron.model import build
from gapo_mega.engine.megatron.model.experts import Router
from gapo_mega.engine.megatron.model.forward import run_model
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.models import HFDirectory, shape_of
from tests.helpers.ranks import worlds
from tests.helpers.tiny import tiny_mixtral, tiny_qwen3_moe

ROWS, PROMPT, NEW = 16, 8, 24
# Two experts whose scores differ by less than the rounding of what lies below them may change places. Both
# sides run the same layers, and on a CPU their rows do not depend on the rows beside them: none does so here.
SHARE = {"fp32": 1e-3, "bf16": 2e-2}


@contextmanager
def routes(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """By layer the routing maps ``[S, B, E]`` of every forward within the block."""
    found: list[list[Tensor]] = []
    with ExitStack() as stack:
        for router in (module for module in model.modules() if isinstance(module, Router)):
            own: list[Tensor] = []
            found.append(own)

            def keep(module: Any, inputs: Any, output: Any, own: list[Tensor] = own) -> None:
                own.append(output[1].view(*inputs[0].shape[:2], -1))

            stack.callback(router.register_forward_hook(keep).remove)
        yield found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("write", [tiny_mixtral, tiny_qwen3_moe])
def test_tokens_keep_their_experts(tmp_path: Path, write: Any, dtype: str) -> None:
    write(tmp_path)
    world = worlds.enter(1, 1)
    shape = shape_of(HFDirectory(tmp_path).config)
    settings = ModelConfig.model_validate({"path": str(tmp_path), "dtype": dtype})
    with megatron_device():
        model = build.build_gpt(shape, settings, ParallelConfig())
        weights.load_hf(model, shape, tmp_path)
    generator = MegatronGenerator(
        [model], world, vocabulary=shape.vocab, pad_id=0, eos_ids=[], batch_size=ROWS
    )
    random = torch.randint(3, shape.vocab, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    prompts = sorted(random.tolist())  # the order in which the generator takes them
    with routes(model) as sampled:
        generation = generator.generate(prompts, SamplingParameters(max_new_tokens=NEW), seed=2)
    with routes(model) as trained, torch.no_grad(), megatron_device():
        run_model(model, generation.tokens_BT, 1)
    differing, shifted = [], []
    for theirs, (ours_SBE,) in zip(sampled, trained, strict=True):
        theirs_SBE = torch.cat(theirs)
        assert theirs_SBE.shape[0] == PROMPT + NEW - 1  # nobody reads the last token
        differing.append((theirs_SBE != ours_SBE[:-1]).any(dim=-1))
        shifted.append((theirs_SBE != ours_SBE[1:]).any(dim=-1))
    share = float(torch.stack(differing).float().mean())
    print(f"{write.__name__} {dtype}: {share:.2%} of the choices differ")
    assert share <= SHARE[dtype]
    assert float(torch.stack(shifted).float().mean()) > 0.3  # the comparison tells tokens apart
