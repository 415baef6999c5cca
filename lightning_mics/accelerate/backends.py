"""Which backends Accelerate is to make its process group with."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from accelerate.utils import InitProcessGroupKwargs

from lightning_mics.accelerate.plugin import MiCSPlugin, launched_world_size
from lightning_mics.core.groups import backend_for


def backends_for(plugin: MiCSPlugin, *, cpu: bool = False) -> str | None:
    """Returns the backends that offload needs; ``None`` where Accelerate's own choice will do.

    Args:
        plugin: The settings.
        cpu: Whether ranks compute on CPUs, although there may be something better.
    """
    on_cpus = cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    device = None if on_cpus else torch.accelerator.current_accelerator(check_available=True)
    if not plugin.cpu_offload or device is None or launched_world_size() == 1:
        return None
    return backend_for(device.type, cpu_offload=True)


def ask_for_backends(options: dict[str, Any], plugin: MiCSPlugin) -> None:
    """Adds to an ``Accelerator``'s arguments what offload needs, unless they ask for backends of their own.

    Args:
        options: The arguments by name; changed in place.
        plugin: The settings.
    """
    backends = backends_for(plugin, cpu=bool(options.get("cpu")))
    if backends is None:
        return
    handlers = list(options.get("kwargs_handlers") or [])
    for index, handler in enumerate(handlers):
        if isinstance(handler, InitProcessGroupKwargs):
            if handler.backend in (None, InitProcessGroupKwargs.backend):
                handlers[index] = dataclasses.replace(handler, backend=backends)
            break
    else:
        handlers.append(InitProcessGroupKwargs(backend=backends))
    options["kwargs_handlers"] = handlers
