"""The accumulation window of one model: which hop runs when, and what ranks agree on at its end.

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
- Sharded gradients are made and changed on the reduce stream. It waits for the current stream before it takes up what a
  user may have touched, and the current stream waits for it wherever this module hands gradients back: at the end of a
  backward pass, of a window, and of a pass that failed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics.core._torch import (
    UnitParam,
    adds_gradients,
    before_reads,
    begin_label,
    local_tensor,
    queue_backward_callback,
)
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.gradients.agreement import Agreement, CollectiveOrder
from lightning_mics.core.gradients.outside import OutsideGradients
from lightning_mics.core.gradients.unit import UnitGradients
from lightning_mics.core.gradients.whole import WholeGradients
from lightning_mics.core.masters import changed, check_kept, settle
from lightning_mics.core.mesh import MiCSMesh
from lightning_mics.core.slices import RowsUnderWay, Slices, is_slice
from lightning_mics.errors import MiCSError, UnsyncedGradientsError
from lightning_mics.metrics import CommLedger, Hop

_STEPS_EARLY = (
    "A hook that steps the optimizer in the backward pass cannot accumulate gradients: it would step on those of one "
    "microstep. Call optimizer.step() after the last microstep, or train without accumulation."
)


class WindowObserver:
    """Something that watches the windows of a model, and the passes and optimizer steps around them."""

    def restart(self, window: AccumulationWindow) -> None:
        """A pass failed: its window is not to be judged."""

    def after_microstep(self, window: AccumulationWindow) -> None:
        """A microstep before the last one has ended."""

    def asks(self, window: AccumulationWindow) -> bool:
        """Returns whether this rank wants all ranks to look at the window that ends now (``window.is_asked``)."""
        return False

    def after_window(self, window: AccumulationWindow) -> bool:
        """The last microstep has ended, and replicas have exchanged gradients; returns whether it has seen enough."""
        return True

    def before_forward(self, window: AccumulationWindow) -> None:
        """A forward pass with gradients is about to gather parameters."""

    def before_averaging(self, window: AccumulationWindow) -> None:
        """Gradients are about to be averaged, or an optimizer is about to step."""

    def after_step(self, window: AccumulationWindow, optimizer: torch.optim.Optimizer, params: set[int]) -> None:
        """An optimizer has stepped on some parameters (by ``id``), of which the model has some."""


class LaunchQueue:
    """Releases units for hop two as they become ready, but never out of order.

    Args:
        units: The units in their order.
        early: Whether they may be launched before all are ready.
    """

    def __init__(self, units: Sequence[UnitGradients], *, early: bool) -> None:
        self._units, self._early = units, early
        self.clear()

    def clear(self) -> None:
        """Starts anew."""
        self._ready: set[UnitGradients] = set()
        self._next = 0

    def ready(self, unit: UnitGradients) -> Iterator[UnitGradients]:
        """Yields the units that may be launched now that another one has what it needs."""
        self._ready.add(unit)
        while self._early and self._next < len(self._units) and self._units[self._next] in self._ready:
            self._next += 1
            yield self._units[self._next - 1]

    def rest(self) -> Iterator[UnitGradients]:
        """Yields the units that were not released yet."""
        while self._next < len(self._units):
            self._next += 1
            yield self._units[self._next - 1]


class AccumulationWindow:
    """Runs both hops for all units of one model and keeps the window's books.

    Args:
        mesh: The groups.
        units: The gradients of each FSDP unit, in the order in which a backward pass finishes them.
        ledger: Where collectives are recorded.
        order: This rank's order of partition collectives.
        whole: The gradients of parameters that are not sharded.
        overlap: Whether hop two may start during the backward pass (not with gradients in host memory).
        slices: How optimizer states are divided further than parameters, if they are.
        observers: What watches the first windows.

    Attributes:
        mesh: See above.
        whole: See above.
        deferring: Whether backward passes leave out hop two.
        is_asked: Whether an observer on any rank wanted to look at the window that ends now.
        num_modes: How often a forward pass found the model in another mode, training or evaluation, than before.
        outside: What reaches gradients beside hop one, and who looks at them.
        pending: Whether there are gradients that replicas did not exchange.
        weight: What this rank's gradients count in the mean over all ranks; zero where it has no data.
        before_backward: Called where a backward pass is recognised.
    """

    def __init__(
        self,
        mesh: MiCSMesh,
        units: Sequence[UnitGradients],
        ledger: CommLedger,
        order: CollectiveOrder,
        whole: WholeGradients,
        *,
        overlap: bool,
        slices: Slices | None = None,
        observers: Sequence[WindowObserver] = (),
    ) -> None:
        self.units, self.whole, self._slices = units, whole, slices
        self._rows: dict[UnitGradients, list[RowsUnderWay]] = {}
        self._rounded: dict[UnitParam, int] = {}  # where shards lie of which other ranks' rows are rounded
        self.deferring = self.pending = self.is_asked = False
        self.weight = 1.0
        self.num_modes, self._mode = 0, True
        self.before_backward: Callable[[], None] = _nothing
        self.mesh, self._ledger = mesh, ledger
        self._agreement = Agreement(mesh, units, order, whole)
        self._may_run_on = any(unit.may_run_on for unit in units)
        self._observers = list(observers)
        self._queue = LaunchQueue(units, early=overlap and self.has_replicas)
        self._pass = _BackwardPass(self)
        self.outside = OutsideGradients(units, whole, self._pass.runs, self._pass.only_looks, self._pass.end_lone)
        self.watch_slices()
        for unit in units:
            unit.group.wrap_post_backward(functools.partial(self._reduce, unit))

    @property
    def has_replicas(self) -> bool:
        """Whether there is a second hop at all."""
        return self.mesh.layout.num_replicas > 1

    @property
    def _defers(self) -> bool:
        """Whether hop two is left out now: not before hooks, which want to see the mean over all ranks."""
        return self.deferring and not self.outside.has_hooks

    @property
    def order(self) -> CollectiveOrder:
        """This rank's order of partition collectives."""
        return self._agreement.order

    # Within a backward pass.

    def _reduce(self, unit: UnitGradients, reduce_scatter: Callable[[], None], *unused: object) -> None:
        """Runs hop one of a unit, and hop two of those that can begin, where FSDP2 would reduce the gradients."""
        self.begin_backward()
        if not unit.group.reduces_gradients:
            raise MiCSError(
                "Gradient synchronisation was switched off with set_requires_gradient_sync(False), which keeps "
                "whole unsharded gradients. Use lightning_mics.defer_replication_sync(model) instead."
            )
        if self._pass.keeps_graph:
            unit.group.keep_memory()
        if not self._pass.adds_gradients:
            unit.group.end_without_reduction(reduce_scatter)
            return
        self._finish_reduction()
        with torch.no_grad():  # it is on with create_graph=True
            unit.reduce(reduce_scatter, deferring=self._defers, weight=self.weight)
        self._pass.reducing = unit
        # Hop two, over the slowest links, is to begin early; a hop one inside the node is worth waiting for.
        may_run_on = self._may_run_on and unit.is_reducing
        if not may_run_on or (self.has_replicas and not self._defers and not self.mesh.layout.spans_nodes):
            self._finish_reduction()

    def _finish_reduction(self) -> None:
        """Ends hop one of the unit before, which may run beside the pass, so that its hop two can begin."""
        unit, self._pass.reducing = self._pass.reducing, None
        if unit is None:
            return
        if self._may_run_on:
            unit.finish_reduction()
        if not self._defers:
            for ready in self._queue.ready(unit):
                self._launch(ready)

    def _launch(self, unit: UnitGradients) -> None:
        if unit.participants.params:
            self._before_averaging()
            message_bytes = unit.launch()
            self._ledger.record(unit.name, Hop.REPLICATION_REDUCE, message_bytes)

    def weigh(self, weight: float) -> None:
        """Says what the gradients of this rank's next microsteps count in the mean over all ranks."""
        self.weight = self.whole.weight = weight

    @property
    def adds_gradients(self) -> bool:
        """Whether the backward pass adds to gradients of parameters; ``torch.autograd.grad`` does not."""
        return self._pass.adds_gradients

    def begin_backward(self) -> None:
        """Recognises a new backward pass; one nested in another (reentrant checkpointing) belongs to it."""
        if self._pass.is_running:
            return
        if self._pass.is_lost:
            self.abandon()
        self.put_rows()  # of units that no forward pass has used
        self.before_backward()
        if not self.deferring:
            self._before_averaging()
        self._pass.begin()
        if self._pass.adds_gradients:
            self.outside.begin()
        self.pending = self.pending or self._pass.adds_gradients

    def _end_of_backward(self) -> None:
        if not self._pass.adds_gradients:
            return
        self._finish_reduction()
        if self._defers:
            for unit in self.units:
                unit.give_back()
            self._hand_back()
            if any(unit.group.steps_in_backward for unit in self.units):
                raise UnsyncedGradientsError(_STEPS_EARLY)
            for observer in self._observers:
                observer.after_microstep(self)
        else:
            self.synchronize()
            self.outside.call_hooks()
            for unit in self.units:
                unit.group.step_in_backward()

    def end_lone_pass(self) -> None:
        """Ends a backward pass that reached shards, but not the model: a microstep of a penalty alone."""
        if self._pass.is_lost:
            self.abandon()
        self.pending = self._pass.adds_gradients = True
        self._end_of_backward()

    def _hand_back(self, stream: Any = None) -> None:
        """Makes a stream, by default the current one, wait until the gradients are whole."""
        self.units[0].group.wait_reduce_stream(stream)

    # The end of a window.

    @torch.no_grad()
    def synchronize(self) -> None:
        """Ends the window: runs what is left of hop two. Collective over the world.

        Raises:
            SelfCheckError: If ranks of a partition group ran their collectives in different order.
        """
        self._before_averaging()
        if self.has_replicas:
            for unit in self._queue.rest():
                self._launch(unit)
        self.whole.average()
        asks = [observer.asks(self) for observer in self._observers]
        if self.outside.has_hooks:
            self.order.hooked = self.outside.hooked()
        used, outdated, self.is_asked = self._agreement.reach(any(asks))
        for unit in self.units:
            unit.wait()
        if self.has_replicas:
            self._launch_again(outdated)
        self._hand_back()
        for unit, used_anywhere in zip(self.units, used, strict=True):
            unit.clear_unused(used_anywhere)
        self.pending = False
        self._observers = [observer for observer in self._observers if not observer.after_window(self)]
        self._close()

    def watch_slices(self) -> None:
        """Makes shards known whose optimizer states are divided further, also those that replaced others."""
        if self._slices is not None:
            for unit in self.units:
                self._slices.watch(unit.group.params)
            check_kept(self._slices)

    def _launch_again(self, outdated: Sequence[UnitGradients]) -> None:
        """Runs hop two once more for units that got another microstep after it, on any rank."""
        for unit in outdated:
            self._launch(unit)
            unit.wait()
            unit.num_relaunches += 1

    def _close(self) -> None:
        self._pass.number = 0
        self.watch_slices()
        self.outside.watch()
        for unit in self.units:
            unit.close()
        self.whole.close()
        self._queue.clear()

    # Passes that fail.

    def abandon(self) -> None:
        """Forgets a pass that an exception ended on all ranks; its gradients are the user's to keep or clear."""
        self.keep_what_was_reduced()  # autograd may still hold the pass, and has not told that it is lost then
        for unit in self.units:
            unit.abandon()
        self._pass.forget()
        self.outside.restore()
        self._queue.clear()
        self.order.clear()
        for observer in self._observers:
            observer.restart(self)

    def keep_what_was_reduced(self, stream: Any = None) -> None:
        """Puts what a failed pass has reduced into the gradients, before they may become other ones.

        Args:
            stream: The one on which the pass ran, where this may be another thread, with another current stream.
        """
        self._pass.reducing = None
        for unit in self.units:
            unit.finish_reduction()
            unit.join_flight()
            unit.group.wait_offloaded()
        self._hand_back(stream)

    def free(self) -> None:
        """Frees what a failed pass left gathered or unreduced: who catches its error may want the memory at once."""
        for unit in self.units:
            unit.group.free()
            unit.group.free_kept()

    # Around a forward pass.

    def begin_forward(self, mode: bool) -> None:
        """Notes that a forward pass is about to begin, in a mode of the model: training or not."""
        self.fetch_stale()  # of a step that failed, or that runs forward itself
        if mode is not self._mode:
            self._mode = mode
            self.num_modes += 1
        if torch.is_grad_enabled():
            for observer in self._observers:
                observer.before_forward(self)

    def _before_averaging(self) -> None:
        for observer in self._observers:
            observer.before_averaging(self)

    # Around an optimizer step.

    def prepare_step(self, params: set[int]) -> None:
        """Readies the model for an optimizer step on some parameters (by ``id``).

        Raises:
            UnsyncedGradientsError: If one of them has a gradient that replicas did not exchange.
        """
        units = [unit for unit in self.units if unit.group.owns_any(params)]
        if not units and not self.whole.owns_any(params):
            return
        _refuse_unreduced(units)
        holds = self.has_replicas and any(unit.holds_gradient_of(params) for unit in units)
        if self.deferring and (self._pass.is_running or self.outside.is_calling):
            raise UnsyncedGradientsError(_STEPS_EARLY)
        if self.pending and (holds or self.whole.holds_gradient_of(params)):
            raise UnsyncedGradientsError(
                "optimizer.step() was called in the middle of an accumulation window: every microstep since the last "
                "step ran inside defer_replication_sync(). Run the last microstep outside of it, or call "
                "lightning_mics.sync_gradients(model) before the step."
            )
        self._before_averaging()
        self.fetch_stale()
        self.put_rows()
        self.reshard()
        for unit in units:
            unit.group.free_kept()
        if self._slices is not None:
            self._slices.stale |= params

    def end_step(
        self, optimizer: torch.optim.Optimizer, params: set[int], *, only_with_gradient: bool, exact: bool = False
    ) -> None:
        """Ends an optimizer's step on slices of some parameters (by ``id``). Collective.

        Args:
            optimizer: The optimizer.
            params: Its parameters.
            only_with_gradient: Whether it left parameters without a gradient alone.
            exact: Whether the next step needs all rows as they are.
        """
        self.gather_slices(params, only_with_gradient=only_with_gradient, exact=exact)
        if self._rows:
            _WATCHED[id(self)] = self
            before_reads(_before_read)
        if self._observers and self.owns(params):
            for observer in self._observers:
                observer.after_step(self, optimizer, params)

    def gather_slices(self, params: set[int], *, only_with_gradient: bool = False, exact: bool = False) -> None:
        """Begins to fetch what other ranks made of their slices of some parameters (by ``id``). Collective.

        What a forward pass needs first comes first.
        """
        if self._slices is None or not params:
            return
        self._slices.stale -= params
        for unit in reversed(self.units):
            chosen = [param for param in unit.group.params if id(param.sharded) in params]
            for param in chosen:
                settle(param.sharded)
            if only_with_gradient:
                chosen = [param for param in chosen if param.sharded.grad is not None]
            for param in chosen:
                self._rounded.pop(param, None)
                if self._slices.rounds(param) and not exact:
                    self._rounded[param] = _place(param.sharded)
            if rows := self._slices.gather(chosen, unit.name, self._ledger, exact=exact):
                self._rows[unit] = rows

    def adopt_masters(self) -> None:
        """Makes what was written into masters that of the shards of all ranks. Collective over the world."""
        changed(param.sharded for unit in self.units for param in unit.group.params)
        self.fetch_stale()

    def fetch_stale(self) -> None:
        """Fetches rows that other ranks have and this one has not. Collective, and nothing where there are none."""
        if self._slices is not None and self._slices.stale:
            self.put_rows()
            self.gather_slices({*self._slices.stale})
            self.put_rows()

    def watch_gathers(self) -> None:
        """Has units wait for rows that are under way before they are gathered; called when all else watches gathers."""
        if self._slices is not None:
            for unit in self.units:
                reference = weakref.ref(self)
                waits = functools.partial(_are_under_way, reference, unit)
                unit.group.before_gather(functools.partial(_put_rows_of, reference, unit), waits)

    def put_rows(self, unit: UnitGradients | None = None) -> None:
        """Waits for rows of shards that are under way: those of a unit that is about to be gathered, or all."""
        if not self._rows or self._slices is None:
            return
        for chosen in list(self._rows) if unit is None else [unit]:
            rows = self._rows.pop(chosen, None)
            if rows is not None:
                self._slices.put(rows)
                chosen.group.copies_wait()
        if not self._rows and not self._rounded:
            _WATCHED.pop(id(self), None)
            if not _WATCHED:
                before_reads(None)

    def restore_rows(self) -> None:
        """Waits for rows that are under way, and fetches as they are those that were rounded. Collective."""
        self.put_rows()
        if self._rounded:
            with on_all_ranks("a look at parameters, whose float32 rows (replication_gather_dtype) all ranks fetch"):
                self.gather_slices({id(param.sharded) for param in self._rounded}, exact=True)
                self._rounded.clear()
                self.put_rows()

    def is_rounded(self, tensor: Tensor) -> bool:
        """Returns whether a tensor lies where rows of other ranks are rounded."""
        return bool(self._rounded) and _place(tensor) in self._rounded.values()

    def gathered(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yields the whole parameters that passes work with, and the shards of each."""
        for unit in self.units:
            for param in unit.group.params:
                if param.gathered is not None:
                    yield param.gathered, param.sharded

    def owns(self, params: set[int]) -> bool:
        """Returns whether any of some parameters (by ``id``) is the model's."""
        return any(id(param.sharded) in params for unit in self.units for param in unit.group.params)

    def reshard(self) -> None:
        """Frees parameters that a forward pass without a backward pass left gathered, and that a step makes stale."""
        for unit in self.units:
            unit.group.reshard()
        self.units[0].group.wait_until_read()


# Windows of which rows are under way, or were rounded on it.
_WATCHED: weakref.WeakValueDictionary[int, AccumulationWindow] = weakref.WeakValueDictionary()


def put_rows() -> None:
    """Waits for all rows of shards that are under way."""
    for window in list(_WATCHED.values()):
        window.put_rows()


def _before_read(tensors: Iterable[Tensor]) -> None:
    """Waits for all rows that are under way, and fetches what was rounded where somebody looks at it."""
    put_rows()
    rounded = list(_WATCHED.values())
    if not rounded:
        before_reads(None)
    elif any(window.is_rounded(tensor) for tensor in tensors for window in rounded if not is_slice(tensor)):
        for window in rounded:  # all, in the same order on all ranks
            window.restore_rows()


def _place(tensor: Tensor) -> int:
    """Returns where the memory begins that a tensor lies in."""
    local = local_tensor(tensor)
    return local.untyped_storage().data_ptr() if type(local) in (Tensor, nn.Parameter) else 0


def _put_rows_of(reference: weakref.ref[AccumulationWindow], unit: UnitGradients) -> None:
    window = reference()
    if window is not None:
        window.put_rows(unit)


def _are_under_way(reference: weakref.ref[AccumulationWindow], unit: UnitGradients) -> bool:
    window = reference()
    return window is not None and unit in window._rows


def _refuse_unreduced(units: Sequence[UnitGradients]) -> None:
    for unit in units:
        if unit.group.holds_unreduced:
            raise MiCSError(
                f"optimizer.step() was called, but gradients of unit {unit.name!r} were never reduced: the backward "
                "pass began at a tensor that left the model by a way that is not watched. Return the tensor from "
                "forward."
            )


def _nothing() -> None:
    """Stands for what nobody has set."""


class _BackwardPass:
    """The backward pass in progress, which autograd tells the end of by a callback.

    Autograd drops the callback with the pass, also where an exception ends it: a reference that is dead before the
    callback ran is a pass that failed.

    Attributes:
        reducing: The unit whose hop one was started last.
        number: How many the window has begun.
        adds_gradients: Whether it adds to gradients of parameters, which ``torch.autograd.grad`` does not.
        keeps_graph: Whether its own graph is made, for a backward pass through it.
    """

    adds_gradients, keeps_graph = True, False

    def __init__(self, window: AccumulationWindow) -> None:
        self.reducing: UnitGradients | None = None
        self.number = 0
        self._window = weakref.ref(window)
        self._callback: weakref.ref[Callable[[], None]] | None = None
        self._label: AbstractContextManager[Any] | None = None

    @property
    def is_running(self) -> bool:
        """Whether autograd still has the callback."""
        return self._callback is not None and self._callback() is not None

    @property
    def is_lost(self) -> bool:
        """Whether a pass began and never ended."""
        return self._callback is not None and self._callback() is None

    def runs(self) -> bool:
        """Returns whether autograd still has the callback."""
        return self.is_running

    def only_looks(self) -> bool:
        """Returns whether the last pass adds to no gradient."""
        return not self.adds_gradients

    def end_lone(self) -> None:
        """Ends a pass that never reached the model."""
        window = self._window()
        if window is not None:
            window.end_lone_pass()

    def forget(self) -> None:
        """Forgets the pass."""
        self._callback = self.reducing = self._label = None

    def begin(self) -> None:
        """Asks autograd to tell of the end of the pass that is running."""
        window = self._window()
        assert window is not None
        self.adds_gradients = adds_gradients(leaf for unit in window.units for leaf in unit.group.leaves())
        self.keeps_graph = torch.is_grad_enabled()
        self.number += self.adds_gradients
        self._label = begin_label(f"backward of microstep {self.number}")
        stream = window.units[0].group.current_stream()

        def end() -> None:
            self._callback = None
            ended = self._window()
            if ended is not None:
                ended._end_of_backward()
            label, self._label = self._label, None
            if label is not None:
                label.__exit__(None, None, None)

        def lost(reference: object) -> None:
            failed = self._window()
            if failed is not None and self._callback is reference:
                failed.keep_what_was_reduced(stream)
                failed.free()

        self._callback = weakref.ref(end, lost)
        queue_backward_callback(end)
