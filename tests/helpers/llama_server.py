"""The small server of ``vllm_protocol`` with a real model: transformers' Llama, over weights it is sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.vllm_protocol import TableServer


class LlamaServer(TableServer):
    """Knows the configuration in ``directory``, and no weights before an update."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).float().eval()

    def loaded(self, tensors: dict[str, np.ndarray]) -> None:
        named = {name: torch.from_numpy(tensor.astype(np.float32)) for name, tensor in tensors.items()}
        missing, unexpected = self._model.load_state_dict(named, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        self._model.tie_weights()

    def logits(self, history: list[int]) -> np.ndarray:
        with torch.no_grad():
            found: torch.Tensor = self._model(torch.tensor([history])).logits[0, -1]
        return found.double().numpy()
