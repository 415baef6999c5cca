"""Copies of sharded models: a copy would share process groups and hooks with its original, so they are refused."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_mics.errors import MiCSError

_HOOKS = {"__deepcopy__": "copy.deepcopy", "__reduce_ex__": "pickle (torch.save of a whole module)"}


def refuse_copies(model: nn.Module) -> None:
    """Makes ``copy.deepcopy`` and ``pickle`` refuse a sharded model, and each unit of it, in words."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for name, caller in _HOOKS.items():
                # Both look at the object first; its class is shared with modules that plain FSDP2 shards.
                module.__dict__[name] = functools.partial(_refuse, caller, type(module).__name__)


def _refuse(caller: str, kind: str, *args: Any) -> NoReturn:
    raise MiCSError(
        f"{caller} cannot copy a module that is sharded by MiCS ({kind}). For a second model, copy it before "
        "mics_shard and shard the copy, too; to save it, use lightning_mics.save_checkpoint(model, path); "
        "for its values, full_tensor() of what model.state_dict() has."
    )
