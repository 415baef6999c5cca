"""The Trainer's loops that validate, test and predict, where ranks have different numbers of batches."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_mics.core.joined import counted_length
from lightning_mics.core.unequal import UnequalPasses, lengths_differ


def allow_unequal_batches(loop: Any, model: nn.Module) -> None:
    """Lets ranks end a loop after different numbers of batches, where its loaders have them. Collective.

    Args:
        loop: The loop, whose loaders and fetcher are there.
        model: The LightningModule, sharded.
    """
    loaders = zip(loop._combined_loader.flattened, loop.max_batches, strict=True)  # which end at a limit as well
    if lengths_differ(model, [None if counted_length(loader) is None else int(most) for loader, most in loaders]):
        fetcher = loop._data_fetcher
        fetcher.__class__ = _waiting(type(fetcher), UnequalPasses(model))


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
