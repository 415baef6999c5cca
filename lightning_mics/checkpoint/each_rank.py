"""States of which each rank has its own: the places that data loaders have come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_mics.checkpoint import ranks
from lightning_mics.errors import CheckpointError

KEY = "dataloaders"  # in a checkpoint's "mics": by rank, the states of its loaders by name


def numbered(loaders: Any) -> dict[str, Any]:
    """Returns a loader, or those of a list, by the names of their places in it."""
    listed = loaders if isinstance(loaders, list | tuple) else [loaders]
    return {str(index): loader for index, loader in enumerate(listed)}


def states_of_ranks(loaders: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what loaders have come to on all ranks, as an entry of a checkpoint's ``"mics"``. Collective.

    Args:
        loaders: This rank's; without any there is no entry.
    """
    states = ranks.together(lambda: {name: loader.state_dict() for name, loader in loaders.items()})
    return {KEY: states} if any(states) else {}


def own_states(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns this rank's states by name; ``None`` if the checkpoint holds none.

    Raises:
        CheckpointError: If they are those of another number of ranks.
    """
    states = meta.get("mics", {}).get(KEY)
    if states is None:
        return None
    if len(states) != ranks.world_size():
        raise CheckpointError(
            f"The checkpoint holds the places of data loaders on {len(states)} ranks, and here are "
            f"{ranks.world_size()}, which read other parts of the data. Resume in the middle of an epoch on "
            f"{len(states)} ranks; on others, resume from a checkpoint of the end of an epoch, or leave loaders out."
        )
    own: dict[str, Any] = states[ranks.rank()]
    return own


def load_states(meta: Mapping[str, Any], loaders: Mapping[str, Any]) -> None:
    """Takes loaders to the places that they had come to. Collective over the world.

    Raises:
        CheckpointError: On every rank, if the checkpoint was saved by another number of ranks or of loaders.
    """
    states = own_states(meta) or {}
    if states.keys() != loaders.keys():
        raise CheckpointError(
            f"The checkpoint holds the places of {len(states)} data loader(s), and {len(loaders)} are to be taken to "
            "them. Give the loaders that were saved, in the same order."
        )
    ranks.on_each_rank(lambda: [loader.load_state_dict(states[name]) for name, loader in loaders.items()])
