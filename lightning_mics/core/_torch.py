"""Every private or version-dependent name of PyTorch that the package touches, in one place."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather as AllGather
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter as ReduceScatter
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

# torch 2.13 renamed the single-tensor collectives and deprecated the old names.
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def batched(group: dist.ProcessGroup, device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context that launches the collectives inside it at once, where the backend can (gloo cannot)."""
    if device.type != "cuda" or not getattr(group._get_backend(device), "supports_coalescing", False):
        return nullcontext()
    return dist._coalescing_manager(group=group, device=device)


def is_gloo(group: dist.ProcessGroup) -> bool:
    """Returns whether CPU tensors of ``group`` travel by gloo."""
    if not dist.is_gloo_available():
        return False
    try:
        return isinstance(group._get_backend(torch.device("cpu")), dist.ProcessGroupGloo)
    except RuntimeError:  # a group without a backend for CPU tensors
        return False


def wait_for_gloo_threads(patience: float = 2.0) -> None:
    """Waits until gloo's threads have let go of their tensors, a moment after a collective is done.

    A thread that does so while Python ends aborts the process, and the threads of a group that a mesh still holds live
    on. Three looks in a row must find them asleep, as one that waits for Python's lock sleeps as well.

    Args:
        patience: Seconds after which it gives up, as collectives whose peers are gone never end.
    """
    end, quiet = time.monotonic() + patience, 0
    while quiet < 3 and time.monotonic() < end:
        time.sleep(0.005)  # gives Python's lock to whoever wants it
        quiet = quiet + 1 if _gloo_threads_sleep() else 0


def _gloo_threads_sleep() -> bool:
    for thread in Path("/proc/self/task").glob("*"):  # empty where there is no such folder
        try:
            _, _, facts = (thread / "stat").read_text().partition("(")
        except OSError:  # it has ended
            continue
        name, _, state = facts.rpartition(")")
        if name.startswith("pt_gloo") and state.split()[0] == "R":
            return False
    return True


def is_premul_sum(op: object) -> bool:
    """Returns whether ``op`` scales its input before summing (a custom gradient divide factor on NCCL)."""
    return not isinstance(op, dist.ReduceOp.RedOpType) and op == dist.ReduceOp.PREMUL_SUM


def current_backward_id() -> int:
    """Returns a number that names the backward pass in progress."""
    return torch._C._current_graph_task_id()


def forget_dtensor_meshes() -> None:
    """Drops DTensor's cached shardings, whose meshes name process groups that may have been destroyed since."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def queue_backward_callback(callback: Callable[[], None]) -> None:
    """Runs ``callback`` after the backward pass that is in progress, behind callbacks queued before it."""
    Variable._execution_engine.queue_callback(callback)


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, or a plain tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class UnitParam:
    """One parameter of an FSDP unit, seen from outside FSDP2."""

    def __init__(self, fsdp_param: Any) -> None:
        self._fsdp_param = fsdp_param

    @property
    def sharded(self) -> nn.Parameter:
        """The sharded parameter, a DTensor that the optimizer owns."""
        return self._fsdp_param.sharded_param

    @property
    def name(self) -> str:
        """Its name in the root module; known after the first forward pass."""
        return self._fsdp_param._param_fqn or self._fsdp_param._module_info.param_name

    @property
    def padded_shard_numel(self) -> int:
        """Elements that the shard takes in the reduce-scatter output, padding of uneven shards included."""
        return self._fsdp_param.padded_sharded_param_size.numel()

    @property
    def local_shape(self) -> torch.Size:
        """Shape of this rank's shard."""
        return self._fsdp_param.sharded_size

    @property
    def has_run(self) -> bool:
        """Whether the parameter was ever gathered."""
        return hasattr(self._fsdp_param, "_unsharded_param")

    @property
    def has_unsharded_grad(self) -> bool:
        """Whether autograd left an unsharded gradient that was not reduced yet."""
        if not self.has_run:
            return False
        return self._fsdp_param._unsharded_param.grad is not None or (
            self._fsdp_param.unsharded_accumulated_grad is not None
        )

    @property
    def has_gradient_hooks(self) -> bool:
        """Whether somebody wants to hear of each reduced gradient at once."""
        return bool(getattr(self.sharded, "_post_accumulate_grad_hooks", None))

    def fill_zero_grad(self) -> None:
        """Gives the gathered parameter a zero gradient, so that every rank reduces the same set of parameters."""
        unsharded = self._fsdp_param._unsharded_param
        unsharded.grad = torch.zeros_like(unsharded)

    def drop_unsharded_grad(self) -> None:
        """Forgets what a failed backward pass left unreduced."""
        if self.has_run:
            self._fsdp_param._unsharded_param.grad = None
            self._fsdp_param.unsharded_accumulated_grad = None

    def set_local_grad(self, local: Tensor) -> None:
        """Makes ``local`` (the shard's shape) the gradient of the sharded parameter."""
        self.sharded.grad = self._fsdp_param.to_sharded_dtensor(local)


class UnitParamGroup:
    """The parameters that one FSDP unit gathers and reduces together, seen from outside FSDP2."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.params = [UnitParam(param) for param in group.fsdp_params]
        self._gathered_of: list[tuple[int, int, int]] | None = None

    @property
    def device(self) -> torch.device:
        """The device on which the unit communicates."""
        return self._group.device

    def gathered_bytes(self, dtype: torch.dtype | None) -> int:
        """Returns the size of the unit's gathered parameters, in ``dtype`` or in their own."""
        sizes = ((param.padded_shard_numel, (dtype or param.sharded.dtype).itemsize) for param in self.params)
        return sum(numel * itemsize for numel, itemsize in sizes) * self._group.mesh_info.shard_mesh_size

    @property
    def has_reduce_hook(self) -> bool:
        """Whether the user looks at reduced gradients inside FSDP2 (``set_all_reduce_hook``)."""
        return getattr(self._group, "_all_reduce_hook", None) is not None

    @property
    def reduces_gradients(self) -> bool:
        """Whether the unit reduces gradients in backward (``False`` under ``set_requires_gradient_sync(False)``)."""
        return self._group.reduce_grads

    @contextmanager
    def reduce_stream(self) -> Iterator[None]:
        """Runs device work on the stream where the unit's sharded gradients are made."""
        context = self._group.comm_ctx
        with context.device_handle.stream(context.reduce_scatter_stream):
            yield

    def reshard(self) -> None:
        """Frees gathered parameters, so that the next forward pass gathers their new values."""
        self.discard_prefetched()
        self._group.reshard()

    def gather_ahead(self) -> None:
        """Starts gathering, for a forward pass of the unit that is about to come."""
        self._gathered_of = self._shard_states()
        self._group._prefetch_unshard(self._group, "forward")

    @property
    def is_prefetched_stale(self) -> bool:
        """Whether shards were written since they were gathered ahead."""
        return self._gathered_of is not None and self._gathered_of != self._shard_states()

    def discard_prefetched(self) -> bool:
        """Drops what was gathered ahead and not used; returns whether there was anything."""
        self._gathered_of = None
        result = self._group._all_gather_result
        if result is None:
            return False
        if isinstance(result.all_gather_work, dist.Work):
            result.all_gather_work.wait()
        self._group._all_gather_result = None
        return True

    def _shard_states(self) -> list[tuple[int, int, int]]:
        """Returns what changes when anybody writes a shard: its place and versions."""
        shards: list[Any] = [param.sharded for param in self.params]
        return [(s._local_tensor.data_ptr(), s._local_tensor._version, s._version) for s in shards]

    def wait_reduce_stream(self) -> None:
        """Makes the current stream wait for the work that :meth:`reduce_stream` launched."""
        context = self._group.comm_ctx
        context.device_handle.current_stream().wait_stream(context.reduce_scatter_stream)


def unit_param_groups(module: nn.Module) -> list[UnitParamGroup]:
    """Returns the parameter groups of an FSDP module (none if all its parameters belong to nested units)."""
    assert isinstance(module, FSDPModule)
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch < 2.12 has at most one group a module
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return [UnitParamGroup(group) for group in groups]


def gather_beside(root: nn.Module) -> None:
    """Makes the gathers of all units asynchronous, so that those started ahead run beside the computation."""
    assert isinstance(root, FSDPModule)
    root._set_unshard_async_op(True)


def tend_root(
    root: nn.Module,
    on_forward_begin: Callable[[], None],
    on_forward_end: Callable[[], None],
    on_backward: Callable[[], None],
    on_failure: Callable[[], None],
) -> None:
    """Mends habits of FSDP2 around the root's forward and backward pass.

    A registered forward method may call ``forward``, as a ``training_step`` does; FSDP2 would take the end of the inner
    call for the end of the pass, and free the root too early. Without a backward pass to come the root is freed, which
    saves memory. And after an exception in a pass FSDP2 starts afresh, which it only does when told to.

    Args:
        root: The root FSDP module.
        on_forward_begin: Called at the beginning of each forward pass of the root.
        on_forward_end: Called at the end of each forward pass of the root.
        on_backward: Called when a backward pass reaches the root, behind FSDP2's own preparations.
        on_failure: Called before the first forward pass after one that failed, or whose backward pass did.
    """
    assert isinstance(root, FSDPModule)
    state: Any = root._get_fsdp_state()
    pre_forward, post_forward, pre_backward = state._pre_forward, state._post_forward, state._pre_backward
    running: list[FrameType] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        while running and not _is_running(running[-1]):
            running.pop()
        if not running and _has_failed(state):
            _start_afresh(root)
            on_failure()
        running.append(sys._getframe(1))
        if len(running) > 1:
            return args, kwargs
        on_forward_begin()
        return pre_forward(module, args, kwargs)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        running.pop()
        if running:
            return output
        output = post_forward(module, args, output)
        on_forward_end()
        if not torch.is_grad_enabled():
            root.reshard()
        return output

    def begin_backward(grad: Tensor) -> Tensor:
        grad = pre_backward(grad)
        on_backward()
        return grad

    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    state._pre_forward, state._post_forward, state._pre_backward = enter, leave, begin_backward
    state._pre_forward_hook_handle = root.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
    state._post_forward_hook_handle = root.register_forward_hook(leave, prepend=False)


def _is_running(frame: FrameType) -> bool:
    """Returns whether a frame is on this thread's stack; one that an exception ended is not."""
    current: FrameType | None = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


def _has_failed(state: Any) -> bool:
    """Returns whether an exception ended a pass: outside of passes nothing of theirs is left."""
    context = state._state_ctx
    is_left = context.iter_forward_root is not None or context.post_backward_final_callback_queued
    return bool(state._is_root and is_left and current_backward_id() == -1)


def _start_afresh(root: nn.Module) -> None:
    reset: Callable[[], None] | None = getattr(root, "reset_iter_state", None)
    if reset is None:  # torch < 2.13
        raise RuntimeError("A forward or backward pass failed; only torch >= 2.13 can train on after that.")
    reset()


def unshard_outside_inference_mode(group: UnitParamGroup) -> None:
    """Makes gathered parameters normal tensors, also if the first forward pass runs under ``inference_mode``.

    FSDP2 keeps them for its whole life, and training could not write into inference tensors.
    """
    inner = group._group
    wait_for_unshard = inner.wait_for_unshard

    def wait() -> None:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                wait_for_unshard()
        else:
            wait_for_unshard()

    inner.wait_for_unshard = wait


def wrap_post_backward(group: UnitParamGroup, around: Callable[[Callable[[], None]], None]) -> None:
    """Runs ``around(reduce)`` where FSDP2 would reduce the unit's gradients; ``reduce()`` is FSDP2's own step."""
    inner = group._group
    reduce = inner.post_backward
    inner.post_backward = lambda *unused: around(reduce)
