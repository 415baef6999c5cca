"""The two hops of gradient synchronisation.

Hop one, the reduce-scatter inside the partition group, is FSDP2's: it runs in every microstep and accumulates sharded
gradients in ``.grad``. Hop two, the all-reduce over the replication group, is ours: it runs once a window, in the
backward pass of the last microstep, and overlaps with it.

Invariants:

- Replicas launch hop two in one fixed order of units, so that two replicas whose data takes different paths through
  the model can never pair up different units. A unit launches when all units before it have; what is left launches
  at the end of the backward pass.
- The all-reduce averages. Averaging values that are equal already changes nothing, so a second backward pass in the
  same window, or a unit that gets another contribution after its launch, only needs another all-reduce.
- Every trainable parameter takes part in every reduction, with zeros where this rank did not use it. At the end of
  the window the ranks agree on what was used anywhere; what was not gets ``.grad is None`` again, as on one process
  (an optimizer must not apply momentum or weight decay to it).
- A window that ends in ``optimizer.zero_grad()`` instead of a synchronisation leaves nothing behind: a ``.grad`` of
  ``None`` starts a new window.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_mics.core._torch import (
    UnitParam,
    UnitParamGroup,
    queue_backward_callback,
    wrap_post_backward,
)
from lightning_mics.errors import MiCSError, SelfCheckError, UnsyncedGradientsError
from lightning_mics.metrics import CommLedger, Hop

if TYPE_CHECKING:
    from lightning_mics.core.collectives import DeferrableReduceScatter
    from lightning_mics.core.mesh import MiCSMesh
    from lightning_mics.core.self_check import SelfCheck


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class UnitGradients:
    """The sharded gradients of one FSDP unit, as one flat buffer.

    The buffer has FSDP2's own layout of a reduce-scatter output: the shards one behind another, each padded. Ranks of
    a replication group hold the same shards, so their buffers have the same size whatever happened before.

    Args:
        name: The unit's name in the root module.
        group: Its parameters.
        reduce_dtype: Dtype of the replication all-reduce; ``None`` keeps the gradients' own.
    """

    def __init__(self, name: str, group: UnitParamGroup, reduce_dtype: torch.dtype | None) -> None:
        self.name = name
        self.group = group
        self.used = [False] * len(group.params)
        self.num_reductions = 0
        self.launched = False
        self.needs_relaunch = False
        self._born = [False] * len(group.params)
        self._wanted = [False] * len(group.params)
        self._reduce_dtype = reduce_dtype
        self._accumulator: Tensor | None = None
        self._accumulated: list[UnitParam] = []
        self._written: list[tuple[int, ...] | None] = []
        self._reducing: list[tuple[UnitParam, Tensor | None]] = []
        self._work: dist.Work | None = None
        self._in_flight: Tensor | None = None
        self._reducer: DeferrableReduceScatter | None = None

    def overlap_with(self, reducer: DeferrableReduceScatter) -> None:
        """Lets hop one run beside the backward pass, where its result need not be touched at once."""
        self._reducer = reducer

    @property
    def trainable(self) -> list[UnitParam]:
        """Parameters that want gradients at the moment."""
        return [param for param in self.group.params if param.sharded.requires_grad]

    @property
    def participants(self) -> list[UnitParam]:
        """Parameters that wanted gradients at any time in the window, the same ones in all replicas."""
        wanted = zip(self.group.params, self._wanted, strict=True)
        return [param for param, before in wanted if before or param.sharded.requires_grad]

    def reduce(self, reduce_scatter: Callable[[], None], *, deferring: bool) -> None:
        """Runs hop one for this unit, noting what was used and giving zeros to what was not."""
        for index, param in enumerate(self.group.params):
            self._wanted[index] |= param.sharded.requires_grad
            if not param.sharded.requires_grad or not param.has_run:
                continue
            if param.sharded.grad is None:
                self._born[index], self.used[index] = True, False
            if param.has_unsharded_grad:
                self.used[index] = True
            else:
                param.fill_zero_grad()
        params = self.trainable
        runs = bool(params) and params[0].has_run
        self.num_reductions += runs
        if runs and self._keeps_accumulator(params, deferring):
            self._reduce_exactly(params, reduce_scatter)
        elif runs and self._reducer is not None and self._is_left_alone(params):
            self._reduce_beside(params, reduce_scatter, self._reducer)
        else:
            reduce_scatter()

    def _is_left_alone(self, params: list[UnitParam]) -> bool:
        """Returns whether nobody reads or adds to a reduced gradient before :meth:`settle`."""
        return (
            len({param.sharded.dtype for param in params}) == 1
            and not self.group.has_reduce_hook
            and not any(param.has_gradient_hooks for param in params)
            and not any(param.has_unsharded_grad for param in self.group.params if not param.sharded.requires_grad)
        )

    def _reduce_beside(
        self, params: list[UnitParam], reduce_scatter: Callable[[], None], reducer: DeferrableReduceScatter
    ) -> None:
        """Starts hop one; :meth:`settle` ends it. Until then gradients of earlier microsteps are set aside."""
        earlier = [param.sharded.grad for param in params]
        for param in params:
            param.sharded.grad = None
        reducer.defer = params[0].sharded.dtype
        try:
            reduce_scatter()
        except BaseException:
            for param, grad in zip(params, earlier, strict=True):
                param.sharded.grad = grad
            raise
        finally:
            reducer.defer = None
        self._reducing = list(zip(params, earlier, strict=True))

    @property
    def is_reducing(self) -> bool:
        """Whether hop one runs beside the pass."""
        return bool(self._reducing) and self._reducer is not None and self._reducer.pending is not None

    @torch.no_grad()
    def settle(self) -> None:
        """Waits for hop one, where it runs beside the pass, and adds up."""
        reducing, self._reducing = self._reducing, []
        if self._reducer is not None and self._reducer.pending is not None:
            work, self._reducer.pending = self._reducer.pending, None
            work.wait()
        for param, earlier in reducing:
            if earlier is not None:
                _local(earlier).add_(_local(param.sharded.grad))
                param.sharded.grad = earlier

    def _keeps_accumulator(self, params: list[UnitParam], deferring: bool) -> bool:
        if params != self._accumulated or self._grad_states(params) != self._written:  # cleared, or changed by the user
            self._accumulator = None
        if self._accumulator is not None:
            return True
        sharded = params[0].sharded
        is_offloaded = sharded.device.type != self.group.device.type
        is_lossy = self._reduce_dtype is not None and self._reduce_dtype.itemsize > sharded.dtype.itemsize
        return deferring and is_lossy and not is_offloaded

    def _reduce_exactly(self, params: list[UnitParam], reduce_scatter: Callable[[], None]) -> None:
        """Accumulates in ``reduce_dtype``: sums of low-precision gradients lose more with every microstep."""
        earlier = [param.sharded.grad for param in params]
        for param in params:
            param.sharded.grad = None
        reduce_scatter()
        with self.group.reduce_stream():
            if self._accumulator is None:
                self._accumulated = params
                self._accumulator = self._flat(params).to(self._reduce_dtype, copy=True)
                self._add(params, earlier)
            else:
                self._accumulator += self._flat(params)
            self._write_back(params, self._accumulator)

    def _add(self, params: list[UnitParam], grads: list[Tensor | None]) -> None:
        assert self._accumulator is not None
        for grad, place in zip(grads, self._places(params, self._accumulator), strict=True):
            if grad is not None:
                place += _local(grad)

    def launch(self, replication_group: dist.ProcessGroup) -> int:
        """Starts hop two; returns the bytes of its message."""
        params = self.participants
        self._fill_missing(params)
        with self.group.reduce_stream():
            if params != self._accumulated:
                self._accumulator = None
            flat = self._accumulator if self._accumulator is not None else self._flat(params)
            dtype = self._reduce_dtype or flat.dtype
            self._in_flight = flat.to(device=self.group.device, dtype=dtype)
            self._work = dist.all_reduce(self._in_flight, op=dist.ReduceOp.AVG, group=replication_group, async_op=True)
        self.launched = True
        return self._in_flight.nbytes

    def wait(self) -> None:
        """Waits for hop two and puts the result into the gradients."""
        if self._work is None or self._in_flight is None:
            return
        params = self.participants
        with self.group.reduce_stream():
            self._work.wait()
            self._write_back(params, self._in_flight)
            if self._accumulator is not None:
                self._accumulator.copy_(self._in_flight)
        self._work = self._in_flight = None

    def abandon(self) -> None:
        """Forgets a pass that an exception ended. What its hop two brings is not wanted any more."""
        if self._work is not None:
            self._work.wait()
        self.settle()
        for param in self.group.params:
            param.drop_unsharded_grad()
        self._work = self._in_flight = self._accumulator = None
        self.launched = self.needs_relaunch = False
        self.num_reductions = 0

    def finish(self, used_anywhere: list[bool]) -> None:
        """Ends the window: parameters that no rank used get no gradient, as on one process."""
        for index, param in enumerate(self.group.params):
            if self._born[index] and not used_anywhere[index]:
                param.sharded.grad = None
        self.used = [False] * len(self.used)
        self._born = [False] * len(self._born)
        self._wanted = [False] * len(self._wanted)
        self._accumulator = None

    def _fill_missing(self, params: list[UnitParam]) -> None:
        for index, param in enumerate(self.group.params):
            if param in params and param.sharded.grad is None:
                param.set_local_grad(torch.zeros_like(_local(param.sharded)))
                self._born[index], self.used[index] = True, False

    def _places(self, params: list[UnitParam], flat: Tensor) -> Iterator[Tensor]:
        offset = 0
        for param in params:
            shape = param.local_shape
            yield flat[offset : offset + shape.numel()].view(shape)
            offset += param.padded_shard_numel

    def _flat(self, params: list[UnitParam]) -> Tensor:
        """Returns the gradients as one buffer: the one FSDP2 made them views of, or else a copy."""
        locals_ = [_local(param.sharded.grad) for param in params]
        storage = locals_[0].untyped_storage()
        offset = start = locals_[0].storage_offset()
        is_one_buffer = True
        for param, local in zip(params, locals_, strict=True):
            same = local.untyped_storage().data_ptr() == storage.data_ptr() and local.dtype == locals_[0].dtype
            if not same or local.storage_offset() != offset or not local.is_contiguous():
                is_one_buffer = False
            offset += param.padded_shard_numel
        size = offset - start
        if is_one_buffer and storage.nbytes() >= offset * locals_[0].element_size():
            return locals_[0].as_strided((size,), (1,), start)
        flat = torch.zeros(size, dtype=locals_[0].dtype, device=locals_[0].device)
        for place, local in zip(self._places(params, flat), locals_, strict=True):
            place.copy_(local)
        return flat

    def _write_back(self, params: list[UnitParam], flat: Tensor) -> None:
        for param, place in zip(params, self._places(params, flat), strict=True):
            local = _local(param.sharded.grad)
            if local.data_ptr() != place.data_ptr():
                local.copy_(place)
        self._written = self._grad_states(params)

    def _grad_states(self, params: list[UnitParam]) -> list[tuple[int, ...] | None]:
        """Returns what changes when anybody else writes a gradient: its place and versions."""
        grads = [param.sharded.grad for param in params]
        return [
            None if grad is None else (_local(grad).data_ptr(), grad._version, _local(grad)._version) for grad in grads
        ]


class ReplicationSync:
    """Runs hop two for all units of one model and keeps the window's books.

    Args:
        mesh: The groups.
        units: ``(name, parameters)`` of each FSDP unit, root first.
        reduce_dtype: Dtype of the replication all-reduce; ``None`` keeps the gradients' own.
        ledger: Where collectives are recorded.
        overlap: Whether hop two may start during the backward pass (not with gradients in host memory).
        self_check: Watches the first window, if given.
        after_window: Called at the end of each window, until it returns ``True``.
    """

    def __init__(
        self,
        mesh: MiCSMesh,
        units: Iterable[tuple[str, UnitParamGroup]],
        reduce_dtype: torch.dtype | None,
        ledger: CommLedger,
        *,
        overlap: bool,
        self_check: SelfCheck | None,
        after_window: Callable[[], bool] | None = None,
    ) -> None:
        self.deferring = False
        self.pending = False
        self.num_microsteps = 0
        self._mesh = mesh
        self._ledger = ledger
        self._overlap = overlap
        self._self_check = self_check
        self._after_window = after_window
        self._pass: weakref.ref[Callable[[], None]] | None = None
        self._ready: set[UnitGradients] = set()
        self._unsettled: UnitGradients | None = None
        self._next = 0
        self._order_hash = 0
        # Backward reaches the last unit first and the root, which holds what is left, at its end.
        self.units = [UnitGradients(name, group, reduce_dtype) for name, group in units][::-1]
        for unit in self.units:
            wrap_post_backward(unit.group, self._around(unit))

    @property
    def has_replicas(self) -> bool:
        """Whether there is a second hop at all."""
        return self._mesh.layout.num_replicas > 1

    def note_collective(self, unit_index: int, kind: int) -> None:
        """Folds a partition collective into the fingerprint of this rank's order of collectives."""
        self._order_hash = (self._order_hash * 1_000_003 + unit_index * 2 + kind + 1) & 0xFFFFFFFF

    def _around(self, unit: UnitGradients) -> Callable[[Callable[[], None]], None]:
        def around(reduce_scatter: Callable[[], None]) -> None:
            self.begin_backward()
            if not unit.group.reduces_gradients:
                raise MiCSError(
                    "Gradient synchronisation was switched off with set_requires_gradient_sync(False), which keeps "
                    "whole unsharded gradients. Use lightning_mics.defer_replication_sync(model) instead."
                )
            self._settle()
            if unit.launched:
                unit.wait()
                unit.needs_relaunch = True
            unit.reduce(reduce_scatter, deferring=self.deferring)
            self._unsettled = unit
            # Hop two, over the slowest links, is to begin early; a hop one inside the node is worth waiting for.
            launches_next = self.has_replicas and not self.deferring
            if not unit.is_reducing or (launches_next and not self._mesh.layout.spans_nodes):
                self._settle()

        return around

    def _settle(self) -> None:
        """Ends hop one of the unit before, which ran beside the pass, so that its hop two can begin."""
        unit, self._unsettled = self._unsettled, None
        if unit is not None:
            unit.settle()
            if self._overlap and self.has_replicas and not self.deferring:
                self._launch_ready(unit)

    def _launch_ready(self, unit: UnitGradients) -> None:
        """Launches units as they come, but never out of order."""
        self._ready.add(unit)
        while self._next < len(self.units) and self.units[self._next] in self._ready:
            self._launch(self.units[self._next])
            self._next += 1

    def _launch(self, unit: UnitGradients) -> None:
        if unit.participants:
            message_bytes = unit.launch(self._mesh.replication_group)
            self._ledger.record(unit.name, Hop.REPLICATION_REDUCE, message_bytes)

    def begin_backward(self) -> None:
        """Recognises a new backward pass; one nested in another (reentrant checkpointing) belongs to it.

        Autograd drops the callback with the pass, also where an exception ends it.
        """
        if self._pass is not None:
            if self._pass() is not None:
                return
            self.abandon()

        def end_of_backward() -> None:
            self._end_of_backward()

        self._pass = weakref.ref(end_of_backward, self._when_lost())
        self.pending = True
        queue_backward_callback(end_of_backward)

    def _when_lost(self) -> Callable[[object], None]:
        """Returns what runs when an exception ends a pass: what it has reduced belongs into the gradients now.

        Later, they may be other gradients.
        """
        this = weakref.ref(self)

        def settle(lost: object) -> None:
            sync = this()
            if sync is not None:
                sync._unsettled = None
                for unit in sync.units:
                    unit.settle()

        return settle

    def abandon(self) -> None:
        """Forgets a pass that an exception ended on all ranks; its gradients are the user's to keep or clear."""
        for unit in self.units:
            unit.abandon()
        self._pass = self._unsettled = None
        self._ready.clear()
        self._next = self._order_hash = self.num_microsteps = 0
        if self._self_check is not None:
            self._self_check.restart()

    def _forget_launches(self) -> None:
        for unit in self.units:
            unit.wait()
            unit.launched = unit.needs_relaunch = False
        self._ready.clear()
        self._next = 0

    def _end_of_backward(self) -> None:
        self._pass = None
        self._settle()
        self.num_microsteps += 1
        if self.deferring:
            self.units[0].group.wait_reduce_stream()
            if self._self_check is not None:
                self._self_check.after_microstep(self)
        else:
            self.synchronize()

    @torch.no_grad()
    def synchronize(self) -> None:
        """Ends the window: runs what is left of hop two. Collective over the world.

        Raises:
            SelfCheckError: If ranks of a partition group ran their collectives in different order.
        """
        if self.has_replicas:
            for unit in self.units[self._next :]:
                self._launch(unit)
        used, relaunch = self._agree()
        for unit in self.units:
            unit.wait()
        for unit, again in zip(self.units, relaunch, strict=True):
            if again and self.has_replicas:
                self._launch(unit)
                unit.wait()
        for unit in self.units:
            unit.finish([used.pop(0) for _ in unit.group.params])
        self.units[0].group.wait_reduce_stream()
        self.pending = False
        if self._self_check is not None and self._self_check.after_window(self):
            self._self_check = None
        if self._after_window is not None and self._after_window():
            self._after_window = None
        self._forget_launches()
        self.num_microsteps = 0
        for unit in self.units:
            unit.num_reductions = 0

    def _agree(self) -> tuple[list[bool], list[bool]]:
        """Exchanges, in one small message: parameters used anywhere, units to reduce again, order of collectives."""
        layout, rank = self._mesh.layout, dist.get_rank()
        used = [flag for unit in self.units for flag in unit.used]
        relaunch = [unit.needs_relaunch for unit in self.units]
        order = self._order_hash.to_bytes(4, "big")
        slots = bytearray(8 * layout.num_replicas)
        mine = 8 * layout.replica_of(rank)
        # The maximum of a byte and of its complement add up to 255 only if all ranks of the partition sent one byte.
        slots[mine : mine + 8] = order + bytes(255 - byte for byte in order)
        message = torch.tensor([*used, *relaunch, *slots], dtype=torch.uint8).to(self.units[0].group.device)
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        answer = message.tolist()
        self._order_hash = 0
        self._check_order(answer[-len(slots) :])
        flags = [bool(value) for value in answer[: len(used) + len(relaunch)]]
        return flags[: len(used)], flags[len(used) :]

    def _check_order(self, slots: list[int]) -> None:
        for replica, group in enumerate(self._mesh.layout.partition_groups):
            slot = slots[8 * replica : 8 * replica + 8]
            # Nothing came from ranks that the fake backend only pretends to have.
            if any(slot) and any(high + low != 255 for high, low in zip(slot[:4], slot[4:], strict=True)):
                raise SelfCheckError(
                    f"Ranks {list(group)} of one partition group ran the units of the model in different order, so "
                    "gathered parameters or gradients may belong to different units. Let every rank of a partition "
                    "take the same path through the model, put the modules of the branch into one unit (wrap=), or "
                    "use shard_size=1."
                )

    def prepare_step(self, params: set[int]) -> None:
        """Readies the model for an optimizer step on some parameters (by ``id``).

        Raises:
            UnsyncedGradientsError: If one of them has a gradient that replicas did not exchange.
        """
        owned = [param for unit in self.units for param in unit.group.params if id(param.sharded) in params]
        if not owned:
            return
        if self.pending and self.has_replicas and any(param.sharded.grad is not None for param in owned):
            raise UnsyncedGradientsError(
                "optimizer.step() was called in the middle of an accumulation window: every microstep since the last "
                "step ran inside defer_replication_sync(). Run the last microstep outside of it, or call "
                "lightning_mics.sync_gradients(model) before the step."
            )
        self.reshard()

    def reshard(self) -> None:
        """Frees parameters that a forward pass without a backward pass left gathered, and that a step makes stale."""
        for unit in self.units:
            unit.group.reshard()


# The module owns its books; they refer to its parameters, and must not keep it alive when its user drops it.
_ATTRIBUTE = "_mics_replication_sync"
_ALIVE: weakref.WeakSet[ReplicationSync] = weakref.WeakSet()


def attach_sync(model: nn.Module, sync: ReplicationSync) -> None:
    """Makes ``sync`` the owner of hop two for ``model``."""
    model.__dict__[_ATTRIBUTE] = sync
    _ALIVE.add(sync)
    _install_step_guard()


def syncs_of(model: nn.Module) -> list[ReplicationSync]:
    """Returns the owners of hop two of all sharded modules in ``model``, itself included.

    Raises:
        MiCSError: If there is none.
    """
    found = [module.__dict__[_ATTRIBUTE] for module in model.modules() if _ATTRIBUTE in module.__dict__]
    if not found:
        raise MiCSError(f"{type(model).__name__} is not sharded by MiCS. Call mics_shard(model, config) first.")
    return found


@contextmanager
def defer_replication_sync(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Leaves out the all-reduce between replicas in backward passes inside this context.

    Use it for every microstep of an accumulation window but the last. Gradients stay sharded in between.

    Args:
        model: A model sharded by :func:`~lightning_mics.mics_shard`, or a module that contains some.
        enabled: With ``False`` the context does nothing, which saves an ``if`` in loops.

    Raises:
        MiCSError: If the model is not sharded by MiCS.

    Example::

        for index, batch in enumerate(batches):
            with defer_replication_sync(model, enabled=index + 1 < len(batches)):
                (model(batch).loss / len(batches)).backward()
        optimizer.step()
    """
    with ExitStack() as stack:
        for sync in syncs_of(model):
            stack.callback(setattr, sync, "deferring", sync.deferring)
            sync.deferring = sync.deferring or enabled
        yield


def sync_gradients(model: nn.Module) -> None:
    """Closes an accumulation window by hand, where the last microstep was not known to be the last.

    Collective over the world; does nothing where no gradient waits for it.

    Args:
        model: A model sharded by :func:`~lightning_mics.mics_shard`, or a module that contains some.

    Raises:
        MiCSError: If the model is not sharded by MiCS.
    """
    for sync in syncs_of(model):
        if sync.pending:
            sync.synchronize()


def reshard(model: nn.Module) -> None:
    """Frees what forward passes without backward passes left gathered; ``parameters()`` are shards afterwards.

    Raises:
        MiCSError: If the model is not sharded by MiCS.
    """
    for sync in syncs_of(model):
        sync.reshard()


_guard_installed = False


def _install_step_guard() -> None:
    global _guard_installed
    if not _guard_installed:
        register_optimizer_step_pre_hook(_before_step)
        _guard_installed = True


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stops an optimizer step that would let replicas drift apart in silence, and keeps parameters fresh.

    With a closure, the backward pass runs inside the step, so the question is asked after it.
    """
    if isinstance(optimizer, torch.optim.LBFGS) and any(
        isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"]
    ):
        raise MiCSError("LBFGS needs the whole gradient as one vector, which no rank has. Use another optimizer.")
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _prepare_step(optimizer)
        return None

    @functools.wraps(closure)
    def checked_closure() -> Any:
        result = closure()
        _prepare_step(optimizer)
        return result

    return args[:1], {**kwargs, "closure": checked_closure}


def _prepare_step(optimizer: torch.optim.Optimizer) -> None:
    params = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for sync in list(_ALIVE):
        sync.prepare_step(params)
