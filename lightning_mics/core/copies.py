"""Copies of sharded models: still ones, of values alone, which averages of weights are; whole ones are refused.

``copy.deepcopy`` makes modules of the user's classes over shards of their own, laid out like the model's: elementwise
work on both (an average, a distance) needs no other rank, and takes a shard's memory. A still copy has no groups and no
hooks, so it cannot compute; :func:`exchanged_weights` has the model compute with its values.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_mics.core.class_names import class_of
from lightning_mics.core.masters import has_master
from lightning_mics.errors import MiCSError

_OURS = ("_mics_", "_fsdp_", "_is_fsdp_", "__composable_api_state_key", "__deepcopy__", "__reduce_ex__")
_HOOKS = {name: value for name, value in vars(nn.Module()).items() if "hook" in name}


def watch_copies(model: nn.Module) -> None:
    """Makes ``copy.deepcopy`` of a sharded model, and of each unit of it, a still copy; ``pickle`` refuses it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both look at the object first; its class is shared with modules that plain FSDP2 shards.
            module.__dict__["__deepcopy__"] = functools.partial(_still_copy, weakref.ref(module))
            module.__dict__["__reduce_ex__"] = functools.partial(_refuse_pickle, type(module).__name__)


@torch.no_grad()
def _still_copy(reference: weakref.ref[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """Returns a copy of a sharded module over shards of its own, for ``copy.deepcopy``."""
    root = reference()
    assert root is not None
    modules = list(root.modules())
    for param in root.parameters():
        _refuse_16_bits(param)
        memo[id(param)] = nn.Parameter(param.detach().clone(), param.requires_grad)
    for module in modules:
        memo[id(module)] = object.__new__(class_of(module))
    for module in modules:
        state: dict[str, Any] = getattr(module, "__getstate__", module.__dict__.copy)()
        kept = {name: value for name, value in state.items() if _is_users(module, name, value)}
        memo.update({id(value): value for value in kept.values() if isinstance(value, DeviceMesh)})
        vars(memo[id(module)]).update({**copy.deepcopy(kept, memo), **copy.deepcopy(_HOOKS)})
    still: nn.Module = memo[id(root)]
    still.__dict__["forward"] = functools.partial(_refuse_forward, class_of(root).__name__)
    return still


def _is_users(module: nn.Module, name: str, value: Any) -> bool:
    """Returns whether an attribute is the user's: no hooks, and no methods in the place of those of the class."""
    replaces = isinstance(value, MethodType | functools.partial) and hasattr(type(module), name)
    return not (name.startswith(_OURS) or name in _HOOKS or name == "_compiled_call_impl" or replaces)


def _refuse_16_bits(param: Tensor) -> None:
    if has_master(param):
        raise MiCSError(
            "copy.deepcopy of a model whose float32 weights are with those who step on them (master_weights='owners') "
            "would copy 16 bits of each, and an average of them would be one of rounded values. Use "
            "master_weights='partition' with averages of weights."
        )


def _refuse_forward(kind: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise MiCSError(
        f"A copy of a sharded {kind} has values and no groups to gather them in, so it cannot compute. Have the model "
        "compute with them: with lightning_mics.exchanged_weights(model, average): model(...)."
    )


def _refuse_pickle(kind: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise MiCSError(
        f"pickle (torch.save of a whole module) cannot copy a module that is sharded by MiCS ({kind}). To save it, use "
        "lightning_mics.save_checkpoint(model, path); for its values, full_tensor() of what model.state_dict() has."
    )


@contextmanager
def exchanged_weights(model: nn.Module, average: nn.Module) -> Iterator[None]:
    """Has a model compute with averaged weights, and puts its own back, whatever happens.

    Args:
        model: A model, sharded or not.
        average: A copy of it, or what has one as ``module``: ``torch.optim.swa_utils.AveragedModel``, an EMA of timm's
            kind. It holds the model's own weights meanwhile.

    Raises:
        MiCSError: If it is a copy of another model.

    Example::

        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        ...
        with exchanged_weights(model, average), torch.no_grad():
            validate(model)
    """
    inner: Any = getattr(average, "module", average)
    own, others = _values(model), _values(inner)
    if [tensor.shape for tensor in own] != [tensor.shape for tensor in others]:
        raise MiCSError(
            f"{type(inner).__name__} has other parameters or buffers than {type(model).__name__}. Make the average of "
            "the model that is to compute with it, after the model was sharded."
        )
    _exchange(own, others)
    try:
        yield
    finally:
        _exchange(own, others)


def _values(model: nn.Module) -> list[Tensor]:
    return list(itertools.chain(model.parameters(), model.buffers()))


@torch.no_grad()
def _exchange(own: list[Tensor], others: list[Tensor]) -> None:
    for tensor, other in zip(own, others, strict=True):
        if isinstance(tensor, DTensor) != isinstance(other, DTensor):
            raise MiCSError(
                "The average is one of a model that was not sharded. Make it of the sharded model: after mics_shard, "
                "accelerator.prepare or fabric.setup."
            )
        held = tensor.detach().clone()
        tensor.copy_(other)
        other.copy_(held)
