"""Masters with their owners: shards in 16 bits, and float32 rows of them with those who step on these rows.

With ``master_weights="owners"`` a partition group keeps its shards in the dtype of ``param_dtype``, in which they are
gathered, and each rank keeps its slice of them (``slices``) in float32, beside the optimizer states, in a DTensor laid
out as these are.

Invariants:

- Optimizers see masters in the place of parameters; what they made of one goes into its shard, rounded, before other
  ranks fetch it. In between the master is *ahead*.
- Where a master is not ahead and the shard is not what it rounds to, somebody has written into the shard, and that
  counts.
- States of a model (``state_dict`` and all that is built on it) have masters, and take what is loaded into them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics.config import MiCSConfig, as_dtype
from lightning_mics.core._torch import (
    UnitParamGroup,
    first_row,
    load_states_as,
    local_tensor,
    notes_by_shard,
    shard_like,
)
from lightning_mics.core.log import inform
from lightning_mics.core.slices import Slices, is_slice, slices_of
from lightning_mics.errors import MiCSConfigError, MiCSError

_MASTERS = notes_by_shard()


@dataclass
class _Master:
    """The master of a shard.

    Attributes:
        rows: This rank's slice.
        is_ahead: Whether the shard is still to get what it rounds to.
    """

    rows: DTensor
    is_ahead: bool = False


def check_masters(config: MiCSConfig) -> None:
    """Checks that the settings leave something to do for ``master_weights``.

    Raises:
        MiCSConfigError: If they do not.
    """
    if config.master_weights == "partition":
        return
    dtype = as_dtype(config.param_dtype)
    problems = {
        "no rank owns less than its shard (optimizer_shard_size='partition'). Use optimizer_shard_size='world'": (
            config.optimizer_shard_size == "partition"
        ),
        f"parameters are computed with as they are (param_dtype={config.param_dtype}). Use param_dtype='bfloat16' or "
        "a precision such as 'bf16-mixed'": dtype is None or dtype.itemsize != 2,
        "shards lie in host memory (cpu_offload=True). Use cpu_offload=False": config.cpu_offload,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise MiCSConfigError(
                "master_weights='owners' keeps shards in 16 bits and float32 with those who step on it, but "
                f"{problem}, or leave master_weights out.",
                setting="master_weights",
            )


@torch.no_grad()
def keep_masters(model: nn.Module, groups: Iterable[UnitParamGroup], slices: Slices) -> None:
    """Narrows shards to the dtype in which they are gathered, and keeps this rank's rows of them as they are.

    Args:
        model: The model.
        groups: The parameters of its units.
        slices: How they are divided.
    """
    made = 0
    for group in groups:
        for param in group.params:
            dtype = param.compute_dtype
            if dtype is None or param.sharded.dtype not in (torch.float32, dtype):
                continue
            made += param.sharded.dtype == dtype
            master = slices.like(param.sharded, slices.local(param.sharded).detach().to(torch.float32, copy=True))
            param.narrow(dtype, master.dtype)
            slices.with_masters.add(param)
            _MASTERS[param.sharded] = _Master(master)
    if made:
        inform(f"master_weights='owners' made float32 masters of {made} parameters that have 16 bits: as they are.")
    for module in model.modules():
        if any(param in _MASTERS for param in module.parameters(recurse=False)):
            module.register_state_dict_post_hook(_put_masters)
            module.register_load_state_dict_pre_hook(_take_values)
    load_states_as(rows_of)


def has_master(param: Tensor) -> bool:
    """Returns whether a parameter is a shard in 16 bits whose float32 rows are with their owners."""
    return _found(param) is not None


@torch.no_grad()
def master_of(param: Tensor) -> DTensor | None:
    """Returns the float32 rows of a shard, up to date; ``None`` for one that is kept as it is."""
    master = _found(param)
    if master is None:
        return None
    if not master.is_ahead:
        rows, own = _slices(param).local(param), local_tensor(master.rows)
        own.copy_(torch.where(rows == own.to(rows.dtype), own, rows.to(own.dtype)))
    return master.rows


@torch.no_grad()
def settle(param: Tensor) -> None:
    """Puts what a master rounds to into this rank's rows of its shard, if it is ahead."""
    master = _found(param)
    if master is not None and master.is_ahead:
        _slices(param).local(param).copy_(local_tensor(master.rows))
        master.is_ahead = False


@torch.no_grad()
def write_master(param: Tensor, value: Tensor) -> None:
    """Puts a whole tensor, or one that is divided in any way, into a master and its shard."""
    tell_of_16_bits(value.dtype)
    if isinstance(value, DTensor) and not _are_alike(value, param):
        value = value.full_tensor()
    local = local_tensor(value if isinstance(value, DTensor) else shard_like(value, param))
    master: _Master = _MASTERS[param]
    local_tensor(master.rows).copy_(local[_slices(param).rows(len(local))])
    local_tensor(param.detach()).copy_(local)  # behind rows that are under way
    master.is_ahead = False


def own_rows(param: Tensor) -> tuple[Tensor, int]:
    """Returns the rows whose values this rank keeps exactly, of a master or a shard, and where they begin in the whole.

    Who writes into those of a master calls :func:`changed` then.
    """
    master, start = master_of(param), first_row(param)
    if master is None:
        return local_tensor(param), start
    return local_tensor(master), start + _slices(param).rows(len(local_tensor(param))).start


def changed(params: Iterable[Tensor]) -> None:
    """Says that masters are written: their shards, and those of other ranks, are stale."""
    for param in params:
        master = _found(param)
        if master is not None:
            master.is_ahead = True
            _slices(param).stale.add(id(param))


def check_kept(slices: Slices) -> None:
    """Checks that shards with masters are in 16 bits still.

    Raises:
        MiCSError: If somebody has converted one, or put another one in its place.
    """
    for param in slices.with_masters:
        if not has_master(param.sharded) or param.sharded.dtype.itemsize != 2:
            raise MiCSError(
                f"{param.name} was converted to {param.sharded.dtype}, or another parameter was put in its place, but "
                "its float32 values are with those who step on them (master_weights='owners'). Convert a model before "
                "it is sharded, or use master_weights='partition'."
            )


def refuse_gradient(param: Tensor, name: str) -> None:
    """Refuses a gradient of an operation on a shard itself.

    Raises:
        MiCSError: If the shard has a master: the operation has seen 16 bits of it.
    """
    if has_master(param):
        raise MiCSError(
            f"A gradient comes from an operation on the shard of {name!r}, which has only 16 bits of it "
            "(master_weights='owners'): a penalty on parameters would be one of rounded values. Compute it inside of "
            "the module's forward, let the optimizer decay weights, or use master_weights='partition' with "
            "replication_gather_dtype."
        )


def rows_of(param: Tensor) -> DTensor | None:
    """Returns a shard's master as it is, whatever became of the shard."""
    master = _found(param)
    return None if master is None else master.rows


def _found(param: Tensor) -> _Master | None:
    found: _Master | None = _MASTERS.get(param) if _MASTERS else None  # asked for every parameter in every step
    return found


def _slices(param: Tensor) -> Slices:
    slices = slices_of(param)
    assert slices is not None
    return slices


def _own_shards(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    params = module.named_parameters(recurse=False, remove_duplicate=False)
    return {prefix + name: param for name, param in params if has_master(param)}


def _put_masters(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, param in _own_shards(module, prefix).items():
        if name in state and state[name] is not param:  # which keep_vars=True asks for
            state[name] = master_of(param)


def _take_values(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    for name, param in _own_shards(module, prefix).items():
        value = state.get(name)
        if not isinstance(value, Tensor) or value.shape != param.shape:
            continue  # PyTorch says so
        rows = _MASTERS[param].rows
        if is_slice(value) and _are_alike(value, rows):
            with torch.no_grad():
                local_tensor(rows).copy_(local_tensor(value))
            changed([param])
        else:
            write_master(param, value)
        state[name] = param


def _are_alike(first: Tensor, second: Tensor) -> bool:
    """Returns whether tensors of one shape are divided in the same way."""
    pair = [(tensor.device_mesh.shape, tensor.placements) for tensor in (first, second) if isinstance(tensor, DTensor)]
    return len(pair) == 2 and pair[0] == pair[1]


@functools.cache
def tell_of_16_bits(dtype: torch.dtype) -> None:
    """Says, once, that float32 masters are made of what has 16 bits."""
    if dtype.itemsize == 2:
        inform(f"float32 masters (master_weights='owners') were made of weights in {dtype}: as they are.")
