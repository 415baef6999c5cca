"""Recomputation in the backward pass: that of a block, what it keeps, and what users call beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpoints

from lightning_mics.core._needs import gone, require
from lightning_mics.core._torch.modules import checkpoint, current_backward_id, outside_graphs

try:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
except ImportError as error:
    raise gone(error) from error

require(checkpoints, "_checkpoint_without_reentrant_generator", "CheckpointFunction")


@functools.cache
def products() -> frozenset[Any]:
    """Returns the operations whose results selective recomputation keeps: matrix products and attention."""
    kernels = ("flash_attention", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")
    names = [f"_scaled_dot_product_{kernel}" for kernel in (*kernels, "flash_attention_for_cpu")]
    names += ["mm", "addmm", "bmm", "baddbmm", "_grouped_mm"]
    return frozenset(getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name))


def keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns the contexts of a pass and of its recomputation that keep what products return."""

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_product = getattr(operation, "overloadpacket", None) in products()
        return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def waits_on_host(block: nn.Module, device_type: str) -> None:
    """Makes what a block keeps that PyTorch will checkpoint, its inputs, wait in host memory for the backward pass.

    Copies run on the current stream, as :class:`torch.autograd.graph.save_on_cpu` makes them.

    Args:
        block: The block. To be called before it is checkpointed: the hooks here stand around those of the checkpoint.
        device_type: Where its inputs are.
    """
    to_host = torch.autograd.graph.save_on_cpu(pin_memory=True, device_type=device_type)
    running: list[torch.autograd.graph.saved_tensors_hooks] = []

    def pack(tensor: Tensor) -> Any:
        # Masks and positions are the same tensor in each block, and would be copied for each.
        return to_host.pack_hook(tensor) if tensor.requires_grad else tensor

    def unpack(packed: Any) -> Tensor:
        found: Tensor = packed if isinstance(packed, Tensor) else to_host.unpack_hook(packed)
        return found

    @outside_graphs
    def begin(block: nn.Module, args: Any) -> None:
        if checkpoint.state(block).enable_hook:  # else this is the recomputation, which must see what it saves
            running.append(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
            running[-1].__enter__()

    @outside_graphs
    def end(block: nn.Module, args: Any, output: Any) -> None:
        if checkpoint.state(block).enable_hook and running:
            running.pop().__exit__()

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end, prepend=True, always_call=True)


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
