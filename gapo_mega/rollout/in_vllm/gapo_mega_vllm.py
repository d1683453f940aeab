"""What runs inside vLLM: a weight transfer engine of its kind that takes new weights from files.

vLLM alone imports this file, in an environment of its own (``--worker-extension-cls`` with this folder on
PYTHONPATH), so it imports nothing of gapo_mega. Written against vLLM 0.32, whose own engines
(``vllm/distributed/weight_transfer``) want GPUs on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


@dataclass
class FilesInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: there is nobody to meet."""


@dataclass
class FilesUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A piece of the weights: a safetensors file of whole tensors, by Hugging Face names."""

    path: str


class FilesEngine(WeightTransferEngine[FilesInitInfo, FilesUpdateInfo]):  # type: ignore[misc]
    """Layer by layer, new weights replace the old ones in place."""

    init_info_cls = FilesInitInfo
    update_info_cls = FilesUpdateInfo

    def init_transfer_engine(self, init_info: FilesInitInfo) -> None:
        """Nothing is needed before the first file."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if torch.accelerator.is_available():  # else there is none to wait for, which the inherited one does
            super().update_weights(update_info)
        else:
            self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FilesUpdateInfo) -> None:
        with safe_open(update_info.path, "pt") as file:
            names = list(file.keys())
            self.model.load_weights((name, file.get_tensor(name)) for name in names)

    def finish_weight_update(self) -> None:
        """Process what layers were not complete."""
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_heads(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""


def _repack_heads(model: Any) -> None:
    """On CPUs an output layer multiplies by a packed copy of its weight.

    Where that weight is the embedding's, no tensor of an update names the output layer, and vLLM leaves it
    with the copy of the old weight.
    """
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            layer.quant_method.process_weights_after_loading(layer)


class Imported:
    """What ``--worker-extension-cls`` names, so that workers import this file before they load a model."""


WeightTransferEngineFactory.register_engine("gapo_files", FilesEngine)
