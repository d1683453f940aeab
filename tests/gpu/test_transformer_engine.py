"""Transformer Engine's layers against transformers, both from the same converted checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gapo_mega.commands.convert import Conversion
from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.model import build
from gapo_mega.engine.megatron.model.forward import run_batch
from gapo_mega.engine.megatron.model.packing import unpacked
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.optional import transformer_engine_layers
from gapo_mega.types import TokenBatch
from tests.helpers.logits import relative_error, transformers_logits
from tests.helpers.ranks import worlds
from tests.helpers.tiny import tiny_llama, tiny_qwen2, tiny_qwen3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not transformer_engine_layers(), reason="needs Transformer Engine and a CUDA device"),
]

# fp32 matrix products may use TF32's 10 bits: an error of a tenth of a per cent per term, over four layers.
TOLERANCE = 1e-2


@pytest.mark.parametrize("write", [tiny_llama, tiny_qwen2, tiny_qwen3])
def test_the_same_checkpoint_gives_the_same_logits(tmp_path: Path, write: Callable[..., object]) -> None:
    write(tmp_path / "hf", vocab=101)
    conversion = Conversion(str(tmp_path / "hf"), tmp_path / "checkpoint")
    conversion.check()
    conversion.run()
    worlds.enter(1, 1)
    try:
        shape = shape_of(HFDirectory(tmp_path / "hf").config)
        with megatron_device():
            model = build.build_gpt(shape, ModelConfig(path=str(tmp_path / "hf")), ParallelConfig())
            weights.load(model, shape, tmp_path / "checkpoint")
        assert any("TE" in type(module).__name__ for module in model.modules())
        tokens_BT = torch.randint(3, 101, (2, 24), generator=torch.Generator().manual_seed(1))
        positions_BT = torch.arange(24).expand_as(tokens_BT).cuda()
        with torch.no_grad():
            found = model.eval()(tokens_BT.cuda(), positions_BT, None)[..., :101].float().cpu()
        assert relative_error(found, transformers_logits(tmp_path / "hf", tokens_BT)) <= TOLERANCE
    finally:
        worlds.leave()


def test_packed_rows_give_the_logits_of_each_sequence(tmp_path: Path) -> None:
    """In bf16, the one type in which its attention takes packed rows."""
    tiny_llama(tmp_path / "hf", vocab=101)
    lengths = [24, 3, 17]
    tokens_BT = torch.randint(3, 101, (3, 24), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.arange(24) == torch.tensor(lengths)[:, None] - 1
    worlds.enter(1, 1)
    try:
        shape = shape_of(HFDirectory(tmp_path / "hf").config)
        settings = ModelConfig(path=str(tmp_path / "hf"), dtype="bf16")
        with megatron_device():
            model = build.build_gpt(shape, settings, ParallelConfig())
            weights.load(model, shape, tmp_path / "hf")
            batch = TokenBatch(tokens_BT, mask_BT, packed_width=sum(lengths) + 4)
            with torch.no_grad():
                output_1SX = run_batch(model.eval(), batch, 1)
            found_BTX = unpacked(output_1SX, batch.to(output_1SX.device)).float().cpu()
        for row, length in enumerate(lengths):
            expected = transformers_logits(tmp_path / "hf", tokens_BT[row : row + 1, :length])[0]
            # bf16 keeps 8 bits of every activation over four layers.
            assert relative_error(found_BTX[row, :length, :101], expected) <= 5e-2
    finally:
        worlds.leave()
