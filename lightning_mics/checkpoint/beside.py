"""Shards beside the model, such as averages of weights: whole in a checkpoint, and shards again when it is loaded."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics.checkpoint import ranks
from lightning_mics.checkpoint.state import gathered, shard_like
from lightning_mics.core._torch import keystr, tree_flatten_with_path, tree_leaves, tree_map_only, tree_map_with_path
from lightning_mics.errors import CheckpointError

_MARK = "shards"  # in ``meta["mics"]``: where there were some


class _Finder(pickle.Pickler):
    """Finds the tensors in anything that can be pickled, also in objects that only pickle takes apart."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.found: dict[int, Tensor] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.found[id(obj)] = obj
        return id(obj)


def _tensors(content: Any) -> dict[int, Tensor]:
    with open(os.devnull, "wb") as nowhere:
        finder = _Finder(nowhere)
        with suppress(Exception):  # whoever writes it will say so
            finder.dump(content)
    return {**finder.found, **{id(leaf): leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)}}


def made_whole(content: Any) -> tuple[Any, list[str]]:
    """Returns what is to be written by rank 0 alone, with whole tensors in the place of shards. Collective.

    Returns:
        The content, which other ranks may not use, and where in it there were shards; not those in objects that only
        pickle takes apart.

    Raises:
        CheckpointError: On every rank, if there are shards on some ranks only.
    """
    tensors = _tensors(content)
    shards = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, DTensor)}
    counts = ranks.together(lambda: len(shards))
    if len(set(counts)) > 1:
        few = counts.index(min(counts))
        raise CheckpointError(
            f"rank {few} was given {counts[few]} shard(s) beside the model, and other ranks {max(counts)}. All ranks "
            "must save the same entries: gathering a shard takes all of them"
        )
    if not shards:
        return content, []
    whole: dict[int, Any] = {key: gathered(shard) for key, shard in shards.items()}
    paths = [keystr(path) for path, leaf in tree_flatten_with_path(content)[0] if isinstance(leaf, DTensor)]
    result = tree_map_only(DTensor, lambda shard: whole[id(shard)], content)
    if any(isinstance(tensor, DTensor) for tensor in _tensors(result).values()):  # in objects
        result = copy.deepcopy(content, {**tensors, **whole})  # of tensors, the copy holds these
    return result, paths


def without_shards(content: dict[str, Any]) -> dict[str, Any]:
    """Makes shards in a checkpoint whole, and notes where they were; see :func:`made_whole`. Collective."""
    result, paths = made_whole(content)
    return {**result, "mics": {**result.get("mics", {}), _MARK: paths}} if paths else result


def with_shards(content: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Makes shards of what was made whole when a checkpoint was saved; communicates nothing.

    Args:
        content: The checkpoint's rest.
        model: Its parameters are sharded as these are to be; of a plain one nothing is.
    """
    mics = content.get("mics")
    paths = mics.pop(_MARK, ()) if isinstance(mics, dict) else ()
    return sharded_again(content, paths, model.parameters())


def sharded_again(content: Any, paths: Collection[str], params: Iterable[Tensor]) -> Any:
    """Makes shards of the tensors at some places, each like a parameter of its shape; communicates nothing."""
    like = {param.shape: param.detach() for param in params} if paths else {}

    def put(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or keystr(path) not in paths or leaf.shape not in like:
            return leaf
        return shard_like(leaf, like[leaf.shape]).clone()

    return tree_map_with_path(put, content) if like else content
