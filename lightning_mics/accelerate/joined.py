"""Prepared loaders of which ranks have different numbers of training batches, so that all ranks end together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.data_loader import DataLoaderShard
from torch import nn

from lightning_mics.core.joined import JoinedLoader, Microstep


class JoinedShard(DataLoaderShard):
    """Accelerate's loader of a rank, over batches of which all ranks have as many while models train."""

    base_dataloader: _Base

    @classmethod
    def over(cls, loader: DataLoaderShard, trained: Callable[[], nn.Module | None]) -> JoinedShard:
        """Takes the place of a prepared loader.

        Args:
            loader: The loader.
            trained: Returns what is trained with its batches; ``None`` where ranks may read as they like.
        """
        joined: JoinedShard = object.__new__(cls)
        joined.__dict__.update(loader.__dict__)
        joined.base_dataloader = _Base(loader.base_dataloader, trained)
        return joined

    def __iter__(self) -> Iterator[Any]:
        base, skipped = self.base_dataloader, self.skip_batches
        base.weights.clear()
        try:
            for batch in super().__iter__():
                for _ in range(skipped):
                    base.weights.popleft()
                skipped, weight = 0, base.weights.popleft()
                base.count(weight)
                yield batch
        finally:
            base.count(1.0)


class _Base(JoinedLoader):
    """What a prepared loader reads from, one batch ahead of what it hands out.

    Attributes:
        weights: What the batches count that were read and not handed out.
    """

    def __init__(self, loader: Any, trained: Callable[[], nn.Module | None]) -> None:
        self.weights: deque[float] = deque()
        self._set(loader, trained)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # as Accelerate's own: code asks whether it is a DataLoader
        return type(self.loader)

    def _hand_out(self, step: Microstep) -> None:
        self.weights.append(step.weight)

    def count(self, weight: float) -> None:
        """Says what the batch counts that is handed out."""
        self._weigh(weight)
