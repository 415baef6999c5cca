"""A step as events on streams: compute, gather, reduce, replicate; what overlaps, and what compute waits for.

The order of events is that of FSDP2. One unit is gathered ahead: while a unit computes, the next one's gather runs.
In the backward pass the reduce-scatter of a unit runs beside the backward of the next, and one of them is in flight at
most. The all-reduce between replicas follows the reduce-scatter of the unit, beside everything else, in microsteps that
end a window (in every microstep for the 2-D mesh). The link between nodes carries one collective at a time, in the
order of their launch. The host launches everything in that order, ahead of the device, which cannot run what is not
launched yet.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lightning_mics.plan.cost import FREE, Cost
from lightning_mics.plan.settings import Scheme

COMPUTE, GATHER, REDUCE, REPLICATE = "compute", "gather", "reduce", "replicate"
# How much longer compute takes on accelerators while a collective runs: the average that Lee et al. 2025
# (arXiv 2507.03114) measured on A100, H100, MI210 and MI250 with FSDP and pipelines.
BESIDE_COLLECTIVES = 0.189
STREAMS = (COMPUTE, GATHER, REDUCE, REPLICATE)
# Microsteps before the last are alike; more than these are extrapolated.
_SIMULATED_MICROSTEPS = 3


@dataclass(frozen=True)
class Engine:
    """How what runs a step orders it.

    Attributes:
        gathers_ahead: Whether gathers run beside the compute before.
        reduces_beside: Whether reduce-scatters run beside the compute after.
        replicates_beside: Whether all-reduces between replicas run beside compute.
        settles_before_replication: Whether compute waits for a reduce-scatter that an all-reduce is to follow.
        shares_thread: Whether gathers and reduce-scatters run one after another.
        reduce_factor: Bytes that a reduce-scatter sends, in those of a ring.
        slowdown: How much longer compute takes beside a collective, which uses a part of the device itself.
        least_message: Elements from which a parameter has messages of its own, where units do not have one; smaller
            parameters are not sharded then.
    """

    gathers_ahead: bool = True
    reduces_beside: bool = True
    replicates_beside: bool = True
    settles_before_replication: bool = False
    shares_thread: bool = False
    reduce_factor: float = 1.0
    least_message: int | None = None
    slowdown: float = 0.0

    def without_overlap(self) -> Engine:
        """Returns the same with compute that waits for each collective."""
        return replace(self, gathers_ahead=False, reduces_beside=False, replicates_beside=False)


def engine_of(scheme: Scheme, device_type: str, *, settles: bool) -> Engine:
    """Returns how a scheme runs on a kind of device.

    On accelerators streams overlap. On CPUs FSDP2 waits for each collective, and gloo's reduce-scatter sends everything
    to everyone; lightning-mics has a thread and rings there, and lets hop two begin early where hop one is quick.

    Args:
        scheme: The scheme.
        device_type: ``"cuda"`` or ``"cpu"``.
        settles: Whether there is a hop two, and hop one stays inside a node.
    """
    if device_type != "cpu":
        return Engine(slowdown=BESIDE_COLLECTIVES)
    if scheme == "mics":
        return Engine(shares_thread=True, settles_before_replication=settles)
    if scheme == "ddp":
        return Engine()
    return Engine(gathers_ahead=False, reduces_beside=False, replicates_beside=False, reduce_factor=2.0)


@dataclass(frozen=True, kw_only=True)
class UnitTimes:
    """Seconds of one unit in a microstep.

    Attributes:
        name: The unit's name.
        unpack: What each pass takes between its gather and that of the next unit: the copy out of the message, and
            host time that nothing hides.
        forward: Compute of its forward pass.
        backward: Compute of its backward pass, with recomputation.
        gather: Its gather.
        reduce: Its reduce-scatter.
        replicate: Its hop two between replicas.
        slices: What brings its slices together after a step on them.
        forward_host: What the host does for its forward pass.
        backward_host: What the host does for its backward pass.
        runs_backward: Whether the backward pass comes here.
    """

    name: str
    unpack: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    gather: Cost = FREE
    reduce: Cost = FREE
    replicate: Cost = FREE
    slices: Cost = FREE
    forward_host: float = 0.0
    backward_host: float = 0.0
    runs_backward: bool = True


@dataclass(slots=True)
class Event:
    """Something that occupies a stream.

    Attributes:
        stream: One of :data:`STREAMS`.
        unit: Name of the unit, or ``"optimizer"``.
        phase: ``"forward"``, ``"backward"`` or ``"step"``.
        microstep: Number of the microstep, from 0.
        start: Seconds since the step began.
        end: The same, of its end.
    """

    stream: str
    unit: str
    phase: str
    microstep: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of an optimizer step.

    Attributes:
        seconds: Of the whole step.
        compute: Seconds in which compute runs.
        exposed: Seconds in which compute waits, by what it waits for: gather, reduce, replicate.
        busy: Seconds in which each stream is busy.
        host: Seconds in which the host works.
        idle: Seconds in which compute waits for the host alone.
        events: The events of the first microsteps and of the last; of long windows not all.
    """

    seconds: float
    compute: float
    exposed: Mapping[str, float]
    busy: Mapping[str, float]
    host: float = 0.0
    idle: float = 0.0
    events: Sequence[Event] = field(default=(), repr=False)

    @property
    def waiting(self) -> float:
        """Share of the step in which compute waits for communication."""
        return sum(self.exposed.values()) / self.seconds


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What a step consists of.

    Attributes:
        root: The root unit: gathered first; its compute (the head) follows the blocks.
        blocks: The blocks in forward order.
        accumulation: Microsteps.
        replicates_always: Whether replicas synchronise in every microstep.
        gathers_again: Whether blocks are gathered again for their backward pass.
        optimizer: Seconds of the optimizer step.
        optimizer_host: What the host does for it.
        agreement: Seconds of the exchange that ends a window.
        engine: How it is run.
    """

    root: UnitTimes
    blocks: Sequence[UnitTimes]
    accumulation: int = 1
    replicates_always: bool = False
    gathers_again: bool = True
    optimizer: float = 0.0
    optimizer_host: float = 0.0
    agreement: float = 0.0
    engine: Engine = Engine()


# ZeRO-3 as DeepSpeed 0.5.6 had it, with which the MiCS paper compares: a message for each parameter above its
# persistence threshold (10^5 elements by default), and compute that waits for each of them.
ZERO3_OF_2021 = Engine(gathers_ahead=False, reduces_beside=False, replicates_beside=False, least_message=100_000)


def simulate(work: StepWork) -> StepTime:
    """Returns the time of a step, and what it is made of."""
    run = _Run(work)
    if work.accumulation <= _SIMULATED_MICROSTEPS:
        return run.simulate(work.accumulation)
    # Middle microsteps are alike, so each further one takes what the last of them added.
    shorter = _Run(work).simulate(_SIMULATED_MICROSTEPS - 1)
    longer = run.simulate(_SIMULATED_MICROSTEPS)
    return _extrapolated(shorter, longer, work.accumulation - _SIMULATED_MICROSTEPS)


def _extrapolated(shorter: StepTime, longer: StepTime, times: int) -> StepTime:
    def more(before: float, after: float) -> float:
        return after + times * (after - before)

    return StepTime(
        seconds=more(shorter.seconds, longer.seconds),
        compute=more(shorter.compute, longer.compute),
        exposed={hop: more(shorter.exposed[hop], longer.exposed[hop]) for hop in longer.exposed},
        busy={stream: more(shorter.busy[stream], longer.busy[stream]) for stream in longer.busy},
        host=more(shorter.host, longer.host),
        idle=more(shorter.idle, longer.idle),
        events=longer.events,
    )


class _Run:
    """Plays a step, one event after another, in the order in which they are launched."""

    def __init__(self, work: StepWork) -> None:
        self.work, self.engine = work, work.engine
        self.events: list[Event] = []
        self.exposed: defaultdict[str, float] = defaultdict(float)
        self._free: defaultdict[str, float] = defaultdict(float)
        self.now = self._link_free = 0.0  # when the compute stream is free, and the link between nodes
        self._busy_until = 0.0  # of collectives
        self._reduced = self._replicated = 0.0
        self._where = ("forward", 0)
        # The host begins a step with some lead, or else the device would wait for the first unit in each of them.
        self._host = self._idle = 0.0
        self._lead = work.root.forward_host + sum(unit.forward_host for unit in work.blocks[:1])
        self._rows: deque[float] = deque()  # when what an optimizer's step made of units elsewhere is there

    def simulate(self, microsteps: int) -> StepTime:
        work = self.work
        for number in range(microsteps):
            is_last = number == microsteps - 1
            self._forward(number)
            self._backward(number, replicates=is_last or work.replicates_always)
        self._where = ("step", microsteps - 1)
        self._wait(self.now + work.agreement, REPLICATE)
        self._compute("optimizer", work.optimizer, work.optimizer_host)
        self._wait_for_host(self._host - self.now)  # the lead comes from the step before
        busy = {stream: 0.0 for stream in STREAMS}
        for event in self.events:
            busy[event.stream] += event.end - event.start
        exposed = {hop: self.exposed[hop] for hop in (GATHER, REDUCE, REPLICATE)}
        return StepTime(
            seconds=self.now,
            compute=busy[COMPUTE],
            exposed=exposed,
            busy=busy,
            host=self._host,
            idle=self._idle,
            events=tuple(self.events),
        )

    def _compute(self, unit: str, seconds: float, host: float = 0.0) -> None:
        """Computes for some seconds, and ends no earlier than the host has launched all of it."""
        self._host += host
        seconds = self._beside_collectives(seconds)
        self._wait_for_host(self._host - self._lead - self.now - seconds)
        if seconds > 0:
            self._note(COMPUTE, unit, self.now, self.now + seconds)
            self.now += seconds

    def _beside_collectives(self, seconds: float) -> float:
        """Returns what some seconds of compute become that begin now, with the collectives that are under way."""
        if not self.engine.slowdown:
            return seconds
        until = self._busy_until - self.now
        if until <= 0:
            return seconds
        return seconds + self.engine.slowdown * min(seconds, until / (1 + self.engine.slowdown))

    def _wait_for_host(self, seconds: float) -> None:
        if seconds > 0:
            self._idle += seconds
            self.now += seconds

    def _wait(self, until: float, hop: str) -> None:
        if until > self.now:
            self.exposed[hop] += until - self.now
            self.now = until

    def _launch(self, hop: str, unit: str, cost: Cost, ready: float) -> float:
        """Starts a collective; returns when it ends."""
        if cost.seconds == 0:
            return ready
        stream = GATHER if hop == REDUCE and self.engine.shares_thread else hop
        start = max(ready, self._free[stream], self._link_free if cost.inter_seconds else 0.0)
        end = start + cost.seconds
        self._free[stream] = end
        self._busy_until = max(self._busy_until, end)
        if cost.inter_seconds:
            self._link_free = start + cost.inter_seconds
        self._note(hop, unit, start, end)
        return end

    def _note(self, stream: str, unit: str, start: float, end: float) -> None:
        phase, microstep = self._where
        self.events.append(Event(stream, unit, phase, microstep, start, end))

    def _gather(self, unit: UnitTimes) -> float:
        self._wait(self._rows.popleft() if self._rows else 0.0, REPLICATE)
        return self._launch(GATHER, unit.name, unit.gather, self.now)

    def _first_gather(self, units: Sequence[UnitTimes]) -> float:
        return self._gather(units[0]) if units and self._gathers_ahead else 0.0

    @property
    def _gathers_ahead(self) -> bool:
        return self.engine.gathers_ahead and not self._rows

    def _gather_in_turn(self, units: Sequence[UnitTimes], coming: float) -> Iterator[UnitTimes]:
        """Yields units when their parameters are there, with the gather of the next one on its way.

        Args:
            units: The units.
            coming: When the gather of the first one ends, where gathers run ahead.
        """
        for index, unit in enumerate(units):
            self._wait(coming if self._gathers_ahead else self._gather(unit), GATHER)
            self._compute(unit.name, unit.unpack)
            if self._gathers_ahead and index + 1 < len(units):
                coming = self._gather(units[index + 1])
            yield unit

    def _forward(self, number: int) -> None:
        self._where = ("forward", number)
        root, blocks = self.work.root, self.work.blocks
        if number == 0:  # rows of the step before come beside the forward pass that needs them, in its order
            units = (root, *blocks) if any(unit.slices.seconds for unit in (root, *blocks)) else ()
            self._rows = deque(self._launch(REPLICATE, unit.name, unit.slices, 0.0) for unit in units)
            if self._rows and not self.engine.replicates_beside:
                self._wait(self._rows[-1], REPLICATE)
        self._wait(self._gather(root), GATHER)
        self._compute(root.name, root.unpack)
        for unit in self._gather_in_turn(blocks, self._first_gather(blocks)):
            self._compute(unit.name, unit.forward, unit.forward_host)
        self._compute(root.name, root.forward, root.forward_host)

    def _backward(self, number: int, *, replicates: bool) -> None:
        self._where = ("backward", number)
        root, blocks = self.work.root, [unit for unit in self.work.blocks[::-1] if unit.runs_backward]
        coming = self._first_gather(blocks) if self.work.gathers_again else 0.0
        self._compute(root.name, root.backward, root.backward_host)
        self._reduced = self._replicated = 0.0
        for unit in self._gather_in_turn(blocks, coming) if self.work.gathers_again else blocks:
            self._compute(unit.name, unit.backward, unit.backward_host)
            self._reduce(unit, replicates=replicates)
        self._reduce(root, replicates=replicates)
        self._wait(self._reduced, REDUCE)
        self._wait(self._replicated, REPLICATE)

    def _reduce(self, unit: UnitTimes, *, replicates: bool) -> None:
        engine = self.engine
        self._wait(self._reduced, REDUCE)
        self._reduced = self._launch(REDUCE, unit.name, unit.reduce * engine.reduce_factor, self.now)
        if not engine.reduces_beside or (replicates and engine.settles_before_replication):
            self._wait(self._reduced, REDUCE)
        if replicates:
            end = self._launch(REPLICATE, unit.name, unit.replicate, self._reduced)
            self._replicated = max(self._replicated, end)
            if not engine.replicates_beside:
                self._wait(self._replicated, REPLICATE)
