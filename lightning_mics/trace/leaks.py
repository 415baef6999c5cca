"""Tensors of a trace that a model's code keeps for later would poison training."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Collection, Iterable, Mapping
from types import CellType
from typing import Any

from torch import nn

from lightning_mics.errors import MiCSConfigError
from lightning_mics.trace._torch import is_fake


class LeakedTensorsError(MiCSConfigError):
    """The model keeps tensors outside of itself, and now keeps some without values."""


def refuse_leaks(model: nn.Module, modes: Collection[Any]) -> None:
    """Looks for tensors of a trace in globals, classes and caches of the modules that define the model's classes.

    Raises:
        LeakedTensorsError: If there are any.
    """
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    homes = {kind.__module__ for kind in classes if kind.__module__.partition(".")[0] not in ("torch", "builtins")}
    for home in sorted(homes):
        for name, value in list(vars(sys.modules.get(home, object)).items()):
            if _holds_traced(value, modes, home, depth=3):
                raise LeakedTensorsError(
                    f"{type(model).__name__} cannot be traced: {home}.{name} keeps a tensor of the forward pass, and "
                    "training would go on with one without values. Restart, and give shard_size a number; or keep the "
                    "tensor in a buffer of the module."
                )


def _holds_traced(value: Any, modes: Collection[Any], home: str, depth: int) -> bool:
    if is_fake(value):
        return value.fake_mode in modes
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple | set):
        inner = value
    elif hasattr(value, "cache_info"):  # functools.cache
        inner = gc.get_referents(value)
    elif isinstance(value, type) and value.__module__ == home:
        inner = vars(value).values()
    elif inspect.isfunction(value) and value.__closure__:
        inner = [cell.cell_contents for cell in value.__closure__ if cell != CellType()]
    return depth > 0 and any(_holds_traced(entry, modes, home, depth - 1) for entry in list(inner))
