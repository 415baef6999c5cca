"""Where DTensor silently does less than is asked: ``.item()`` of what is not replicated, ``.data = x``, some writes.

Tensors on meshes of sharded models answer for the whole; others are DTensor's own.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.device_mesh import DeviceMesh

from lightning_mics.core._needs import gone, require
from lightning_mics.core._torch.notes import notes_by_shard
from lightning_mics.errors import MiCSError

try:
    from torch._decomp import decomposition_table
    from torch._ops import OpOverload
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._dispatch import OpDispatcher
    from torch.utils._pytree import tree_map_only
except ImportError as error:
    raise gone(error) from error

require(DTensor, "_op_dispatcher", "_local_tensor", "_spec")
require(OpDispatcher, "_custom_op_handlers")
require(DTensor._op_dispatcher, "sharding_propagator")

_MESHES: weakref.WeakKeyDictionary[DeviceMesh, Callable[[], AbstractContextManager[None]]]
_MESHES = weakref.WeakKeyDictionary()

# What follows the local tensor of a shard; by identity, as tensors compare element by element.
_FOLLOWERS = notes_by_shard()

# What optimizers call for each parameter, and nobody for rows: looking at a write takes a third of its time.
_OF_OPTIMIZERS = {"addcmul_", "addcdiv_", "lerp_"}

_plain_data: Any = torch.Tensor.data

_scalar = torch.ops.aten._local_scalar_dense.default


def answer_for_the_whole(
    shards: Iterable[Tensor], around: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Makes DTensors on the meshes of shards give the value of the whole where DTensor gives that of the shard.

    ``.item()``, ``float()`` and ``if`` reduce over the mesh, a collective; ``.data = x`` has effect.

    Args:
        shards: Shards of the meshes.
        around: Makes the context in which ``full_tensor()`` communicates.
    """
    for shard in shards:
        if isinstance(shard, DTensor):
            _MESHES[shard.device_mesh] = around  # which lives as long as shards on it
    _install()


def follow_data(shard: Tensor, follower: Callable[[], None]) -> None:
    """Calls ``follower`` when a shard was given another local tensor by ``.data = x``."""
    _FOLLOWERS[shard] = follower


@functools.cache
def _install() -> None:
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    handlers[_scalar] = _scalar_of_whole
    known = _in_place_operations()
    for op in known:
        handlers.setdefault(op, _write)
    for op in decomposition_table:  # what DTensor works out of other operations, it writes into copies
        if isinstance(op, OpOverload) and op not in known and _writes(op):
            handlers.setdefault(op, _write_by_the_whole)
    DTensor.data = property(_get_data, _set_data)  # type: ignore[assignment]
    whole = DTensor.full_tensor  # as it is now: others wrap it too, before or after

    @functools.wraps(whole)
    def full_tensor(tensor: DTensor, **kwargs: Any) -> Tensor:
        with _MESHES.get(tensor.device_mesh, nullcontext)():
            return whole(tensor, **kwargs)

    DTensor.full_tensor = full_tensor  # type: ignore[assignment,method-assign]


def _scalar_of_whole(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value: DTensor = args[0]
    local = value._local_tensor
    if value.device_mesh not in _MESHES or all(place.is_replicate() for place in value.placements):
        return local.item()
    if local.dtype is torch.bool:  # sums of truth values
        whole = DTensor.from_local(local.int(), value.device_mesh, value.placements, run_check=False)
        return bool(whole.full_tensor().item())
    return value.full_tensor().item()


def _in_place_operations() -> set[Any]:
    """Returns those that DTensor knows, which are what tables of its propagator of shardings have as keys."""
    tables = [table for table in vars(DTensor._op_dispatcher.sharding_propagator).values() if isinstance(table, dict)]
    return {op for table in tables for op in table if isinstance(op, OpOverload) and _writes(op)}


def _writes(op: OpOverload) -> bool:
    name = op.name().split("::")[-1].split(".")[0]
    return name.endswith("_") and name not in _OF_OPTIMIZERS and (name.startswith("_foreach_") or name[0] != "_")


@torch.no_grad()
def _write_by_the_whole(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Writes to the whole of a shard, of which this rank keeps its part. Collective over the mesh."""
    written = args[0]
    if not isinstance(written, DTensor) or written.device_mesh not in _MESHES:
        return _as_is(op, args, kwargs)
    _refuse_copy(written)
    whole = tree_map_only(DTensor, lambda shard: shard.full_tensor(), (args, kwargs))
    written._local_tensor.copy_(_sharded_alike(written, op(*whole[0], **whole[1]))._local_tensor)
    increment_version(written)
    return written


def _as_is(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation as if nobody looked at it."""
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    handler = handlers.pop(op, None)  # or it would come back here
    try:
        return op(*args, **kwargs)
    finally:
        handlers[op] = handler


def _write(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Refuses a write that would be lost; has one to many tensors count for each, as it does for plain tensors."""
    written = [args[0]] if isinstance(args[0], Tensor) else args[0]
    for tensor in written:
        _refuse_copy(tensor)
    result = None
    for some in _by_kind(args) if written is args[0] else [args]:
        result = _as_is(op, some, kwargs)
    if written is args[0]:
        increment_version([tensor for tensor in written if isinstance(tensor, DTensor) and not tensor.is_inference()])
    return result


def _by_kind(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yields the arguments of an operation on lists for shards, and for what is whole beside them."""
    sharded = [isinstance(tensor, DTensor) for tensor in args[0]]
    if all(sharded) or not any(sharded):
        yield args
        return
    for kind in (True, False):
        yield tuple(
            [item for item, is_sharded in zip(arg, sharded, strict=True) if is_sharded is kind]
            if isinstance(arg, list | tuple) and len(arg) == len(sharded)
            else arg
            for arg in args
        )


def _refuse_copy(written: Tensor) -> None:
    base = written._base
    if not isinstance(base, DTensor) or not isinstance(written, DTensor) or base.device_mesh not in _MESHES:
        return
    if written._local_tensor.untyped_storage()._cdata != base._local_tensor.untyped_storage()._cdata:
        raise MiCSError(
            f"A part of shape {tuple(written.shape)} of a sharded tensor of shape {tuple(base.shape)} was written. "
            "Such a part is gathered from all ranks, a copy, so the write would be lost. Write the whole: "
            "values = param.full_tensor(); values[0] = 0; param.data = values."
        )


def _get_data(tensor: DTensor) -> Tensor:
    """Returns what shares memory and version with a tensor, so that writes to it are noticed."""
    if tensor.device_mesh in _MESHES:
        return tensor.detach()
    plain: Tensor = _plain_data.__get__(tensor)
    return plain


def _set_data(tensor: DTensor, value: Tensor) -> None:
    if tensor.device_mesh not in _MESHES:
        _plain_data.__set__(tensor, value)
        return
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise MiCSError(
            f"parameter.data = ... of shape {tuple(value.shape)} and {value.dtype}, but the sharded parameter has "
            f"{tuple(tensor.shape)} and {tensor.dtype}. Assign the same shape and dtype, or change the model before "
            "mics_shard."
        )
    local = _sharded_alike(tensor, value.detach())._local_tensor.contiguous()
    tensor._local_tensor = local
    increment_version(tensor)  # the memory may be that of an earlier tensor
    follower = _FOLLOWERS.get(tensor)
    if follower is not None:
        follower()


def _sharded_alike(tensor: DTensor, value: Tensor) -> DTensor:
    mesh = tensor.device_mesh
    if not isinstance(value, DTensor):
        value = DTensor.from_local(value.to(tensor.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    if value.placements != tensor.placements:
        value = value.redistribute(placements=tensor.placements)
    return value


def first_row(shard: Tensor) -> int:
    """Returns which row of the whole a shard begins with."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(shard, DTensor)
    _, offset = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
    return int(offset[0])
