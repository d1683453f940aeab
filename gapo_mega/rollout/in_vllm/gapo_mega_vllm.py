"""What runs inside vLLM: methods of its workers that take new weights from files.

vLLM alone imports this file, in an environment of its own (``--worker-extension-cls`` with this folder on
PYTHONPATH), so it imports nothing of gapo_mega. Written against vLLM 0.32: a session is that of vLLM's own
transfer engines (``vllm/distributed/weight_transfer``), of which none is for CPUs.
"""

from __future__ import annotations

from typing import Any

from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


class TakesWeights:
    """Added to vLLM's worker class; ``/collective_rpc`` calls these on every worker."""

    vllm_config: Any
    model_config: Any
    model_runner: Any

    def gapo_begin_update(self) -> None:
        """Prepare the model for new weights; layer by layer they replace the old ones in place."""
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def gapo_take_weights(self, path: str) -> int:
        """Load the tensors of a safetensors file, whole and by Hugging Face names; their number."""
        with set_current_vllm_config(self.vllm_config), safe_open(path, "pt") as file:
            names = list(file.keys())
            self.model_runner.get_model().load_weights((name, file.get_tensor(name)) for name in names)
        return len(names)

    def gapo_finish_update(self) -> None:
        """Process what layers were not complete, and end the session."""
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_config)
            _repack_heads(model)


def _repack_heads(model: Any) -> None:
    """On CPUs an output layer multiplies by a packed copy of its weight.

    Where that weight is the embedding's, no tensor of an update names the output layer, and vLLM leaves it
    with the copy of the old weight.
    """
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            layer.quant_method.process_weights_after_loading(layer)
