"""Every private or version-dependent name of PyTorch that the tracer touches."""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mics.core._needs import require_in_source
from lightning_mics.core._torch import forget_dtensor_meshes, products, tree_leaves, unit_param_groups

# Imported late, where something is traced.
require_in_source("torch.testing._internal.distributed.fake_pg", "FakeStore")
require_in_source("torch._subclasses.fake_tensor", "FakeTensorMode", "FakeTensor", "FakeCopyMode")
require_in_source("torch.distributed._tools.mem_tracker", "MemTracker", "_update_snap", "_mod_tracker")
require_in_source(
    "torch.distributed._tools.fsdp2_mem_tracker",
    *("FSDPMemTracker", "_instrument_fsdp_module", "_deregister_module_and_optimizer_hooks"),
    *("_fsdp_state_pre_forward", "_fsdp_state_post_forward"),
    *("_fsdp_param_group_pre_backward", "_fsdp_param_group_post_backward"),
)

# Products of rows with one of several matrices; older versions have none.
GROUPED_PRODUCT: Any = getattr(torch, "_grouped_mm", None)

_Tracker: Any = object  # becomes PyTorch's, which is imported late


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
def fake_world(ranks: int) -> Iterator[None]:
    """Makes this process rank 0 of a world of which no other rank is there; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    excepthook = sys.excepthook
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
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
    """Returns a deep copy without memory; ``memo`` has by ``id`` what stands for an object in the copy."""
    from torch._subclasses.fake_tensor import FakeCopyMode

    with FakeCopyMode(mode):
        return copy.deepcopy(module, memo)


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """Returns what runs before and after a module's forward pass."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


@dataclass
class Storage:
    """Memory that a tracked pass allocated."""

    is_activation: bool = True  # or gradients of activations; known after the pass
    is_product: bool = False  # of matrices, or attention
    is_gradient: bool = False  # of parameters; known after the pass, too


@dataclass(frozen=True)
class Event:
    """Something that happened in a tracked pass.

    Attributes:
        kind: ``"memory"``; where a unit's pass begins or ends; or the end of the whole forward or backward pass.
        module: The unit's module, for the latter.
        storage: The memory, for the former.
        change: By how many bytes it grew or shrank.
    """

    kind: Literal["memory", "forward", "forward_end", "backward", "backward_end", "loss", "end"]
    module: nn.Module | None = None
    storage: Storage | None = None
    change: int = 0


class Returned:
    """What a module returned last: tells how much of it nobody else keeps, once it is let go."""

    def __init__(self, module: nn.Module) -> None:
        self._storages: list[tuple[StorageWeakRef, int]] = []
        module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        storages = {
            storage.data_ptr() or id(storage): storage for storage in (leaf.untyped_storage() for leaf in leaves)
        }
        self._storages = [(StorageWeakRef(storage), storage.nbytes()) for storage in storages.values()]

    def dropped_bytes(self) -> int:
        """Returns the bytes of what is gone."""
        return sum(size for storage, size in self._storages if storage.expired())


def track_activations(root: nn.Module, record: Callable[[Event], None]) -> Any:
    """Returns a context that tells ``record`` of the memory of a forward and backward pass of a sharded model.

    After the context its ``classify()`` says which storages hold activations.
    """
    # Imported late: the module registers operators.
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    tracker: Any = type("Tracker", (_Telling, FSDPMemTracker), {})
    return tracker(root, record)


class _Telling(_Tracker):
    """PyTorch's tracker keeps totals; this one tells of every change, so that kinds can be told apart later.

    Its peaks are those of all kinds together, where large gathers hide activations. And the gradient of a parameter
    counts as a temporary until its unit is reduced.
    """

    def __init__(self, root: nn.Module, record: Callable[[Event], None]) -> None:
        super().__init__(root)
        self._record = record
        self._storages: dict[Any, Storage] = {}
        self._communicating = 0
        self._multiplies = False

    @property
    def communicates(self) -> bool:
        return self._communicating > 0

    def classify(self) -> None:
        for info, storage in self._storages.items():
            storage.is_activation = storage.is_activation and info.reftype.name in ("ACT", "TEMP", "INP")
            storage.is_gradient = info.reftype.name == "UNSHARDED_GRAD"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._multiplies = getattr(func, "overloadpacket", None) in products()
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._multiplies = False

    def _update_snap(self, u_type: Any, winfo: Any, old_mem_consumed: Any = None, old_reftype: Any = None) -> None:
        if winfo not in self._storages:
            self._storages[winfo] = Storage(is_activation=not self._communicating, is_product=self._multiplies)
        change = {
            "ADD": winfo.mem_consumed,
            "DEL": -winfo.mem_consumed,
            "SIZE": winfo.mem_consumed - (old_mem_consumed or 0),
        }.get(u_type.name, 0)
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
        for module, group in self._groups():
            if "pre_forward" not in vars(group):
                group.pre_forward = self._told(None, group.pre_forward, None, module, communicates=True)

    def _deregister_module_and_optimizer_hooks(self) -> None:
        super()._deregister_module_and_optimizer_hooks()
        for _, group in self._groups():
            vars(group).pop("pre_forward", None)

    def _groups(self) -> Iterator[tuple[nn.Module, Any]]:
        modules: Iterable[nn.Module] = self._root_mod.modules()
        for module in modules:
            if isinstance(module, FSDPModule):
                for unit in unit_param_groups(module):
                    yield module, unit._group


@dataclass(frozen=True)
class Work:
    """What a device would be told to do.

    Attributes:
        launches: Operations: no views, and no memory alone.
        traffic: Bytes that operations read and write which are no products of matrices.
        attention: Floating-point operations of attention in one piece, whole even where it is causal.
        masked: Those of them that its kernels leave out, as causal attention needs half.
    """

    launches: int = 0
    traffic: int = 0
    attention: int = 0
    masked: int = 0

    def __sub__(self, other: Work) -> Work:
        return Work(*(ours - theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))


class Launches(TorchDispatchMode):
    """Counts what a device would be told to do, without FSDP2's own.

    Args:
        tracker: What :func:`track_activations` returned, which knows when FSDP2 is at work.

    Attributes:
        work: What there was.
    """

    def __init__(self, tracker: Any) -> None:
        super().__init__()
        self._tracker, self._formulas = tracker, flop_formulas()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._tracker.communicates and launches_kernel(func):
            self._count(func, args, result)
        return result

    def _count(self, func: Any, args: Any, result: Any) -> None:
        work, packet = self.work, func.overloadpacket
        traffic = attention = masked = 0
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            attention = self._formulas[packet](*(tensor.shape for tensor in args[:3]))
            masked = attention // 2 if any(args[4:5]) else 0  # is_causal, unless it is left out
        elif packet not in products() and packet is not _ATTENTION_BACKWARD:
            read = [_dense_bytes(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            written = [_dense_bytes(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            if packet in _LOOKUPS:  # of a table, as much is read as is returned
                read = written
            traffic = sum(read) + sum(written)
        self.work = Work(work.launches + 1, work.traffic + traffic, work.attention + attention, work.masked + masked)


_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_LOOKUPS = (torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather)


def _dense_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor's elements, of which those that are repeated count once."""
    shape = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(shape) * tensor.itemsize


@functools.cache
def launches_kernel(operation: Any) -> bool:
    """Returns whether an operation makes a device work: it is no view, and does more than to allocate."""
    is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in operation._schema.arguments)
    return not is_view and operation.namespace not in ("prim", "profiler") and "empty" not in operation._schema.name


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


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Returns formulas that PyTorch's counter lacks: attention on CPU tensors, whole even where causal, and experts.

    Shapes as :class:`FakeAttention` takes them. PyTorch's own formula refuses grouped queries in torch 2.11.
    """

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        samples, heads, tokens, width = query
        return int(2 * samples * heads * tokens * key[2] * (width + value[3]))

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        # The kernel computes the scores again; that is no work of the model.
        return 2 * forward(query, key, value)

    def grouped(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
        # Either each row is multiplied with one of several matrices, or rows are divided over several products.
        return int(2 * left[-2] * left[-1] * right[-1])

    aten = torch.ops.aten
    return {
        **({aten._grouped_mm: grouped} if GROUPED_PRODUCT else {}),
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def count_allocated(run: Callable[[], object], *known: Any) -> int:
    """Runs something and returns how many bytes it had allocated at most, beside tensors that are ``known``."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(*known)
    before = _total_bytes(tracker.get_tracker_snapshot())
    with tracker:
        run()
    return max(0, _total_bytes(tracker.get_tracker_snapshot("peak")) - before)


def _total_bytes(snapshot: dict[Any, dict[Any, int]]) -> int:
    return sum(kinds["Total"] for kinds in snapshot.values())
