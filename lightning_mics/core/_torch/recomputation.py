"""Recomputation in the backward pass: that of a block, and what users call beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils import checkpoint as checkpoints

from lightning_mics.core._needs import require
from lightning_mics.core._torch.modules import checkpoint, current_backward_id

require(checkpoints, "_checkpoint_without_reentrant_generator", "CheckpointFunction")


def is_checkpointed(module: nn.Module) -> bool:
    """Returns whether PyTorch makes a module recompute its activations, in place or as a wrapper."""
    return checkpoint.state(module) is not None or "_checkpoint_wrapped_module" in module._modules


def will_recompute(block: nn.Module) -> bool:
    """Returns whether a forward pass of a checkpointed block is running that the backward pass will repeat."""
    return getattr(checkpoint.state(block), "_ac_generator", None) is not None


def repeated_by_another(block: nn.Module) -> bool:
    """Returns whether a forward pass of a checkpointed block repeats one, without being its own recomputation."""
    return current_backward_id() != -1 and checkpoint.state(block).enable_hook


@functools.cache
def before_checkpoints(call: Callable[[], None]) -> None:
    """Calls a function whenever ``torch.utils.checkpoint.checkpoint`` runs, under whatever name, from now on."""

    def after_call(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            call()
            return function(*args, **kwargs)

        return called

    # Blocks have their own reference to the former, and are not seen.
    name = "_checkpoint_without_reentrant_generator"
    setattr(checkpoints, name, after_call(getattr(checkpoints, name)))
    reentrant: Any = checkpoints.CheckpointFunction
    reentrant.apply = staticmethod(after_call(reentrant.apply))
