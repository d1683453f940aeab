"""The section ``model.lora``: low-rank adapters on the linear layers of the policy."""

from __future__ import annotations

import math
from typing import Literal, get_args

from pydantic import Field, model_validator

from gapo_mega.config.fields import LocalPath, Section

TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The linear layers of a transformer layer, by their Hugging Face names.
TARGET_MODULES: tuple[TargetModule, ...] = get_args(TargetModule)


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685): ``W x + scale B A x`` with W frozen, A and B trained."""

    rank: int = Field(16, ge=1, description="rows of every A, columns of every B")
    alpha: float = Field(32.0, gt=0, description="the scale is alpha / rank")
    rank_stabilized: bool = Field(
        False, description="scale alpha / sqrt(rank) in place of alpha / rank (rsLoRA; PEFT's use_rslora)"
    )
    target_modules: Literal["all-linear"] | list[TargetModule] = Field(
        "all-linear",
        description="linear layers with an adapter, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        "down_proj; all-linear: these seven",
    )
    path: LocalPath | None = Field(
        None,
        description="directory of an adapter in PEFT's format to start from, of the same rank, alpha and "
        "target_modules; none: A random, B 0, which changes nothing at first",
    )

    @model_validator(mode="after")
    def _names_each_once(self) -> LoraConfig:
        found = self.target_modules
        if isinstance(found, list) and (not found or len(set(found)) < len(found)):
            raise ValueError(
                f"model.lora.target_modules: found {found}, accepted: all-linear, or at least one of "
                f"{', '.join(TARGET_MODULES)}, each once"
            )
        return self

    @property
    def targets(self) -> tuple[TargetModule, ...]:
        """The linear layers with an adapter, in the order of ``TARGET_MODULES``."""
        wanted = TARGET_MODULES if isinstance(self.target_modules, str) else self.target_modules
        return tuple(name for name in TARGET_MODULES if name in wanted)

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def check_adapter_export(lora: LoraConfig | None, export_adapter: bool, keep_layers: int | None) -> None:
    """Refuse, in one line, an adapter to export that there is not, or that is of no model to be found."""
    if not export_adapter:
        return
    if lora is None:
        raise ValueError(
            "checkpoint.export_adapter: found true without model.lora, accepted: false (there is no adapter "
            "to export)"
        )
    if keep_layers is not None:
        raise ValueError(
            f"checkpoint.export_adapter: found true with model.keep_layers {keep_layers}, accepted: false "
            "(PEFT would load the adapter on all layers of model.path)"
        )


def check_lora(lora: LoraConfig | None, offload_reference: bool, scope: object, export_adapter: bool) -> None:
    """Refuse, in one line, what does not go with adapters, or what goes with them alone."""
    check_adapter_export(lora, export_adapter, None)
    if lora is None:
        return
    if offload_reference:
        raise ValueError(
            "model.offload_reference: found true with model.lora, accepted: false (the reference is the "
            "policy with its adapters switched off, and has no weights of its own)"
        )
    if isinstance(scope, str) and scope != "full":
        raise ValueError(
            f"gradients.scope: found {scope} with model.lora, accepted: full, or ranges of layers (adapters "
            "lie in the layers, and the output layer is frozen)"
        )
