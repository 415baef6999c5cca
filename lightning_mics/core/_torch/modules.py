"""Modules and tensors, autograd, compiled modules, and labels in traces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable, profiler
from torch.optim import Optimizer

from lightning_mics.core._needs import gone, require

try:
    from torch.distributed._composable.checkpoint_activation import checkpoint as checkpoint
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, distribute_tensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor.placement_types import Placement
    from torch.utils._pytree import keystr as keystr
    from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map_only as tree_map_only
    from torch.utils._pytree import tree_map_with_path as tree_map_with_path
except ImportError as error:
    raise gone(error) from error

require(torch, "_amp_foreach_non_finite_check_and_unscale_")
require(torch._C, "_current_graph_task_id")
require(profiler, "_is_profiler_enabled")
require(nn.modules.batchnorm, "_BatchNorm")
require(nn.Module, "_compiled_call_impl", "_load_from_state_dict")
require(DTensor, "_local_tensor", "_spec")
require(Optimizer, "_process_value_according_to_param_policy")

BatchNorm = nn.modules.batchnorm._BatchNorm  # the base class of them all

# Divides gradients by the scale of the loss, in place, and notes whether any is not finite.
unscale_and_check: Callable[..., Any] = torch._amp_foreach_non_finite_check_and_unscale_

# Where a module notes what assigning to it adds.
MODULE_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a hook from being compiled together with its module, as FSDP2 keeps its own."""
    return torch.compiler.disable(function)


def uncompiled(module: nn.Module) -> nn.Module:
    """Returns the module inside of what ``torch.compile(module)`` gives; any other as it is."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def plain_name(name: str) -> str:
    """Removes what ``torch.compile`` and checkpoint wrappers add to names of parameters and modules inside."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def is_compiled(module: nn.Module) -> bool:
    """Returns whether a module is compiled, in place or as what ``torch.compile(module)`` gives."""
    return uncompiled(module) is not module or module._compiled_call_impl is not None


def current_backward_id() -> int:
    """Returns a number that names the backward pass in progress."""
    return torch._C._current_graph_task_id()


def forget_dtensor_meshes() -> None:
    """Drops what DTensor keeps of meshes: their groups may have been destroyed, and live on with their threads."""
    from torch.distributed.tensor import _collective_utils, _redistribute, _sharding_prop
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    for owner, name in (
        (_redistribute, "_gen_transform_infos"),
        (_collective_utils.MeshTopoInfo, "build_from_mesh"),
        (_sharding_prop.ShardingPropagator, "_propagate_tensor_meta_cached"),
    ):
        # What a version of PyTorch does not keep, nobody has to drop.
        getattr(getattr(owner, name, None), "cache_clear", _nothing)()
    getattr(_redistribute, "clear_redistribute_planner_cache", _nothing)()


def _nothing() -> None:
    """Does nothing."""


def queue_backward_callback(callback: Callable[[], None]) -> None:
    """Runs ``callback`` after the backward pass that is in progress, behind callbacks queued before it."""
    Variable._execution_engine.queue_callback(callback)


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, or a plain tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def with_local(shard: DTensor, local: Tensor) -> DTensor:
    """Returns a DTensor of the placement and dtype of ``shard`` over local memory, wherever that lies.

    ``DTensor.from_local`` would take an offloaded part to the mesh's device.
    """
    return DTensor(local, shard._spec, requires_grad=False)


def parameter_registry(module: nn.Module) -> dict[str, Any]:
    """Returns where a module holds its own parameters, by name; another tensor may take the place of one."""
    return module._parameters


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that a model's state has, by name, each once."""
    passing = {
        id(module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if name in module._buffers
    }
    return {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in passing}


def dtensor_over(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], like: Tensor) -> DTensor:
    """Returns a DTensor of the shape of ``like``, laid out otherwise, over local memory; see :func:`with_local`."""
    meta = TensorMeta(like.shape, like.stride(), local.dtype)
    return DTensor(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def shard_like(value: Tensor, param: Tensor) -> Tensor:
    """Returns this rank's part of a whole tensor, laid out like ``param``; communicates nothing."""
    if not isinstance(param, DTensor) or value.shape != param.shape:
        return value
    return distribute_tensor(value.to(param.device), param.device_mesh, param.placements, src_data_rank=None)


def load_own_entries(module: nn.Module, entries: dict[str, Any], prefix: str) -> None:
    """Loads entries of a state dictionary into a module, and not into those inside it."""
    module._load_from_state_dict(entries, prefix, {}, False, [], [], [])


@functools.cache
def load_states_as(like: Callable[[Tensor], Tensor | None]) -> None:
    """Has ``Optimizer.load_state_dict`` cast states to what ``like`` returns for a parameter, where it returns any."""
    process = Optimizer._process_value_according_to_param_policy

    @functools.wraps(process)
    def processed(param: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = like(param)
        return process(param if found is None else found, *args, **kwargs)

    Optimizer._process_value_according_to_param_policy = staticmethod(processed)  # type: ignore[method-assign]


_Method = TypeVar("_Method", bound=Callable[..., Any])


def labelled(text: str) -> Callable[[_Method], _Method]:
    """Makes a method show in traces of ``torch.profiler``, with its object's ``name``; free while none is taken."""

    def wrap(method: _Method) -> _Method:
        @functools.wraps(method)
        def shown(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if not profiler._is_profiler_enabled:
                return method(owner, *args, **kwargs)
            with profiler.record_function(f"mics::{text} ({owner.name})"):
                return method(owner, *args, **kwargs)

        return cast("_Method", shown)

    return wrap


def begin_label(text: str) -> AbstractContextManager[Any] | None:
    """Begins what a trace of ``torch.profiler`` shows, until its ``__exit__``; ``None`` while no trace is taken."""
    if not profiler._is_profiler_enabled:
        return None
    label: AbstractContextManager[Any] = profiler.record_function(f"mics::{text}")
    label.__enter__()
    return label
