"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gapo_mega.config.lora import TARGET_MODULES, LoraConfig
from gapo_mega.models.casting import is_finite
from gapo_mega.models.huggingface.writing import complete_or_absent

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of adapter_config.json by which PEFT computes something else, with what is computed here. Others that
# have a value are named in an error, unless they only tell where the adapter comes from.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
    "exclude_modules": (None, []),
    "layer_replication": (None,),
    "layers_pattern": (None,),
    "layers_to_transform": (None,),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


class PeftAdapter:
    """An adapter's directory, opened for reading.

    Raises ``ValueError``, beginning with ``model.lora``, where it is none, or another than ``lora`` says.
    """

    def __init__(self, directory: Path, lora: LoraConfig) -> None:
        self.directory = directory
        self.lora = lora
        _check_settings(directory, _read_settings(directory), lora)
        self._file = directory / WEIGHTS
        if not self._file.is_file():
            raise ValueError(f"model.lora.path: {directory} has no {WEIGHTS}; accepted: one with it")

    def check(self, expected: Mapping[str, tuple[int, int]]) -> None:
        """Raise ``ValueError`` unless the tensors have these names and shapes, and are finite."""
        found = self._shapes()
        for what, names in (
            ("lacks", sorted(expected.keys() - found.keys())),
            ("has, beside those of the targets,", sorted(found.keys() - expected.keys())),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(
                    f"model.lora.path: {self._file} {what} {names[0]}{more}; accepted: A and B of "
                    f"{', '.join(self.lora.targets)} in every layer, and nothing else"
                )
        for name, shape in expected.items():
            if found[name] != shape:
                raise ValueError(
                    f"model.lora.path: {self._file}: found {name} of shape {list(found[name])}, accepted: "
                    f"{list(shape)}, for this model and model.lora.rank {self.lora.rank}"
                )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. Raises ``ValueError`` where it is not finite."""
        with safe_open(self._file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        if not is_finite(tensor):
            raise ValueError(
                f"model.lora.path: {self._file}: {name} holds NaN or infinite numbers; accepted: finite ones"
            )
        return tensor

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        try:
            with safe_open(self._file, framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"model.lora.path: {self._file} cannot be read ({error}); accepted: a whole safetensors file"
            ) from error


def _read_settings(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    if not file.is_file():
        raise ValueError(
            f"model.lora.path: {directory} has no {CONFIG}; accepted: a local directory of a PEFT adapter"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"model.lora.path: {file} cannot be read ({error}); accepted: JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"model.lora.path: {file}: found {type(found).__name__}, accepted: an object")
    return found


def _check_settings(directory: Path, found: Mapping[str, Any], lora: LoraConfig) -> None:
    file = directory / CONFIG
    for field, accepted in _COMPUTED.items():
        # PEFT writes every field; what an older one lacks has its default.
        value = found.get(field, accepted[0])
        if value not in accepted:
            raise ValueError(
                f"model.lora.path: {file}: found {field} {value!r}, accepted: {json.dumps(accepted[0])}"
            )
    targets = found.get("target_modules")
    ours: dict[str, Any] = {
        "rank": found.get("r"),
        "alpha": found.get("lora_alpha"),
        "rank_stabilized": found.get("use_rslora", False),
    }
    for field, value in ours.items():
        wanted = getattr(lora, field)
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            raise ValueError(
                f"model.lora.{field}: found {wanted} with an adapter of {value} ({file}), accepted: that of "
                "model.lora.path"
            )
    if targets != "all-linear" and not isinstance(targets, list):
        raise ValueError(
            f"model.lora.path: {file}: found target_modules {targets!r}, accepted: a list, or all-linear"
        )
    names = set(TARGET_MODULES) if targets == "all-linear" else set(map(str, targets))
    if names != set(lora.targets):
        raise ValueError(
            f"model.lora.target_modules: found {', '.join(lora.targets)} with an adapter of "
            f"{', '.join(sorted(names))} ({file}), accepted: those of model.lora.path"
        )


def write_adapter(
    directory: Path, lora: LoraConfig, base: str, tensors: Mapping[str, Tensor], head: str | None = None
) -> None:
    """Write an adapter that PEFT loads on the model ``base``; replace one that is there.

    ``head``: the module of a classifier's head, whose weight is among the tensors; None: a language model.
    Raises ``ValueError`` where it cannot be written.
    """
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rank_stabilized,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None if head is None else [head],
    }
    with complete_or_absent(directory, overwrite=True) as partial:
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            partial / WEIGHTS,
            metadata={"format": "pt"},
        )
        (partial / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
