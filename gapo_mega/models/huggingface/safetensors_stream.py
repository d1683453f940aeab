"""Safetensors files written one tensor at a time, so that a file may be larger than memory.

The format (https://github.com/huggingface/safetensors#format): the header's length in 8 bytes, little
endian; the header, a JSON object of types, shapes and byte ranges; the tensors' bytes. Everything in the
header is known before the first tensor is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def num_bytes(tensor: Tensor) -> int:
    """Size of a tensor's elements; tensors on the meta device have one, too."""
    return tensor.numel() * tensor.element_size()


def write_safetensors(
    path: Path, promised: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write one file.

    Args:
        promised: shape and type of every tensor, in the order in which they come (meta tensors will do).
        tensors: the tensors themselves, each dropped once it is written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in promised.items():
        start, end = end, end + num_bytes(tensor)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        expected = iter(promised.items())
        for name, tensor in tensors:
            promised_name, like = next(expected)
            kept = name == promised_name and tensor.shape == like.shape and tensor.dtype == like.dtype
            assert kept, f"{name}: not what the header promises"
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        assert next(expected, None) is None, "tensors that the header promises did not come"
