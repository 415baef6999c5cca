"""``load_from_checkpoint`` of a LightningModule, of a folder of shards as of a file.

Lightning reads the checkpoint with a function of its own and asks no strategy, so that this function is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core import saving
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_mics.checkpoint import place, read_weights


def read_folders() -> None:
    """Makes ``load_from_checkpoint`` read folders of shards; without a process group, and without optimizers."""
    original = saving.pl_load
    if not isinstance(original, _Reader):
        saving.pl_load = _Reader(original)


class _Reader:
    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original

    def __call__(self, path_or_url: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if not isinstance(path_or_url, str | Path) or not _is_folder(path_or_url):
            return self._original(path_or_url, map_location=map_location, weights_only=weights_only)
        checkpoint = read_weights(path_or_url, weights_only=weights_only)
        if isinstance(map_location, str | torch.device):  # otherwise the host's memory
            checkpoint = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.to(map_location))
        return checkpoint


def _is_folder(path: str | Path) -> bool:
    return not str(path).startswith("http") and place(path).is_dir()
