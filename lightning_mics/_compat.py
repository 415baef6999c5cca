"""Every private or version-dependent name of PyTorch that the package touches, in one place."""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

__all__ = [
    "AllGather",
    "Event",
    "FakeAttention",
    "ReduceScatter",
    "Storage",
    "UnitParam",
    "all_gather_single",
    "attention_flops",
    "batched",
    "copy_as_fake",
    "count_allocated",
    "current_backward_id",
    "fake_tensors",
    "forget_dtensor_meshes",
    "gather_beside",
    "is_gloo",
    "is_premul_sum",
    "one_rank_mesh",
    "plain_sequences",
    "queue_backward_callback",
    "reduce_scatter_single",
    "tend_root",
    "track_activations",
    "unit_param_groups",
    "unshard_outside_inference_mode",
    "wait_for_gloo_threads",
    "wrap_post_backward",
]

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


@contextmanager
def one_rank_mesh() -> Iterator[DeviceMesh]:
    """Gives a CPU mesh of this rank alone whose collectives do nothing; without a process group, one for a while."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    had_world, excepthook = dist.is_initialized(), sys.excepthook
    group: dist.ProcessGroup | None = None
    if had_world:
        # Synchronises with no other rank: the group has no other.
        group = dist.new_group([dist.get_rank()], backend="fake", use_local_synchronization=True)
    else:
        dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
        group = dist.group.WORLD
    assert group is not None
    try:
        yield DeviceMesh.from_group(group, "cpu", mesh=[dist.get_rank()])
    finally:
        dist.destroy_process_group(group if had_world else None)
        sys.excepthook = excepthook
        forget_dtensor_meshes()


@contextmanager
def fake_tensors() -> Iterator[Any]:
    """Makes every new tensor a fake one, without memory; gives the mode."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def is_fake(candidate: object) -> bool:
    """Returns whether something is a tensor without values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return type(candidate) is FakeTensor


def copy_as_fake(module: nn.Module, memo: dict[int, Any], mode: Any) -> nn.Module:
    """Returns a deep copy without memory.

    Args:
        module: What to copy.
        memo: By ``id``, what stands for an object in the copy; extended.
        mode: From :func:`fake_tensors`, not active now.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode

    with FakeCopyMode(mode):
        return copy.deepcopy(module, memo)


@dataclass
class Storage:
    """Memory that a tracked pass allocated.

    Attributes:
        is_activation: Whether it holds activations, or gradients of activations; known after the pass.
    """

    is_activation: bool = True


@dataclass(frozen=True)
class Event:
    """Something that happened in a tracked pass.

    Attributes:
        kind: ``"memory"``, or where a unit's pass begins or ends.
        module: The unit's module, for the latter.
        storage: The memory, for the former.
        change: By how many bytes it grew or shrank.
    """

    kind: Literal["memory", "forward", "forward_end", "backward", "backward_end"]
    module: nn.Module | None = None
    storage: Storage | None = None
    change: int = 0


def track_activations(root: nn.Module, record: Callable[[Event], None]) -> Any:
    """Returns a context that tells ``record`` of the memory of a forward and backward pass of a sharded model.

    After the context its ``classify()`` says which storages hold activations.
    """
    return _tracker_class()(root, record)


@functools.cache
def _tracker_class() -> Any:
    # Imported late: the module registers operators.
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
    from torch.distributed._tools.mem_tracker import _UpdateType

    kinds = {_FSDPRefType.ACT, _FSDPRefType.TEMP, _FSDPRefType.INP}

    class Tracker(FSDPMemTracker):
        """PyTorch's tracker keeps totals; this one tells of every change, so that kinds can be told apart later.

        Its peaks are those of all kinds together, where large gathers hide activations. And the gradient of a parameter
        counts as a temporary until its unit is reduced.
        """

        def __init__(self, root: nn.Module, record: Callable[[Event], None]) -> None:
            super().__init__(root)
            self._record = record
            self._storages: dict[Any, Storage] = {}
            self._communicating = 0

        def classify(self) -> None:
            for info, storage in self._storages.items():
                storage.is_activation = storage.is_activation and info.reftype in kinds

        def _update_snap(self, u_type: Any, winfo: Any, old_mem_consumed: Any = None, old_reftype: Any = None) -> None:
            if winfo not in self._storages:
                self._storages[winfo] = Storage(is_activation=not self._communicating)
            change = {
                _UpdateType.ADD: winfo.mem_consumed,
                _UpdateType.DEL: -winfo.mem_consumed,
                _UpdateType.SIZE: winfo.mem_consumed - (old_mem_consumed or 0),
            }.get(u_type, 0)
            if change:
                self._record(Event("memory", storage=self._storages[winfo], change=change))
            super()._update_snap(u_type, winfo, old_mem_consumed, old_reftype)

        def _told(self, begin: Any, call: Any, end: Any, module: nn.Module, *, communicates: bool) -> Any:
            @functools.wraps(call)
            def run(*args: Any, **kwargs: Any) -> Any:
                recomputes = not communicates and self._mod_tracker.is_bw
                if begin and not recomputes:
                    self._record(Event(begin, module=module))
                self._communicating += communicates
                try:
                    return call(*args, **kwargs)
                finally:
                    self._communicating -= communicates
                    if end and not recomputes:
                        self._record(Event(end, module=module))

            return run

        def _fsdp_state_pre_forward(self, fsdp_mod: Any, orig: Any) -> Any:
            inner = super()._fsdp_state_pre_forward(fsdp_mod, orig)
            return self._told("forward", inner, None, fsdp_mod, communicates=False)

        def _fsdp_state_post_forward(self, fsdp_mod: Any, orig: Any) -> Any:
            inner = super()._fsdp_state_post_forward(fsdp_mod, orig)
            return self._told(None, inner, "forward_end", fsdp_mod, communicates=False)

        def _fsdp_param_group_pre_backward(self, fsdp_mod: Any, orig: Any) -> Any:
            inner = super()._fsdp_param_group_pre_backward(fsdp_mod, orig)
            return self._told("backward", inner, None, fsdp_mod, communicates=True)

        def _fsdp_param_group_post_backward(self, fsdp_mod: Any, orig: Any) -> Any:
            inner = super()._fsdp_param_group_post_backward(fsdp_mod, orig)
            return self._told(None, inner, "backward_end", fsdp_mod, communicates=True)

        def _instrument_fsdp_module(self) -> None:
            super()._instrument_fsdp_module()
            for module in self._root_mod.modules():
                if isinstance(module, FSDPModule):
                    for unit in unit_param_groups(module):
                        group = unit._group
                        if "pre_forward" not in vars(group):
                            group.pre_forward = self._told(None, group.pre_forward, None, module, communicates=True)

        def _deregister_module_and_optimizer_hooks(self) -> None:
            super()._deregister_module_and_optimizer_hooks()
            for module in self._root_mod.modules():
                if isinstance(module, FSDPModule):
                    for unit in unit_param_groups(module):
                        vars(unit._group).pop("pre_forward", None)

    return Tracker


class FakeAttention(torch.autograd.Function):
    """Attention of fake tensors in one piece: without scores in memory, and laid out as the real kernels do it.

    Takes query, key and value of ``[samples, heads, tokens, width]`` (keys and values may have fewer heads), a mask of
    the same dtype or ``None``, whether it is causal, and the scale.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        """Computes nothing."""
        _, heads, tokens, width = query.shape
        # The output takes its layout from the query; that of a query cut from a larger tensor would be none.
        strides = (tokens * heads * width, width, heads * width, 1)
        like_real = query.as_strided(query.shape, strides, 0)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, logsumexp = kernel(like_real, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, mask, output, logsumexp)
        ctx.settings = is_causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Computes nothing."""
        query, key, value, mask, output, logsumexp = ctx.saved_tensors
        is_causal, scale = ctx.settings
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        tensors = (grad, query, key, value, output, logsumexp)
        return *kernel(*tensors, 0.0, is_causal, attn_mask=mask, scale=scale), None, None, None


def attention_flops() -> dict[Any, Callable[..., int]]:
    """Returns formulas that PyTorch's counter lacks: attention on CPU tensors, whole even where causal."""
    from torch.utils.flop_counter import sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        # The kernel computes the scores again; that is no work of the model.
        return 2 * int(sdpa_flop_count(query, key, value))

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


@contextmanager
def plain_sequences() -> Iterator[None]:
    """Keeps Hugging Face models from building a mask for packed samples, which on fake tensors they always expect."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    name = "find_packed_sequence_indices"
    found = getattr(masking, name, None)
    if found is None:
        yield
        return
    setattr(masking, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(masking, name, found)


def count_allocated(run: Callable[[], object], *known: Any) -> int:
    """Runs something on tensors (fake ones will do) and returns how many bytes it had allocated at most.

    Args:
        run: What to run.
        *known: Tensors, modules and optimizers that exist already.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(*known)
    before = _total_bytes(tracker.get_tracker_snapshot())
    with tracker:
        run()
    return max(0, _total_bytes(tracker.get_tracker_snapshot("peak")) - before)


def _total_bytes(snapshot: dict[Any, dict[Any, int]]) -> int:
    return sum(kinds["Total"] for kinds in snapshot.values())
