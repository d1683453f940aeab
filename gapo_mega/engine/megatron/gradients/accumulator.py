"""Adds per-sequence weight gradients to the rows of all objectives, without ever holding them whole.

Let ``p[s]`` be the gradient of a weight that sequence s has in a backward pass. Row k needs
``sum_s a_k[s] p[s]``. For a linear layer ``p[s] = dY_s' X_s``. A tile of it for all sequences of the
microbatch stays in the cache, and ``ops.accumulate_`` adds it to all rows: ``2 B T + 2 M B`` operations a
weight, where one gradient takes ``2 B T``.

Of short sequences a tile is little work and much memory. There row k takes a product of its own,
``sum_s (a_k[s] dY_s)' X_s``: ``2 M B T`` operations, and no tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gapo_mega import ops
from gapo_mega.engine.megatron.gradients.row_sequences import RowSequences
from gapo_mega.engine.megatron.gradients.sharers import Sharers
from gapo_mega.engine.megatron.gradients.whole_rows import WholeRows

# Elements of a tile of all sequences together: 8 MiB of float32 stay in a CPU's caches, and smaller products
# are slower (half of it by up to 1.3 times); a GPU's need to be larger.
_TILE = {"cpu": 1 << 21, "cuda": 1 << 24}
_LEAST_WIDTH = 16  # rows of a weight in a tile
# Tiles cost about ``T + c`` for each sequence, products for every row ``M T``: these win where T (M - 1) < c.
# c in tokens: 40 to 54 on two cores and 7 on one (benchmarks/one_pass_forms.py); for CUDA by arithmetic,
# writing and reading a bf16 tile at 3.3 TB/s against products at 400 TFLOP/s, not yet run.
_SHORT = {"cpu": 32, "cuda": 256}


class Accumulator:
    """The rows of one update, and the coefficients of the pass that is being differentiated."""

    def __init__(
        self, rows: WholeRows, tensor: int = 1, tensor_rank: int = 0, sharers: Sharers | None = None
    ) -> None:
        """``tensor``, ``tensor_rank``: tensor-parallel ranks, and which one this is.

        ``sharers``: of trained experts; None: this rank alone.
        """
        self._rows = rows
        self._tensor, self._tensor_rank = tensor, tensor_rank
        self._sharers = sharers or Sharers()
        self._written: set[nn.Parameter] = set()
        self._only: int | None = None
        self._coefficients_MB = torch.empty(0)
        self._of_sharers_MB = torch.empty(0)
        self._sequences: dict[int, RowSequences] = {}  # by the number of rows; empty: no packed microbatch
        self.output_rows: RowSequences | None = None  # None: as all others
        # Fresh memory for every tile would cost as much as half of the product: the system zeroes it.
        self._scratch: dict[torch.dtype, Tensor] = {}

    def start(self) -> None:
        """Forget the gradients of the last update: the next addition to a parameter overwrites them."""
        self._written.clear()

    def take(self, coefficients_MB: Tensor, device: torch.device, only: int | None = None) -> None:
        """The coefficients that hold for what is added from now on; ``only``: as in ``Factor``.

        Collective over the data ranks that share trained experts.
        """
        self._only = only
        self._coefficients_MB = coefficients_MB.float().to(device)
        self._of_sharers_MB = self._sharers.coefficients(self._coefficients_MB)

    def take_positions(self, numbers_S: Tensor | None, device: torch.device) -> None:
        """The sequence that each position is of, on the host; None: the microbatch is not packed."""
        self._sequences = {}
        if numbers_S is not None:
            rows = [numbers_S]
            # Under sequence parallelism, whose widths are multiples, modules see this rank's part.
            if len(numbers_S) % self._tensor == 0:
                rows.insert(0, numbers_S.chunk(self._tensor)[self._tensor_rank])
            for numbers_R in rows:
                self._sequences[len(numbers_R)] = RowSequences.of(numbers_R).to(device)

    def numbers(self, rows_SBX: Tensor) -> Tensor:
        """int64 ``[S B]``: of which sequence each row is, among those of all sharers."""
        columns, sequences = rows_SBX.shape[:2]
        if self._sequences:
            own_N = self._sequences[columns].numbers_R
        else:
            own_N = torch.arange(sequences, device=rows_SBX.device).repeat(columns)
        return self._sharers.number(own_N)

    def take_output_rows(self, numbers_R: Tensor) -> None:
        """As ``take_positions``, for the rows that the output layer's next forward gets."""
        self.output_rows = RowSequences.of(numbers_R)

    def linear(
        self, weight: nn.Parameter, input_SBI: Tensor, grad_SBO: Tensor, rows: RowSequences | None = None
    ) -> None:
        """Add the gradient of ``output = input @ weight.t()``.

        ``rows``: whose the S rows are, if they are packed and not all positions. There may be none.
        """
        if len(input_SBI) == 0:
            return
        beta = self._beta(weight)
        rows = rows or self._sequences.get(len(input_SBI))
        assert rows is not None or not self._sequences, input_SBI.shape
        if self._only is not None:
            self._add_alone(weight, _product(grad_SBO, input_SBI).view(-1), beta)
        elif rows is not None:
            self._packed_linear(weight, input_SBI, grad_SBO, beta, rows)
        elif is_short(input_SBI.shape[0], len(self._coefficients_MB), input_SBI.device.type):
            self.linear_by_row(weight, input_SBI, grad_SBO, beta)
        else:
            self.linear_by_tile(weight, input_SBI, grad_SBO, beta)

    def _packed_linear(
        self,
        weight: nn.Parameter,
        input_S1I: Tensor,
        grad_S1O: Tensor,
        beta: float,
        rows: RowSequences,
    ) -> None:
        mean = len(input_S1I) // max(1, len(rows.runs or ()))
        if rows.runs is None or is_short(mean, len(self._coefficients_MB), input_S1I.device.type):
            self.linear_by_row(weight, input_S1I, grad_S1O, beta, rows)
        else:
            self.packed_by_tile(weight, input_S1I, grad_S1O, beta, rows)

    def packed_by_tile(
        self,
        weight: nn.Parameter,
        input_S1I: Tensor,
        grad_S1O: Tensor,
        beta: float,
        rows: RowSequences,
    ) -> None:
        """``linear_by_tile`` for packed rows: a product for each sequence, of the rows that are its own."""
        assert rows.runs is not None
        input_SI, grad_SO = rows.in_runs(input_S1I.squeeze(1)), rows.in_runs(grad_S1O.squeeze(1))
        width, out = input_SI.shape[1], grad_SO.shape[1]
        present = [number for number, _, _ in rows.runs]
        coefficients_MB = self._coefficients_of(rows)[:, present]
        step = max(_LEAST_WIDTH, _TILE[input_SI.device.type] // (len(present) * width))
        for first in range(0, out, step):
            end = min(out, first + step)
            tile_BOI = self._tile((len(present), end - first, width), input_SI)
            for tile_OI, (_, start, stop) in zip(tile_BOI, rows.runs, strict=True):
                torch.mm(grad_SO[start:stop, first:end].t(), input_SI[start:stop], out=tile_OI)
            self._add(weight, first * width, tile_BOI.view(len(present), -1), beta, coefficients_MB)

    def linear_by_row(
        self,
        weight: nn.Parameter,
        input_SBI: Tensor,
        grad_SBO: Tensor,
        beta: float,
        rows: RowSequences | None = None,
    ) -> None:
        """One product for each row, of gradients scaled by its coefficients."""
        coefficients_MB = self._coefficients_of(rows)
        for row, coefficient_B in zip(self._views(weight), coefficients_MB, strict=True):
            factor = coefficient_B[None] if rows is None else coefficient_B[rows.numbers_R, None]
            scaled_SBO = (grad_SBO * factor[:, :, None]).to(grad_SBO.dtype)
            gradient_N = _product(scaled_SBO, input_SBI).view(-1)
            row.copy_(gradient_N) if beta == 0.0 else row.add_(gradient_N)

    def linear_by_tile(self, weight: nn.Parameter, input_SBI: Tensor, grad_SBO: Tensor, beta: float) -> None:
        """One product for each sequence and tile of the weight, added to all rows."""
        _, sequences, width = input_SBI.shape
        out = grad_SBO.shape[-1]
        step = max(_LEAST_WIDTH, _TILE[input_SBI.device.type] // (sequences * width))
        input_BSI = input_SBI.transpose(0, 1).contiguous()  # once: it is read for every tile
        for start in range(0, out, step):
            end = min(out, start + step)
            grad_BSO = grad_SBO[:, :, start:end].transpose(0, 1)
            if input_SBI.dtype != torch.float32:
                grad_BSO = grad_BSO.contiguous()  # products of other types would copy it element by element
            tile_BOI = self._tile((sequences, end - start, width), input_SBI)
            torch.bmm(grad_BSO.transpose(1, 2), input_BSI, out=tile_BOI)
            self._add(weight, start * width, tile_BOI.view(sequences, -1), beta, self._coefficients_MB)

    def over_positions(
        self, parameter: nn.Parameter, terms_SBN: Tensor, rows: RowSequences | None = None
    ) -> None:
        """Add a gradient that is a sum over positions; ``rows``: as for ``linear``."""
        rows = rows or self._sequences.get(len(terms_SBN))
        if rows is None:
            self.per_sequence(parameter, terms_SBN.sum(dim=0))
        else:
            sequences = self._coefficients_MB.shape[1]
            self.per_sequence(parameter, rows.sums(terms_SBN.squeeze(1), sequences))

    def per_sequence(self, parameter: nn.Parameter, gradient_BN: Tensor) -> None:
        """Add the gradient of each sequence of the microbatch."""
        beta = self._beta(parameter)
        if self._only is None:
            self._add(parameter, 0, gradient_BN.contiguous(), beta, self._coefficients_MB)
        else:
            self._add_alone(parameter, gradient_BN.float().sum(dim=0), beta)

    def embedding(self, weight: nn.Parameter, ids_BS: Tensor, here_BS: Tensor, grad_BSD: Tensor) -> None:
        """Add the gradients of the weight's rows ``ids_BS`` where ``here_BS``."""
        ids_N, grad_ND = ids_BS[here_BS], grad_BSD[here_BS]
        sequence_N, position_N = here_BS.nonzero(as_tuple=True)
        if self._sequences:
            sequence_N = self._sequences[here_BS.shape[1]].numbers_R[position_N]
        if self._beta(weight) == 0.0:
            for row in self._views(weight):
                row.zero_()
        for index, (row, coefficient_B) in enumerate(
            zip(self._views(weight), self._coefficients_MB, strict=True)
        ):
            if self._only not in (None, index):
                continue
            scaled_ND = grad_ND * coefficient_B[sequence_N, None]
            row.view(weight.shape).index_add_(0, ids_N, scaled_ND.to(row.dtype))

    def finish(self) -> None:
        """Zero what nothing was added to."""
        for parameter in self._rows.parameters:
            if self._beta(parameter) == 0.0:
                for row in self._views(parameter):
                    row.zero_()

    def _tile(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory of this shape that holds until the next call for the same type."""
        dtype, numel = like.dtype, math.prod(shape)
        scratch = self._scratch.get(dtype)
        if scratch is None or scratch.numel() < numel:
            scratch = self._scratch[dtype] = torch.empty(numel, dtype=dtype, device=like.device)
        return scratch[:numel].view(shape)

    def _views(self, parameter: nn.Parameter) -> list[Tensor]:
        """A parameter's elements in the rows of all objectives; the last is Megatron's own."""
        return [*self._rows.of(parameter), parameter.main_grad.view(-1)]  # type: ignore[attr-defined]

    def _beta(self, parameter: nn.Parameter) -> float:
        """What the old content counts: 0 for the first addition of an update, which marks the parameter."""
        first = parameter not in self._written
        self._written.add(parameter)
        return 0.0 if first else 1.0

    def _coefficients_of(self, rows: RowSequences | None) -> Tensor:
        """Of the sequences that the numbers of ``rows`` count."""
        return self._of_sharers_MB if rows is not None and rows.of_sharers else self._coefficients_MB

    def _add(
        self, parameter: nn.Parameter, start: int, tile_BN: Tensor, beta: float, coefficients_MB: Tensor
    ) -> None:
        """``coefficients_MB``: of the B sequences that the tile is of."""
        end = start + tile_BN.shape[1]
        others_KN = self._rows.of(parameter)[:, start:end]
        own_N = parameter.main_grad.view(-1)[start:end]  # type: ignore[attr-defined]
        ops.accumulate_([others_KN, own_N], coefficients_MB, tile_BN, overwrite=beta == 0.0)

    def _add_alone(self, parameter: nn.Parameter, gradient_N: Tensor, beta: float) -> None:
        """Add one objective's whole gradient to its row."""
        for index, row in enumerate(self._views(parameter)):
            if index == self._only:
                row.copy_(gradient_N) if beta == 0.0 else row.add_(gradient_N)
            elif beta == 0.0:
                row.zero_()


def is_short(tokens: int, rows: int, device_type: str) -> bool:
    """Whether sequences are so short that products for every row are faster than tiles for all."""
    return tokens * (rows - 1) < _SHORT[device_type]


def _product(grad_SBO: Tensor, input_SBI: Tensor) -> Tensor:
    """The weight's gradient ``[O, I]`` over all tokens and sequences."""
    return grad_SBO.reshape(-1, grad_SBO.shape[-1]).t() @ input_SBI.reshape(-1, input_SBI.shape[-1])
