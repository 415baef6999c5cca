"""What is known of shards, by shard, and how PyTorch may swap them all the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_NOTES: list[Any] = []


def notes_by_shard() -> Any:
    """Returns a map from shards, by identity, that keeps none of them alive."""
    _NOTES.append(WeakIdKeyDictionary())
    return _NOTES[-1]


@contextmanager
def unnoted(shards: Iterable[Tensor]) -> Iterator[None]:
    """Lets ``module.to()`` swap what shards hold, which PyTorch refuses while there are weak references to them."""
    kept = [(notes, shard, notes.pop(shard)) for shard in shards for notes in _NOTES if shard in notes]
    try:
        yield
    finally:
        for notes, shard, note in kept:
            notes[shard] = note
