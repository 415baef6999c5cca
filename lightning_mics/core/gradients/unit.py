"""The gradients of one FSDP unit in one accumulation window: what was used, and where its two hops are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor

from lightning_mics.core._torch import (
    GradState,
    UnitParam,
    UnitParamGroup,
    current_backward_id,
    labelled,
    local_gradients,
    local_tensor,
)
from lightning_mics.core.gradients.layout import FlatLayout
from lightning_mics.core.gradients.reductions import ExactReduction, PlainReduction, Reduction
from lightning_mics.core.gradients.second_hop import Flight, SecondHop
from lightning_mics.core.slices import is_slice


class Phase(Enum):
    """Where a unit is in its window.

    ``OPEN`` -> (:meth:`UnitGradients.launch`) ``REPLICATING`` -> (:meth:`~UnitGradients.wait`) ``REPLICATED``; a
    microstep, or a gradient from outside of it, that comes after the launch leads to ``OUTDATED``, from where it is
    launched once more.
    :meth:`~UnitGradients.close` leads back to ``OPEN`` from anywhere.
    """

    OPEN = "hop one adds up microsteps"
    REPLICATING = "hop two is in flight"
    REPLICATED = "hop two's result is in the gradients"
    OUTDATED = "a microstep was added after hop two"


class ParamSet:
    """Some of a unit's parameters, as a number with a byte for each: what is done with them needs no loop."""

    @staticmethod
    def of(flags: Sequence[bool]) -> int:
        """Returns the set of those whose flag is true."""
        return int.from_bytes(bytes(flags), "little")

    @staticmethod
    def only(index: int) -> int:
        """Returns the set of one parameter."""
        return 1 << 8 * index

    @staticmethod
    def indices(params: int) -> list[int]:
        """Returns which parameters are in a set."""
        return [index for index in range((params.bit_length() + 7) // 8) if params >> 8 * index & 1]


class UnitUse:
    """Which parameters of a unit a window wanted, used, and gave their first gradient, as a :class:`ParamSet` each.

    Attributes:
        used: Those that this rank's microsteps used.
        wanted: Those that wanted a gradient in any microstep; the same in all replicas.
        wanted_now: Those that wanted one in the last.
        last: What the last microstep brought.
        num_switches: How often a microstep wanted other ones than the one before, in all windows.
    """

    def __init__(self) -> None:
        self.num_switches, self.wanted_now, self._wanted_before = 0, 0, -1
        self.last: GradState | None = None
        self.clear()

    def clear(self) -> None:
        """Starts a new window."""
        if self.last is not None:
            self._wanted_before = self.wanted_now
        self.used = self.wanted = self.wanted_now = self._born = 0
        self.last = None

    @property
    def unclaimed(self) -> int:
        """Parameters whose gradient is one of this window's, and not of this rank's making."""
        return self._born & ~self.used

    def want(self, wanted: Sequence[bool]) -> None:
        """Notes what a microstep wants of a unit that never ran on this rank; on others it may have."""
        self.wanted |= ParamSet.of(wanted)

    def note(self, state: GradState) -> None:
        """Notes what a microstep brings; a second one that brings the same changes nothing."""
        wanted, is_new, is_missing = map(ParamSet.of, state)
        before = self._wanted_before if self.last is None else self.wanted_now
        self.num_switches += wanted != before
        self.last = state
        self.wanted_now = wanted
        self.wanted |= wanted
        self._note_born(wanted & is_new)
        self.used |= wanted & ~is_missing

    def note_outside(self, index: int) -> None:
        """Notes that a parameter gets a gradient from outside of hop one."""
        self.used |= ParamSet.only(index)

    def note_zeros(self, index: int) -> None:
        """Notes that a parameter gets its first gradient, which may turn out to be nobody's."""
        self._note_born(ParamSet.only(index))

    def _note_born(self, params: int) -> None:
        self._born |= params
        self.used &= ~params


class UnitGradients:
    """The sharded gradients of one FSDP unit, from hop one to hop two.

    Args:
        name: The unit's name in the root module.
        group: Its parameters.
        reduce_dtype: Dtype of hop two; ``None`` keeps the gradients' own.
        second_hop: How it runs hop two.
        reductions: Further ways to run hop one, which come before the plain one where they apply.

    Attributes:
        phase: Where the unit is in its window.
        use: What the window used.
        num_reductions: Microsteps of the window that ran hop one.
        num_launches: How often the window launched hop two.
        num_relaunches: How often hop two had to run once more.
        total_reductions: Microsteps of all windows that ran hop one.
        total_launches: How often all windows launched hop two.
    """

    def __init__(
        self,
        name: str,
        group: UnitParamGroup,
        reduce_dtype: torch.dtype | None,
        second_hop: SecondHop,
        reductions: Sequence[Reduction] = (),
    ) -> None:
        self.name = name
        self.group = group
        self.phase = Phase.OPEN
        self.use = UnitUse()
        self.num_reductions = self.num_launches = self.num_relaunches = 0
        self.total_reductions = self.total_launches = 0
        self._dtype = reduce_dtype
        exact = [] if reduce_dtype is None else [ExactReduction(group, reduce_dtype)]
        self._reductions: list[Reduction] = [*exact, *reductions, PlainReduction(group)]
        self._second_hop = second_hop
        self._flight: Flight | None = None
        self._aside: dict[UnitParam, Tensor] = {}
        # Gradients that hop two has taken. Some are the compute stream's memory, which must not be freed before that
        # stream has waited for the reduce stream, as it has when the window is closed.
        self._sent: list[Tensor] = []
        self._kept, self._aside_in = 0, -1
        self._layouts: dict[int, FlatLayout] = {}

    # The parameters.

    @property
    def trainable(self) -> list[UnitParam]:
        """Parameters that want gradients at the moment."""
        return [param for param in self.group.params if param.sharded.requires_grad]

    @property
    def participants(self) -> FlatLayout:
        """Parameters that wanted gradients at any time in the window, the same ones in all replicas."""
        return self._layout(self.use.wanted | ParamSet.of(self.group.wanted()))

    def holds_gradient_of(self, ids: set[int]) -> bool:
        """Returns whether one of the sharded parameters with some ``id`` has a gradient."""
        shards = (param.sharded for param in self.group.params)
        return any(shard.grad is not None for shard in shards if id(shard) in ids)

    def _layout(self, chosen: int) -> FlatLayout:
        if chosen not in self._layouts:
            self._layouts[chosen] = FlatLayout([self.group.params[index] for index in ParamSet.indices(chosen)])
        return self._layouts[chosen]

    # Hop one.

    @property
    def may_run_on(self) -> bool:
        """Whether hop one of this unit ever runs beside the pass."""
        return any(reduction.may_run_on for reduction in self._reductions)

    @property
    def is_reducing(self) -> bool:
        """Whether hop one runs beside the pass."""
        return any(reduction.is_running for reduction in self._reductions)

    @labelled("hop one")
    def reduce(self, reduce_scatter: Callable[[], None], *, deferring: bool, weight: float) -> None:
        """Runs hop one, FSDP2's step, for this unit.

        All trainable parameters take part, with zeros where this rank did not use one: so do those of its peers. A unit
        that was not gathered for this microstep's backward pass takes no part. It was not on any peer either: a gather
        is a collective of the partition.
        """
        if self.phase is not Phase.OPEN:
            self.wait()
            self.phase = Phase.OUTDATED
        self._set_aside()
        if not self.group.has_run:
            self.use.want(self.group.wanted())
            reduce_scatter()
            return
        if weight != 1:
            self.group.weigh(weight)
        state = self.group.grad_state()
        if False not in state.is_missing and self.group.is_idle:
            self.use.want(state.wanted)
            return
        if state != self.use.last:
            self.use.note(state)
            self.group.choose_dtypes()
        layout = self._layout(self.use.wanted_now)
        if not layout.params:
            reduce_scatter()
            return
        if True in state.is_missing and not self.group.reduces_unused:  # otherwise FSDP2 does
            for param in layout.params:
                param.fill_unsharded_grad()
        self.num_reductions += 1
        self.total_reductions += 1
        for way in self._reductions:
            if way.applies(layout, deferring=deferring):
                way.run(layout, reduce_scatter)
                return

    def finish_reduction(self) -> None:
        """Ends a hop one that runs beside the pass."""
        for reduction in self._reductions:
            reduction.finish()

    def admit(self, index: int) -> None:
        """Lets somebody else add to the gradient of a parameter, on the current stream.

        What writes into gradients ends before; a result of hop two in flight would take the place of what was added.
        """
        self.finish_reduction()
        self.group.wait_offloaded()
        if self.phase is not Phase.OPEN:
            self.wait()
            self.phase = Phase.OUTDATED
        self.group.wait_reduce_stream()
        self._set_aside()
        self.use.note_outside(index)

    # Hop two.

    def _set_aside(self) -> None:
        """Sets aside gradients that are slices already, as shards come now; forgets those that a user has cleared."""
        if not self._second_hop.makes_slices:
            return
        is_new_pass, self._aside_in = current_backward_id() != self._aside_in, current_backward_id()
        for index, param in enumerate(self.group.params):
            grad = param.sharded.grad
            if grad is None and is_new_pass:
                self._aside.pop(param, None)
            elif grad is not None and is_slice(grad):
                self._aside[param], param.sharded.grad = grad, None
                self._kept |= ParamSet.only(index)

    def give_back(self) -> None:
        """Makes what was set aside the gradient of those that got no other."""
        for param in list(self._aside):
            if param.sharded.grad is None:
                param.sharded.grad = self._aside.pop(param)

    @labelled("hop two")
    def launch(self) -> int:
        """Starts hop two, which averages; returns the bytes of its message."""
        self._set_aside()
        layout = self.participants
        self.num_launches += 1
        self.total_launches += 1
        self._fill_missing(layout)
        # What the reduce stream takes up now may have been edited, replaced or made on the current stream.
        self.group.reduce_stream_waits()
        with self.group.reduce_stream():
            source, sums = self._sums(layout)
            if self._second_hop.makes_slices:
                self._sent += layout.grads()
            dtype = self._dtype or sums.dtype
            self._flight = flight = self._second_hop.launch(layout, source, sums, dtype, self.group.device)
        self.phase = Phase.REPLICATING
        return layout.numel * flight.sent.itemsize

    @labelled("end of hop two")
    def wait(self) -> None:
        """Waits for hop two and puts the result into the gradients."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        with self.group.reduce_stream():
            flight.wait()
            self._second_hop.take(flight, self._aside)
        self.phase = Phase.REPLICATED

    def join_flight(self) -> None:
        """Makes the reduce stream wait for hop two in flight.

        Not without streams, where it is the host that would wait, maybe for ranks that have failed, too.
        """
        if self._flight is not None and self.group.has_streams:
            with self.group.reduce_stream():
                self._flight.wait()

    def _sums(self, layout: FlatLayout) -> tuple[Reduction, Tensor]:
        """Returns the window's sums as one buffer, the most exact ones, and whose they are."""
        for reduction in self._reductions:
            sums = reduction.sums(layout)
            if sums is not None:
                return reduction, sums
        raise AssertionError("the plain reduction has sums always")

    def _fill_missing(self, layout: FlatLayout) -> None:
        """Gives zeros to parameters that other ranks may have used."""
        if local_gradients(layout.params) is not None:
            return
        for index, param in enumerate(self.group.params):
            if param.sharded.grad is None and param in layout.params:
                param.set_local_grad(torch.zeros_like(local_tensor(param.sharded), dtype=param.grad_dtype))
                if param not in self._aside:
                    self.use.note_zeros(index)

    # The end of the window.

    def clear_unused(self, used_anywhere: int) -> None:
        """Takes the gradient from parameters that no rank used, as on one process."""
        for index in ParamSet.indices(self.use.unclaimed & ~used_anywhere & ~self._kept):
            self.group.params[index].sharded.grad = None

    def close(self) -> None:
        """Ends the window. The current stream has waited for the reduce stream."""
        self.give_back()
        self._sent.clear()
        for reduction in self._reductions:
            reduction.drop()
        self.use.clear()
        self.phase, self.num_reductions, self.num_launches, self.num_relaunches = Phase.OPEN, 0, 0, 0
        self._kept = 0

    def abandon(self) -> None:
        """Forgets a pass that an exception ended; what its hop two brings is not wanted any more."""
        flight, self._flight = self._flight, None
        self.group.reduce_stream_waits()
        with self.group.reduce_stream():
            if flight is not None:
                flight.wait()
                self._second_hop.undo(flight)
        for param in self.group.params:
            param.drop_unsharded_grad()
        self.give_back()
        for reduction in self._reductions:
            reduction.drop()
        self.phase, self.num_reductions, self.num_launches, self._kept = Phase.OPEN, 0, 0, 0
