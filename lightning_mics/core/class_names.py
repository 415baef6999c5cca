"""Class names of sharded modules: what users, and libraries that look names up, see stays the class's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_mics.core._torch import apply_to_shards

_CLASSES: dict[type, type] = {}  # FSDP2's class: ours
_OWN_TO_EACH_CLASS = ("__dict__", "__weakref__", "__module__", "__qualname__", "__doc__")


def keep_class_names(modules: Iterable[nn.Module]) -> None:
    """Gives modules that FSDP2 has taken back the names of their classes.

    FSDP2 makes a module's class one of its own, ``FSDP<Name>``, which it keeps for all models of the process. Ours
    differs from it by its name alone.
    """
    for module in modules:
        module.__class__ = _renamed(type(module))


def class_of(module: nn.Module) -> type:
    """Returns the class that the user gave a module, sharded or not."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def _renamed(fsdp_class: type) -> type:
    if fsdp_class not in _CLASSES:
        users = fsdp_class.__mro__[2]
        own: dict[str, Any] = {k: v for k, v in vars(fsdp_class).items() if k not in _OWN_TO_EACH_CLASS}
        own["__new__"], own["_apply"] = _new, apply_to_shards
        kind = type("MiCSClass", (type(fsdp_class),), {"__call__": _construct})
        # Only renamed afterwards: classes that keep a register of their subclasses see no second one of the name.
        made: type = kind(f"MiCS{users.__name__}", (FSDPModule, users), own)
        made.__name__, made.__qualname__ = users.__name__, users.__qualname__
        made.__module__, made.__doc__ = users.__module__, users.__doc__
        _CLASSES[fsdp_class] = made
    return _CLASSES[fsdp_class]


def _construct(cls: type, *args: Any, **kwargs: Any) -> Any:
    """``type(module)(...)`` makes a module of the user's class, which is not sharded."""
    return cls.__mro__[2](*args, **kwargs)


def _new(cls: type, *args: Any, **kwargs: Any) -> Any:
    """So does ``type(module).__new__``, without ``__init__``, as for any class; FSDP2's would run it."""
    users = cls.__mro__[2]
    return users.__new__(users, *args, **kwargs)
