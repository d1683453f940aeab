"""How many checkpoints of a run are kept: a number of them, or as many as fit into so many bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gapo_mega.config import CheckpointConfig
from gapo_mega.planning.disk import GB


@dataclass(frozen=True)
class Keep:
    """``checkpoint.keep`` and ``checkpoint.keep_gb``.

    Attributes:
        count: of complete checkpoints; not used with ``gigabytes``.
        gigabytes: of 1e9 bytes, that complete checkpoints may take together.
    """

    count: int = 1
    gigabytes: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"checkpoint.keep: found {self.count}, accepted: at least 1")

    @classmethod
    def of(cls, settings: CheckpointConfig) -> Keep:
        """What the configuration says."""
        return cls(settings.keep, settings.keep_gb)

    def __str__(self) -> str:
        if self.gigabytes is None:
            return f"checkpoint.keep {self.count}"
        return f"checkpoint.keep_gb {self.gigabytes:g}"

    def surplus(self, steps: Sequence[int], size_of: Callable[[int], int]) -> list[int]:
        """Of ``steps``, ascending, those whose checkpoints go. The newest never does.

        ``size_of``: the bytes of a step's checkpoint.
        """
        if self.gigabytes is None:
            return list(steps[: -self.count])
        left = self.gigabytes * GB
        for index in reversed(range(len(steps))):
            left -= size_of(steps[index])
            if left < 0 and index < len(steps) - 1:
                return list(steps[: index + 1])
        return []
