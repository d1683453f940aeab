"""A score model that the engine runs, sharded like the policy: for reward models as large as it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gapo_mega.config import Section


class MegatronScoreOptions(Section):
    """``options`` of kind ``megatron_score``."""

    model: str = Field(
        description="score model of a known family: Hugging Face directory or hub name, or a checkpoint; a "
        "classifier with one label, or a safe-rlhf score model, whose costs are turned into rewards"
    )
    chat_template: str | None = Field(
        None, description="Jinja text or .jinja file; none: the tokenizer's own"
    )
    max_tokens: int = Field(1024, ge=1, description="of longer conversations the end is kept")
    micro_batch_size: int = Field(8, ge=1, description="conversations of a forward pass")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="compute type")
    offload: bool = Field(False, description="keep the model in host memory between uses (GPU only)")
    sign: Literal[1, -1] = Field(1, description="-1 for a model of costs that does not say so itself")
