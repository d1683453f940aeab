"""What data sheets say of NVIDIA's GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """``peak_flops``: dense bf16 FLOP/s; ``bandwidth``: bytes a second of its memory."""

    peak_flops: float
    bandwidth: float


# Data sheets print twice these FLOP/s "with sparsity". First match wins, so the slower variants of a family
# stand before it.
_DEVICES: tuple[tuple[str, Device], ...] = (
    (r"\bA100\b.*\b40GB\b", Device(312e12, 1.555e12)),
    (r"\bA100\b", Device(312e12, 2.039e12)),
    (r"\bH100 PCIe\b", Device(756e12, 2.0e12)),
    (r"\bH100 NVL\b", Device(835.5e12, 3.9e12)),
    (r"\bH100\b", Device(989.5e12, 3.35e12)),
    (r"\bH200 NVL\b", Device(835.5e12, 4.8e12)),
    (r"\bH200\b", Device(989.5e12, 4.8e12)),
    (r"\bGB200\b", Device(2500e12, 8.0e12)),
    (r"\bB200\b", Device(2250e12, 8.0e12)),
)
NAMES = ("A100", "H100", "H100 PCIe", "H100 NVL", "H200", "H200 NVL", "B200", "GB200")


def known(name: str) -> Device | None:
    """A device by its short name, or by what ``torch.cuda.get_device_name`` calls it.

    None where it is not in the table, and for a slice of a device (MIG), whose speed the name does not tell.
    """
    if re.search(r"\bMIG\b", name):
        return None
    return next((device for pattern, device in _DEVICES if re.search(pattern, name)), None)
