"""The Trainer's loops that validate, test and predict, where ranks have different numbers of batches."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.data import sized_len
from torch import nn
from torch.utils.data import IterableDataset

from lightning_mics.core.unequal import UnequalPasses, lengths_differ


def allow_unequal_batches(loop: Any, model: nn.Module) -> None:
    """Lets ranks end a loop after different numbers of batches, where its loaders have them. Collective.

    Args:
        loop: The loop, whose loaders and fetcher are there.
        model: The LightningModule, sharded.
    """
    if lengths_differ(model, [_known_length(*pair) for pair in zip(_loaders(loop), loop.max_batches, strict=True)]):
        fetcher = loop._data_fetcher
        fetcher.__class__ = _waiting(type(fetcher), UnequalPasses(model))


def _loaders(loop: Any) -> list[Any]:
    return list(loop._combined_loader.flattened)


def _known_length(loader: Any, max_batches: float) -> int | None:
    """Returns a loader's number of batches; one of an iterable dataset may end before its length, and a limit."""
    is_known = sized_len(loader) is not None and not isinstance(getattr(loader, "dataset", None), IterableDataset)
    return int(max_batches) if is_known else None


def _waiting(kind: Any, passes: UnequalPasses) -> type:
    """Returns a kind of fetchers that waits for other ranks where its loop ends, or goes to the next loader.

    There the loop reduces metrics over all ranks.
    """
    last = 0

    class Waiting(kind):
        def __next__(self) -> Any:
            nonlocal last
            try:
                fetched = super().__next__()
            except StopIteration:
                passes.end_loop()
                passes.close()
                raise
            loader = fetched[2] if isinstance(fetched, tuple) else last
            if loader != last:
                passes.end_part()
            last = loader
            return fetched

        def teardown(self) -> None:
            passes.close()  # after an error
            super().teardown()

    return Waiting
