"""Which items a data-parallel rank takes at each step: prompts, preference pairs or chats, by number.

Nothing is communicated: every rank knows the whole order, which depends on the seed alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """What errors say about the items of one kind of run."""

    parameter: str  # the one that sets the batch size
    accepted: str  # batch sizes; ``{count}`` stands for the number of items


PROMPTS = Wording("rollout.prompts_per_step", "at most the {count} training prompts")
ITEMS = Wording("batch_size", "1 to the {count} training items")


class Order:
    """Which of ``count`` items a data-parallel rank takes at a step: a pure function of seed and step.

    The items are shuffled every epoch; a step takes the next ``batch_size`` of them, all different, and the
    ranks get consecutive equal parts of these, so their union does not depend on the number of ranks. The
    last ``count % batch_size`` items of an epoch's order are not used in it. Callers may ask for any step,
    in any order, so a run resumes by its step number alone.

    Args:
        count: the number of items.
        batch_size: items of a step over all ranks.
        shuffle: false: every epoch takes the items as they are numbered.
        wording: the names in errors.

    Raises:
        ValueError: the ranks cannot share a step equally, or a step takes more items than there are.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        data_rank: int,
        data_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        wording: Wording = ITEMS,
    ) -> None:
        if batch_size % data_size:
            raise ValueError(
                f"{wording.parameter}: found {batch_size}, accepted for {data_size} data-parallel ranks: a "
                f"multiple of {data_size}"
            )
        if not 1 <= batch_size <= count:
            raise ValueError(
                f"{wording.parameter}: found {batch_size}, accepted: {wording.accepted.format(count=count)}"
            )
        assert 0 <= data_rank < data_size
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        share = batch_size // data_size
        self._share = slice(data_rank * share, (data_rank + 1) * share)
        self._epoch_order: tuple[int, list[int]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which the items are shuffled again."""
        return self.count // self.batch_size

    def items(self, step: int) -> list[int]:
        """This rank's ``batch_size / data_size`` items of ``step``, which counts from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return self._order(epoch)[start : start + self.batch_size][self._share]

    def _order(self, epoch: int) -> list[int]:
        if self._epoch_order[0] != epoch:
            order = list(range(self.count))
            if self.shuffle:
                random.Random(f"epoch-{self.seed}-{epoch}").shuffle(order)
            self._epoch_order = (epoch, order)
        return self._epoch_order[1]
