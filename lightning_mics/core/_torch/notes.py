"""What is known of shards, by shard, and how PyTorch may swap them all the same."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.utils.weak import WeakIdKeyDictionary

from lightning_mics.core._needs import require

require(FSDPModule, "_apply")

_NOTES: list[Any] = []


def notes_by_shard() -> Any:
    """Returns a map from shards, by identity, that keeps none of them alive."""
    _NOTES.append(WeakIdKeyDictionary())
    return _NOTES[-1]


def apply_to_shards(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands behind ``module.to()``: PyTorch refuses to swap what shards hold while there are notes on them."""
    shards = list(module.parameters())
    kept = [(notes, shard, notes.pop(shard)) for shard in shards for notes in _NOTES if shard in notes]
    try:
        return FSDPModule._apply(module, *args, **kwargs)
    finally:
        for notes, shard, note in kept:
            notes[shard] = note
