"""Who touched which bytes on which stream, and what becomes of freed memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from stream_clocks import Place, Stream, Timeline
from stream_placement import Kind, Placement, is_real
from torch import Tensor

_ALL = 1 << 60


class Access(NamedTuple):
    """An operator's reading or writing of a range of bytes."""

    low: int
    high: int
    stream: Stream
    time: int
    operator: str
    place: Place

    def overlaps(self, low: int, high: int) -> bool:
        """Returns whether it has bytes of the range."""
        return self.low < high and low < self.high

    def is_within(self, low: int, high: int) -> bool:
        """Returns whether all its bytes are in the range."""
        return low <= self.low and self.high <= high

    def __str__(self) -> str:
        return f"{self.operator} on {self.stream}: {self.place}"


@dataclass
class Race:
    """Two launches that nothing puts in order.

    Attributes:
        kind: ``RAW``, ``WAR``, ``WAW``, or ``FREED``: memory that was freed and used again too early.
        what: Which streams, and where the memory is from.
        before: The launch that should be over.
        after: The one that does not wait for it.
        count: How often the same two places met.
    """

    kind: str
    what: str
    before: str
    after: str
    count: int = 1

    @property
    def places(self) -> tuple[str, str, str]:
        """What makes it a race of its own: kind and innermost places."""
        return self.kind, self.before.split(" < ")[0], self.after.split(" < ")[0]

    def __str__(self) -> str:
        return f"[{self.kind}] x{self.count} {self.what}\n    first: {self.before}\n    then:  {self.after}"


@dataclass(eq=False)
class Block:
    """Memory of one storage, from the pool of the stream that was current when it was allocated, or the host's."""

    stream: Stream
    born: Place
    writes: list[Access] = field(default_factory=list)
    reads: list[Access] = field(default_factory=list)
    last: dict[Stream, Access] = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)
    reference: object = None

    def forget(self) -> None:
        """Forgets who touched it."""
        self.last, self.writes, self.reads = {}, [], []


class _Freed(NamedTuple):
    access: Access
    born: Place
    freed: Place


class Memory:
    """All blocks of a run and the races over them.

    Freed memory is judged when its stream's pool next gives memory out, not when it is freed: until then somebody may
    still wait.

    Args:
        timeline: The streams.
        placement: Where storages lie.
    """

    def __init__(self, timeline: Timeline, placement: Placement) -> None:
        self._timeline, self._placement = timeline, placement
        self._blocks: dict[int, Block] = {}
        self._pools: dict[Stream, list[_Freed]] = {}
        self._races: dict[tuple[str, ...], Race] = {}

    @property
    def races(self) -> list[Race]:
        """What was found, each pair of places once."""
        return list(self._races.values())

    def block(self, storage: torch.UntypedStorage, stream: Stream, born: Place | None = None) -> Block:
        """Returns the memory of a storage; one of the device that is unknown so far is of the stream's pool."""
        key = storage._cdata
        block = self._blocks.get(key)
        if block is None:
            if self._placement.of_storage(storage) is not Kind.DEVICE:
                stream = self._timeline.host_stream
            block = self._blocks[key] = Block(stream, born or Place(()))
            block.reference = weakref.ref(storage, lambda _, key=key, block=block: self._died(key, block))
        return block

    def allocate(self, storage: torch.UntypedStorage, stream: Stream, operator: str, place: Place) -> None:
        """Notes a new storage: what was freed into the stream's pool may be in it."""
        stream.follow_host()
        self._reuse(stream, place)
        block = self.block(storage, stream, place)
        self._write(block, Access(0, _ALL, stream, stream.tick(), operator, place))

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Notes that a storage was freed (0) or allocated anew."""
        if size == 0:
            block = self._blocks.get(storage._cdata)
            if block is not None:
                self._free(block)
            return
        stream = self._timeline.current
        block = self.block(storage, stream)
        self._free(block)
        block.stream, block.born, block.recorded = stream, Place.here(), set()
        self.allocate(storage, stream, "resize_", block.born)

    def record(self, tensor: Tensor, stream: Stream) -> None:
        """Notes ``tensor.record_stream(stream)``: its memory is not reused before that stream is done with it."""
        if self._timeline.waits.runs("record_stream"):
            self.block(tensor.untyped_storage(), self._timeline.current).recorded.add(stream)

    def read(self, tensor: Tensor, stream: Stream, operator: str, place: Place, time: int | None = None) -> None:
        """Notes that a launch reads a tensor."""
        self._touch(tensor, stream, operator, place, time, writes=False)

    def write(self, tensor: Tensor, stream: Stream, operator: str, place: Place, time: int | None = None) -> None:
        """Notes that a launch writes a tensor."""
        self._touch(tensor, stream, operator, place, time, writes=True)

    def _touch(
        self, tensor: Tensor, stream: Stream, operator: str, place: Place, time: int | None, *, writes: bool
    ) -> None:
        if not is_real(tensor) or not tensor.numel():
            return
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return
        size = tensor.element_size()
        low = tensor.storage_offset() * size
        last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        access = Access(low, low + (last + 1) * size, stream, time or stream.tick(), operator, place)
        (self._write if writes else self._read)(self.block(storage, stream), access)

    def _read(self, block: Block, access: Access) -> None:
        low, high, stream = access[:3]
        for write in block.writes:
            if write.overlaps(low, high) and not stream.is_after(write.stream, write.time):
                self._report("RAW", f"{stream} reads without waiting for {write.stream}", block.born, write, access)
        block.reads = [read for read in block.reads if read.stream is not stream or not read.is_within(low, high)]
        block.reads.append(access)
        block.last[stream] = access

    def _write(self, block: Block, access: Access) -> None:
        low, high, stream = access[:3]
        for kind, earlier in (("WAW", block.writes), ("WAR", block.reads)):
            for other in earlier:
                if other.overlaps(low, high) and not stream.is_after(other.stream, other.time):
                    did = "reads" if kind == "WAR" else "writes"
                    what = f"{stream} writes without waiting for what {other.stream} {did}"
                    self._report(kind, what, block.born, other, access)
        block.writes = [write for write in block.writes if not write.is_within(low, high)]
        block.reads = [read for read in block.reads if not read.is_within(low, high)]
        block.writes.append(access)
        block.last[stream] = access

    def _died(self, key: int, block: Block) -> None:
        if self._blocks.get(key) is block:
            del self._blocks[key]
        self._free(block)

    def _free(self, block: Block) -> None:
        """Gives memory back to its pool; what other streams do with it may not be over yet.

        The pool of host memory knows of copies that are not over.
        """
        if block.stream is self._timeline.host_stream:
            block.forget()
            return
        others = [
            access
            for stream, access in block.last.items()
            if stream is not block.stream and stream not in block.recorded
        ]
        if others:
            here = Place.here(3)
            self._pools.setdefault(block.stream, []).extend(_Freed(access, block.born, here) for access in others)
        block.forget()

    def _reuse(self, stream: Stream, place: Place) -> None:
        for access, born, freed in self._pools.pop(stream, ()):
            if not stream.is_after(access.stream, access.time):
                what = f"memory of {stream}'s pool, used on {access.stream}, is reused (freed at {freed})"
                self._report("FREED", what, born, access, Access(0, _ALL, stream, 0, "allocation", place))

    def _report(self, kind: str, what: str, born: Place, before: Access, after: Access) -> None:
        key = (kind, before.operator, before.place.innermost, after.operator, after.place.innermost)
        if key in self._races:
            self._races[key].count += 1
        else:
            self._races[key] = Race(kind, f"{what}; allocated at {born.innermost}", str(before), str(after))
