"""What generation sees of a chunk of the model, whoever computes it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Rows(Protocol):
    """A lane's rows in one chunk, behind their prompts, with what the chunk remembers of them."""

    def decode(self, inputs: Tensor) -> Tensor:
        """Read one more column: tokens ``[B, 1]``, or hidden states of one column."""
        ...

    def keep(self, index_B: Tensor) -> None:
        """Keep only these rows (int64, on the model's device), in this order."""
        ...


class Chunk(Protocol):
    """One chunk of the model. Takes tokens, or hidden states ``[S, rows, D]`` of the chunk before it.

    Gives hidden states, or behind the last layer the last column's logits ``[rows, V]``, float32, of the
    whole padded vocabulary.

    Attributes:
        takes_tokens: it begins with the embedding.
        gives_logits: it ends with the output layer.
    """

    takes_tokens: bool
    gives_logits: bool

    def prefill(
        self, inputs: Tensor, padding_U: Tensor, inverse_B: Tensor, columns: int
    ) -> tuple[Tensor, Rows]:
        """Read all columns of the U different prompts of a lane.

        Args:
            inputs: tokens ``[U, S]`` int64, or hidden states.
            padding_U: columns of padding on the left, int64.
            inverse_B: int64, the prompt of every row.
            columns: room for those of prompts and responses together.

        Returns the output for the prompts, and the rows.
        """
        ...
