"""The units of FSDP2: their parameters, gradients, gathers and reductions, and the streams these run on."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_mics.core._needs import gone, require
from lightning_mics.core._torch.hooks import are_diverted
from lightning_mics.errors import MiCSError

try:
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather as AllGather
    from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter as ReduceScatter
    from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo, TrainingState
except ImportError as error:
    raise gone(error) from error

require(FSDPModule, "_get_fsdp_state", "_set_unshard_async_op", "reshard")
require(
    _fsdp_param.FSDPParam,
    *("sharded_param", "_unsharded_param", "unsharded_accumulated_grad", "to_sharded_dtensor"),
    *("mp_policy", "sharded_size", "padded_sharded_param_size", "_param_fqn", "_module_info", "free_unsharded_param"),
)
require(
    _fsdp_param_group.FSDPParamGroup,
    *("fsdp_params", "mesh_info", "device", "device_handle", "comm_ctx", "reduce_grads"),
    *("wait_for_unshard", "post_backward", "reshard", "_prefetch_unshard", "_all_gather_result", "_post_reduce_event"),
    *("pre_forward", "post_forward"),
)
require(_fsdp_param_group.FSDPCommContext, "reduce_scatter_stream")
require(Tensor, "grad_dtype")

# Where FSDP2 warns from, for filters of warnings.
FSDP_MODULES = r"torch\.distributed\.fsdp\._fully_shard\."


class UnitParam:
    """One parameter of an FSDP unit, seen from outside FSDP2."""

    def __init__(self, fsdp_param: Any) -> None:
        self._fsdp_param = fsdp_param

    @property
    def sharded(self) -> nn.Parameter:
        """The sharded parameter, a DTensor that the optimizer owns."""
        return self._fsdp_param.sharded_param

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype in which it is gathered; ``None`` for its own."""
        dtype: torch.dtype | None = self._fsdp_param.mp_policy.param_dtype
        return dtype

    @property
    def grad_dtype(self) -> torch.dtype:
        """Dtype of the sharded gradient."""
        return gradient_dtype(self.sharded)

    def narrow(self, dtype: torch.dtype, gradient: torch.dtype) -> None:
        """Keeps the shard in another dtype than its gradients. Before there are any notes on it."""
        shard = self.sharded
        if shard.dtype != dtype:
            torch.utils.swap_tensors(shard, nn.Parameter(shard.detach().to(dtype), shard.requires_grad))
            self._fsdp_param.reset_sharded_param()
        shard.grad_dtype = gradient

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
    def has_unsharded_grad(self) -> bool:
        """Whether autograd left an unsharded gradient that was not reduced yet."""
        unsharded = getattr(self._fsdp_param, "_unsharded_param", None)
        has_grad = unsharded is not None and unsharded.grad is not None
        return has_grad or self._fsdp_param.unsharded_accumulated_grad is not None

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module that owns it, and its name there."""
        return self._fsdp_param._module_info.module, self._fsdp_param._module_info.param_name

    @property
    def gathered(self) -> nn.Parameter | None:
        """The whole parameter of a pass, one object for all of them; known after the first gather."""
        return getattr(self._fsdp_param, "_unsharded_param", None)

    def fill_unsharded_grad(self) -> None:
        """Gives the gathered parameter a zero gradient, unless it has one."""
        unsharded = self._fsdp_param._unsharded_param
        if unsharded.grad is None:
            unsharded.grad = torch.zeros_like(unsharded)

    def drop_unsharded_grad(self) -> None:
        """Forgets what a failed backward pass left unreduced."""
        if hasattr(self._fsdp_param, "_unsharded_param"):
            self._fsdp_param._unsharded_param.grad = None
        if "unsharded_accumulated_grad" in vars(self._fsdp_param):  # torch < 2.15 has it
            self._fsdp_param.unsharded_accumulated_grad = None

    def set_local_grad(self, local: Tensor) -> None:
        """Makes ``local`` (the shard's shape) the gradient of the sharded parameter."""
        self.sharded.grad = self._fsdp_param.to_sharded_dtensor(local)


def shards_integers() -> bool:
    """Returns whether FSDP2 takes parameters of integers; 2.11 asks their shards for gradients, 2.13 does not."""
    return torch.__version__ >= "2.13"


def gradient_dtype(param: Tensor) -> torch.dtype:
    """Returns the dtype of a parameter's gradient, which may be wider than the parameter's."""
    return param.grad_dtype or param.dtype


# What runs for every parameter of every microstep has no loop of Python in it.
_wants_grad = operator.attrgetter("sharded_param.requires_grad")

_unsharded_wants_grad = operator.attrgetter("_unsharded_param.requires_grad")

_sharded_grad = operator.attrgetter("sharded_param.grad")

_unsharded_grad = operator.attrgetter("_unsharded_param.grad")

_requires_grad = operator.attrgetter("requires_grad")

_is_none = functools.partial(operator.is_, None)

_sharded_param = operator.attrgetter("sharded_param")

_unsharded_param = operator.attrgetter("_unsharded_param")

_sharded_hooks = operator.attrgetter("sharded_param._backward_hooks")

_local_grad_of = operator.attrgetter("_fsdp_param.sharded_param.grad._local_tensor")

# Averages of these FSDP2 leaves to the collective; others it divides before and after it.
_AVERAGED = (torch.float32, torch.bfloat16)


def local_gradients(params: Sequence[UnitParam]) -> tuple[Tensor, ...] | None:
    """Returns this rank's shards of gradients, if all parameters have one and all are DTensors."""
    try:
        return tuple(map(_local_grad_of, params))
    except AttributeError:
        return None


def _keep() -> None:
    """Stands in the place of what frees a gathered parameter."""


class GradState(NamedTuple):
    """What FSDP2 holds of a unit's gradients, by parameter.

    Attributes:
        wanted: Whether the shard requires a gradient.
        is_new: Whether the shard has none yet.
        is_missing: Whether autograd left none for the gathered parameter.
    """

    wanted: tuple[bool, ...]
    is_new: tuple[bool, ...]
    is_missing: tuple[bool, ...]


class UnitParamGroup:
    """The parameters that one FSDP unit gathers and reduces together, seen from outside FSDP2."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.params = [UnitParam(param) for param in group.fsdp_params]
        self._has_run = self.is_kept = False
        self._watched: dict[int, Any] = {}
        self._waits: Callable[[], bool] = lambda: False
        self._gathered_of: list[tuple[int, int, int]] | None = None

    @property
    def device(self) -> torch.device:
        """The device on which the unit communicates."""
        return self._group.device

    def gathered_bytes(self, dtype: torch.dtype | None) -> int:
        """Returns the size of the unit's gathered parameters, in ``dtype`` or in their own."""
        sizes = ((param.padded_shard_numel, (dtype or param.sharded.dtype).itemsize) for param in self.params)
        return sum(numel * itemsize for numel, itemsize in sizes) * self._group.mesh_info.shard_mesh_size

    # Gradients.

    @property
    def has_run(self) -> bool:
        """Whether the unit was ever gathered."""
        self._has_run = self._has_run or all(hasattr(param, "_unsharded_param") for param in self._group.fsdp_params)
        return self._has_run

    @property
    def reduces_gradients(self) -> bool:
        """Whether the unit reduces gradients in backward (``False`` under ``set_requires_gradient_sync(False)``)."""
        return self._group.reduce_grads

    @property
    def is_idle(self) -> bool:
        """Whether the unit's parameters are not gathered for a backward pass, nor were ahead of one.

        All ranks of the partition give one answer, as gathers are theirs together. Whether the unit runs a backward
        pass is not theirs together: a rank may not have used the parameters that need one.
        """
        group = self._group
        is_gathered = not group.is_sharded or self.is_kept
        return not is_gathered and group._all_gather_result is None and group.unshard_in_backward

    @property
    def reduces_unused(self) -> bool:
        """Whether FSDP2 reduces zeros for parameters that a microstep did not use (torch >= 2.13)."""
        return getattr(self._group, "reduce_scatter_unused_params", False)

    @property
    def has_reduce_hook(self) -> bool:
        """Whether the user looks at reduced gradients inside FSDP2 (``set_all_reduce_hook``)."""
        return getattr(self._group, "_all_reduce_hook", None) is not None

    @property
    def diverts_hooks(self) -> bool:
        """Whether users' hooks on all shards are kept from autograd; shards may have been replaced since."""
        return all(map(are_diverted, map(_sharded_hooks, self._group.fsdp_params)))

    def owns_any(self, ids: set[int]) -> bool:
        """Returns whether the ``id`` of one of the unit's sharded parameters is among some."""
        return not ids.isdisjoint(map(id, map(_sharded_param, self._group.fsdp_params)))

    def wanted(self) -> tuple[bool, ...]:
        """Returns by parameter whether its shard requires a gradient."""
        return tuple(map(_wants_grad, self._group.fsdp_params))

    def grad_state(self) -> GradState:
        """Returns what there is before hop one."""
        params = self._group.fsdp_params
        wanted = tuple(map(_wants_grad, params))
        if wanted != tuple(map(_unsharded_wants_grad, params)):
            self._tell_unsharded(wanted)
        return GradState(
            wanted,
            tuple(map(_is_none, map(_sharded_grad, params))),
            tuple(map(_is_none, map(_unsharded_grad, params))),
        )

    def _tell_unsharded(self, wanted: Sequence[bool]) -> None:
        """Says of gathered parameters what holds for their shards, which decides what is reduced.

        FSDP2 does so only where it gathers them, and a unit that a microstep does not use is not gathered.
        """
        for param, wants in zip(self._group.fsdp_params, wanted, strict=True):
            param._unsharded_param.requires_grad_(wants)

    def weigh(self, weight: float) -> None:
        """Multiplies what a microstep left of unsharded gradients; with zero it left none, whatever they are."""
        for param in self.params:
            if weight == 0:
                param.drop_unsharded_grad()
            elif param.gathered is not None and param.gathered.grad is not None:
                param.gathered.grad.mul_(weight)

    def choose_dtypes(self) -> None:
        """Reduces gradients in the dtypes of the parameters that are trainable now.

        FSDP2 asks once, in the first forward pass, and reduces a unit that is frozen then in whatever its gradients
        have later.
        """
        group = self._group
        trainable = [param for param in group.fsdp_params if param.sharded_param.requires_grad]
        dtypes = {gradient_dtype(param.sharded_param) for param in trainable}
        if len(dtypes) > 1:
            names = ", ".join(f"{param._param_fqn} ({gradient_dtype(param.sharded_param)})" for param in trainable)
            raise MiCSError(
                f"Trainable parameters of one unit have different dtypes: {names}. Put them into units of their own "
                "(wrap=), convert them to one dtype before sharding, or freeze those of one dtype."
            )
        if trainable:
            group._orig_dtype = gradient_dtype(trainable[0].sharded_param)
            group._reduce_dtype = trainable[0].reduce_dtype

    def wrap_post_backward(self, around: Callable[..., None]) -> None:
        """Runs ``around(reduce)`` where FSDP2 would reduce the unit's gradients; ``reduce()`` is FSDP2's own step."""
        self._group.post_backward = functools.partial(around, self._group.post_backward)

    def can_reduce_into(self, dtype: torch.dtype) -> bool:
        """Returns whether :meth:`reduce_into` brings what FSDP2's own step would, with sums of ``dtype``.

        It does not where FSDP2 changes what it has reduced, where somebody wants to see it, or where sums are narrower.
        """
        group, param = self._group, self._group.fsdp_params[0]
        reduced = group._reduce_dtype or param.param_dtype or param.orig_dtype
        return (
            reduced in _AVERAGED
            and reduced.itemsize <= dtype.itemsize
            and group.gradient_divide_factor is None
            and not group.force_sum_reduction_for_comms
            and group._all_reduce_hook is None
        )

    @property
    def steps_in_backward(self) -> bool:
        """Whether optimizers were told to step in the backward pass (``_apply_optimizer_in_backward``)."""
        return any(
            "_in_backward_optimizers" in held for held in map(vars, map(_sharded_param, self._group.fsdp_params))
        )

    def step_in_backward(self) -> None:
        """Takes the steps of optimizers that were told to in the backward pass."""
        for shard in map(_sharded_param, self._group.fsdp_params):
            for optimizer in vars(shard).get("_in_backward_optimizers", ()) if shard.grad is not None else ():
                optimizer.step()
                shard.grad = None

    def reduce_into(self, sums: Tensor, reduce_scatter: Callable[[], None]) -> None:
        """Lets FSDP2's step add all that it reduces to one buffer in one operation, on the reduce stream.

        That is what FSDP2 does while it defers an all-reduce between replicas: ours, of which it does not know.

        Args:
            sums: The buffer, laid out like the output of the unit's reduce-scatter.
            reduce_scatter: FSDP2's step, in which all parameters take part.
        """
        group = self._group
        mesh_info, all_reduces = group.mesh_info, group.all_reduce_grads
        group.mesh_info, group.all_reduce_grads = self._mesh_info_of_replicas, False
        group._partial_reduce_output = sums
        try:
            reduce_scatter()
        finally:
            group.mesh_info, group.all_reduce_grads = mesh_info, all_reduces
            group._partial_reduce_output = None

    @functools.cached_property
    def _mesh_info_of_replicas(self) -> Any:
        """The unit's mesh as FSDP2 describes one with replicas, whose group carries nothing."""
        if hasattr(self._group, "_partial_reduce_output_layout"):  # torch >= 2.15 compares it with what it reduces
            sizes = [param.padded_shard_numel for param in self.params]
            places = zip(itertools.accumulate(sizes, initial=0), sizes, strict=False)
            self._group._partial_reduce_output_layout = dict(zip(self._group.fsdp_params, places, strict=True))
        mesh_info = object.__new__(HSDPMeshInfo)
        vars(mesh_info).update(vars(self._group.mesh_info))
        mesh_info.replicate_process_group = mesh_info.shard_process_group
        return mesh_info

    # Streams. On CPUs there are none, and these do nothing.

    @property
    def has_streams(self) -> bool:
        """Whether the unit's device runs work on streams, for which the host need not wait."""
        return self._group.device_handle is not torch.cpu

    def reduce_stream(self) -> AbstractContextManager[Any]:
        """Returns a context for device work on the stream where the unit's sharded gradients are made.

        With a hook of the user's FSDP2 makes them on another one, which is waited for.
        """
        context = self._group.comm_ctx
        if self._group._all_reduce_hook is not None and self.has_streams and self._group._post_reduce_event is not None:
            context.reduce_scatter_stream.wait_event(self._group._post_reduce_event)
        stream: AbstractContextManager[Any] = context.device_handle.stream(context.reduce_scatter_stream)
        return stream

    def current_stream(self) -> Any:
        """Returns the stream that this thread launches work on."""
        return self._group.comm_ctx.device_handle.current_stream()

    def reduce_stream_waits(self) -> None:
        """Makes the reduce stream wait for what the current stream was given so far."""
        context = self._group.comm_ctx
        context.reduce_scatter_stream.wait_stream(context.device_handle.current_stream())

    def wait_reduce_stream(self, stream: Any = None) -> None:
        """Makes a stream, by default the current one, wait for what the reduce stream was given so far."""
        context = self._group.comm_ctx
        (stream or context.device_handle.current_stream()).wait_stream(context.reduce_scatter_stream)

    def wait_offloaded(self) -> None:
        """Makes the host wait for gradients on their way to host memory, which FSDP2 does where a pass ends."""
        for param in self._group.fsdp_params:
            event, param.grad_offload_event = param.grad_offload_event, None
            if event is not None:
                event.synchronize()

    def wait_until_read(self) -> None:
        """Makes the host wait until shards in its memory were copied to the device, so that they may change."""
        context = self._group.comm_ctx
        copying = getattr(context, "all_gather_copy_in_stream", None)  # there since the first forward pass
        if copying is None or not self.has_streams or not isinstance(self._group.offload_policy, CPUOffloadPolicy):
            return
        for stream in (copying, context.device_handle.current_stream()):  # asynchronous gathers copy on the latter
            stream.synchronize()

    # Gathered parameters.

    def keep_memory(self) -> None:
        """Keeps the memory of gathered parameters where FSDP2 frees it, until :meth:`free_kept`.

        FSDP2 goes on as ever: parameters are shards outside of passes, and are gathered again, into this memory. Graphs
        of which it does not know find their values there.
        """
        if self.has_run and not self.is_kept:
            self.is_kept = True
            for param in self._group.fsdp_params:
                param.free_unsharded_param = _keep

    def free_kept(self) -> None:
        """Frees what :meth:`keep_memory` kept, unless it is in use."""
        if self.is_kept:
            self.is_kept = False
            for param in self._group.fsdp_params:
                del param.free_unsharded_param
                if self._group.is_sharded:
                    param.free_unsharded_param()

    def watch_gradients(self, told: Callable[[], None]) -> None:
        """Calls ``told`` in a backward pass before it adds to the gradient of a gathered parameter.

        Parameters that do not require a gradient are watched from the first call on at which they do. ``told`` must not
        refer to the model: garbage collection cannot look into graphs.
        """
        params = self._group.fsdp_params
        if len(self._watched) == sum(map(_unsharded_wants_grad, params)):
            return
        for whole in map(_unsharded_param, params):
            if whole.requires_grad and id(whole) not in self._watched:
                node = get_gradient_edge(whole).node
                node.register_prehook(lambda gradients: told())
                self._watched[id(whole)] = node  # lives as long as a graph, or this

    def leaves(self) -> Iterator[Tensor]:
        """Yields the gathered parameters that want a gradient, if the unit was ever gathered."""
        if self.has_run:
            yield from filter(_requires_grad, map(_unsharded_param, self._group.fsdp_params))

    @property
    def holds_unreduced(self) -> bool:
        """Whether autograd left a gradient of a gathered parameter that no hop one has reduced."""
        return self.has_run and not all(map(_is_none, map(_unsharded_grad, self._group.fsdp_params)))

    def wrap_forward(self, before: Callable[[Any, Any], None], after: Callable[[Any], None]) -> None:
        """Runs ``before(args, kwargs)`` and ``after(output)`` where FSDP2 begins and ends the unit's forward pass."""
        pre_forward, post_forward = self._group.pre_forward, self._group.post_forward

        def begin(module: Any, args: Any, kwargs: Any) -> Any:
            before(args, kwargs)
            return pre_forward(module, args, kwargs)

        def end(module: Any, args: Any, output: Any) -> Any:
            after(output)
            return post_forward(module, args, output)

        self._group.pre_forward, self._group.post_forward = begin, end

    def end_without_reduction(self, post_backward: Callable[[], None]) -> None:
        """Ends a backward pass of the unit by FSDP2's step, without hop one.

        Not where the pass is nested in a forward pass of the unit, which goes on, nor before the unit's first one.
        """
        group = self._group
        if group._training_state is TrainingState.FORWARD or not self.has_run:
            return
        reduces, group.reduce_grads = group.reduce_grads, False
        try:
            post_backward()
        finally:
            group.reduce_grads = reduces

    def reshard(self) -> None:
        """Frees gathered parameters, so that the next forward pass gathers their new values."""
        self.discard_prefetched()
        if not self._group.is_sharded:
            self._group.reshard()

    def free(self) -> None:
        """Frees gathered parameters and whole gradients that a failed pass left; waits for nothing."""
        self._group._to_sharded()
        for param in self.params:
            param.drop_unsharded_grad()

    def prefetch(self) -> None:
        """Starts gathering, for a forward pass of the unit that is about to come."""
        if self._waits():
            return
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

    def join_gather(self) -> None:
        """Takes part in a gather that other ranks need, and frees what it brings. The root must have begun."""
        self._group.reshard()
        self._group.unshard()
        self._group.wait_for_unshard()
        self._group.reshard()

    def unshard_outside_inference_mode(self) -> None:
        """Makes gathered parameters normal tensors, also if the first forward pass runs under ``inference_mode``.

        FSDP2 keeps them for its whole life, and training could not write into inference tensors.
        """
        wait_for_unshard = self._group.wait_for_unshard

        def wait() -> None:
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():
                    wait_for_unshard()
            else:
                wait_for_unshard()

        self._group.wait_for_unshard = wait

    def before_gather(self, told: Callable[[], None], waits: Callable[[], bool]) -> None:
        """Calls ``told`` where FSDP2 is about to read the shards for a gather, on the current stream.

        Args:
            told: See above.
            waits: Tells whether ``told`` would wait. Nothing is gathered ahead then.
        """
        self._waits = waits
        unshard, wait_for_unshard = self._group.unshard, self._group.wait_for_unshard

        def begin(async_op: bool = False) -> None:
            told()
            unshard(async_op)

        def wait() -> None:  # a partition of one rank is copied here
            told()
            wait_for_unshard()

        self._group.unshard, self._group.wait_for_unshard = begin, wait

    def copies_wait(self) -> None:
        """Makes the stream on which shards are copied for a gather wait for the current one."""
        context = self._group.comm_ctx
        copying = getattr(context, "all_gather_copy_in_stream", None)  # there since the first forward pass
        if copying is not None:
            copying.wait_stream(context.device_handle.current_stream())

    def when_gathered(self, told: Callable[[], None]) -> None:
        """Calls ``told`` once, when the whole parameters are there for the first time."""
        wait_for_unshard, is_new = self._group.wait_for_unshard, True

        def wait() -> None:
            nonlocal is_new
            wait_for_unshard()
            if is_new and self.has_run:
                is_new = False
                told()

        self._group.wait_for_unshard = wait

    def _shard_states(self) -> list[tuple[int, int, int]]:
        """Returns what changes when anybody writes a shard: its place and versions."""
        shards: list[Any] = [param.sharded for param in self.params]
        return [(s._local_tensor.data_ptr(), s._local_tensor._version, s._version) for s in shards]


def unit_param_groups(module: nn.Module) -> list[UnitParamGroup]:
    """Returns the parameter groups of an FSDP module (none if all its parameters belong to nested units)."""
    assert isinstance(module, FSDPModule)
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch < 2.12 has at most one group a module
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return [UnitParamGroup(group) for group in groups]


def pre_backward_hook(module: nn.Module) -> Callable[[Any], Any]:
    """Returns the hook that FSDP2 puts on what leaves a module's unit, as it is at the time of its call."""
    assert isinstance(module, FSDPModule)
    state: Any = module._get_fsdp_state()
    return lambda gradient: state._pre_backward(gradient)


def name_params(root: nn.Module) -> None:
    """Tells units the names of their parameters in the root, as FSDP2 does in the first forward pass."""
    names = {param: name for name, param in root.named_parameters()}
    for module in root.modules():
        for unit in unit_param_groups(module) if isinstance(module, FSDPModule) else ():
            for param in unit._group.fsdp_params:
                param._param_fqn = names.get(param.sharded_param)


def gather_asynchronously(root: nn.Module) -> None:
    """Makes the gathers of all units asynchronous, so that those started ahead run beside the computation."""
    assert isinstance(root, FSDPModule)
    root._set_unshard_async_op(True)


def reduce_unused_params(root: nn.Module) -> None:
    """Makes FSDP2 reduce zeros for parameters that a microstep did not use, where it can (torch >= 2.13)."""
    switch = getattr(root, "set_reduce_scatter_unused_params", None)
    if switch is not None:
        switch(True)


def held_gradients(module: nn.Module) -> list[Tensor]:
    """Returns the gradients that FSDP2 holds for the parameters of a module's unit: sharded, whole and partial ones."""
    found: list[Tensor | None] = []
    for group in unit_param_groups(module):
        found.append(getattr(group._group, "_partial_reduce_output", None))
        for param in group._group.fsdp_params:
            whole = getattr(param, "_unsharded_param", None)
            found += [param.sharded_param.grad, param.unsharded_accumulated_grad]
            found.append(None if whole is None else whole.grad)
    return [tensor for tensor in found if tensor is not None]


def fsdp_collectives() -> Any:
    """Returns the module in which FSDP2 communicates: by classes of its own, or by its name ``dist``."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    return _fsdp_collectives


def chunk_cat(shards: Sequence[Tensor], num_chunks: int) -> Tensor:
    """Returns rows of shards by owner: of each shard ``ceil(rows / num_chunks)`` in each row of the result, padded."""
    return torch._chunk_cat(list(shards), dim=0, num_chunks=num_chunks)
