"""Products with the weights of one rollout, which do not change while it lasts.

On a CPU the weights are copied once into the order that oneDNN's kernels read. For the few rows of a decoding
step its products then take 0.55 to 0.9 of the time of ``linear`` on the weights as they lie, in fp32 and in
bf16, and what follows a product (SiLU, a factor, the residual) costs no pass of its own. Elsewhere the
weights are read in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

# oneDNN chooses the order by the number of rows. What it chooses for this many is fast for one and for 2000.
_ROWS = 32


Change = Callable[[Tensor], Tensor]  # of rows x_NK: what is added to a product [N, O]


class Product(Protocol):
    """``x W^T + bias`` of rows ``x_NK``."""

    def __call__(self, x_NK: Tensor) -> Tensor:
        """``[N, O]``"""
        ...

    def plus(self, x_NK: Tensor, other_NO: Tensor) -> Tensor:
        """``self(x_NK) + other_NO``"""
        ...


class Gated(Protocol):
    """``silu(x G^T) * (x U^T)`` of rows ``x_NK``, for a weight that holds G above U."""

    def __call__(self, x_NK: Tensor) -> Tensor:
        """``[N, O]``"""
        ...


def product(weight_OK: Tensor, bias_O: Tensor | None = None) -> Product:
    """With ``weight_OK``, packed where that is faster. A packed one does not follow later changes of it."""
    return _Packed(weight_OK, bias_O) if _can_pack(weight_OK) else _Plain(weight_OK, bias_O)


def with_change(base: Product, change: Change | None) -> Product:
    """A product to whose result a change is added, as adapters make it; None: none is."""
    return base if change is None else _Changed(base, change)


def gated(weight_2OK: Tensor, change: Change | None = None) -> Gated:
    """With a weight whose first half is the gate's and whose second half is the other factor's.

    ``change``: of the weight's product, ``[N, 2 O]``, before anything is made of it.
    """
    if change is not None:
        return _ChangedGated(product(weight_2OK), change)
    return _PackedGated(weight_2OK) if _can_pack(weight_2OK) else _PlainGated(weight_2OK)


def _can_pack(weight: Tensor) -> bool:
    onednn = torch.backends.mkldnn
    available = onednn.is_available() and onednn.enabled  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or not available:
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bf16


class _Plain:
    def __init__(self, weight_OK: Tensor, bias_O: Tensor | None) -> None:
        self._weight_OK, self._bias_O = weight_OK, bias_O

    def __call__(self, x_NK: Tensor) -> Tensor:
        return functional.linear(x_NK, self._weight_OK, self._bias_O)

    def plus(self, x_NK: Tensor, other_NO: Tensor) -> Tensor:
        return self(x_NK).add_(other_NO)


class _PlainGated:
    def __init__(self, weight_2OK: Tensor) -> None:
        self._weight_2OK = weight_2OK

    def __call__(self, x_NK: Tensor) -> Tensor:
        gate_NO, up_NO = functional.linear(x_NK, self._weight_2OK).chunk(2, dim=-1)
        return functional.silu(gate_NO).mul_(up_NO)


class _Changed:
    def __init__(self, base: Product, change: Change) -> None:
        self._base, self._change = base, change

    def __call__(self, x_NK: Tensor) -> Tensor:
        return self._base(x_NK).add_(self._change(x_NK))

    def plus(self, x_NK: Tensor, other_NO: Tensor) -> Tensor:
        return self._base.plus(x_NK, other_NO).add_(self._change(x_NK))


class _ChangedGated:
    def __init__(self, base: Product, change: Change) -> None:
        self._product = _Changed(base, change)

    def __call__(self, x_NK: Tensor) -> Tensor:
        gate_NO, up_NO = self._product(x_NK).chunk(2, dim=-1)
        return functional.silu(gate_NO).mul_(up_NO)


class _Packed:
    def __init__(self, weight_OK: Tensor, bias_O: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OK.detach(), _ROWS)
        self._bias_O = bias_O

    def __call__(self, x_NK: Tensor) -> Tensor:
        return self.then(x_NK, "none")

    def then(self, x_NK: Tensor, function: str) -> Tensor:
        """A function of oneDNN's of the product."""
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x_NK, self._packed, self._bias_O, function, [], "")
        return made

    def plus(self, x_NK: Tensor, other_NO: Tensor) -> Tensor:
        return self.combined(x_NK, other_NO, "add")

    def combined(self, x_NK: Tensor, other_NO: Tensor, operation: str) -> Tensor:
        """An operation of oneDNN's of the product and another tensor."""
        made: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x_NK, other_NO, self._packed, self._bias_O, operation
        )
        return made


class _PackedGated:
    def __init__(self, weight_2OK: Tensor) -> None:
        gate_OK, up_OK = weight_2OK.chunk(2)
        self._gate, self._up = _Packed(gate_OK, None), _Packed(up_OK, None)

    def __call__(self, x_NK: Tensor) -> Tensor:
        return self._up.combined(x_NK, self._gate.then(x_NK, "swish"), "mul")
