"""Checkpoints: sharded ones by DCP, full ones as a single file, both written whole or not at all.

The layout is that of Lightning: a folder of DCP shards with the keys ``state_dict``, ``optimizer_0`` and so on, beside
a ``meta.pt`` with the rest; or one file with ``state_dict`` and ``optimizer_states``. A manifest (``mics.json``) lists
sizes and checksums.
"""

from __future__ import annotations

from lightning_mics.checkpoint.background import (
    PendingCheckpoint,
    afterwards,
    remove,
    wait_for_checkpoints,
    was_saved_last,
)
from lightning_mics.checkpoint.beside import made_whole, sharded_again
from lightning_mics.checkpoint.consolidate import consolidate, read_weights
from lightning_mics.checkpoint.content import (
    compare_checkpoints,
    describe_checkpoint,
    list_checkpoints,
    verify_checkpoint,
)
from lightning_mics.checkpoint.each_rank import load_states, own_states, states_of_ranks
from lightning_mics.checkpoint.files import recover
from lightning_mics.checkpoint.generation import local_copy
from lightning_mics.checkpoint.load import fill_weights, load_checkpoint, load_into, load_raw, load_rest
from lightning_mics.checkpoint.moments import fill_optimizer
from lightning_mics.checkpoint.save import save_checkpoint, save_folder, save_full, save_sharded
from lightning_mics.checkpoint.state import (
    arrival,
    huggingface_metadata,
    model_state,
    optimizer_state,
    shard_like,
    whole,
)
from lightning_mics.checkpoint.storage import Place, Remote, local_place, place
from lightning_mics.checkpoint.trust import read_file

__all__ = [
    "PendingCheckpoint",
    "Place",
    "Remote",
    "afterwards",
    "arrival",
    "compare_checkpoints",
    "consolidate",
    "describe_checkpoint",
    "fill_optimizer",
    "fill_weights",
    "huggingface_metadata",
    "list_checkpoints",
    "load_checkpoint",
    "load_into",
    "load_raw",
    "load_rest",
    "load_states",
    "local_copy",
    "local_place",
    "made_whole",
    "model_state",
    "optimizer_state",
    "own_states",
    "place",
    "read_file",
    "read_weights",
    "recover",
    "remove",
    "save_checkpoint",
    "save_folder",
    "save_full",
    "save_sharded",
    "shard_like",
    "sharded_again",
    "states_of_ranks",
    "verify_checkpoint",
    "wait_for_checkpoints",
    "was_saved_last",
    "whole",
]
