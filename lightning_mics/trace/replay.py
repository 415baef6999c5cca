"""What a pass allocates and computes, by unit.

A pass is recorded, and gone through a second time when it is known which memory is what. What the forward pass keeps
belongs to the unit that allocated it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_mics.core.units import Unit as Modules
from lightning_mics.errors import MiCSConfigError
from lightning_mics.trace._torch import Event, Launches, Returned, Storage, Work, flop_formulas, track_activations
from lightning_mics.trace.structure import Key

# Losses and the like are no part of what grows with samples; they would hide that layers are equal.
_SCALAR_BYTES = 16


@dataclass
class Counts:
    """What one pass counted of a unit, in operations and bytes."""

    forward_flops: int = 0
    backward_flops: int = 0
    saved: int = 0
    products: int = 0
    rest: int = 0
    outputs: int = 0
    early_gradients: int = 0
    forward_extra: int = 0
    backward_extra: int = 0
    forward_launches: int = 0
    backward_launches: int = 0
    forward_traffic: int = 0
    backward_traffic: int = 0
    attention: int = 0
    masked: int = 0


Trace = dict[Key, Counts]  # in the order of the forward pass, the root first
_Done = tuple[int, Work]  # floating-point operations, and what a device is told to do
_Record = list[tuple[Event, _Done]]  # with what was done before each event


def trace(
    root: nn.Module,
    model: nn.Module,
    unit_of: Mapping[nn.Module, Modules],
    batch: Any,
    gradient_sizes: set[int],
    *,
    backward: bool,
) -> Trace:
    """Runs a sharded module from a batch to the loss of a model in it, and perhaps back; returns what that counts.

    Raises:
        MiCSConfigError: If there is no loss.
    """
    events: _Record = []
    flops = FlopCounterMode(display=False, custom_mapping=flop_formulas())

    def record(event: Event) -> None:
        events.append((event, (0, Work()) if event.kind == "memory" else (flops.get_total_flops(), launches.work)))

    tracker = track_activations(root, record)
    launches = Launches(tracker)
    tracker.track_inputs((batch,))
    returned = Returned(model)
    with tracker, flops, launches:
        loss = root(batch)
        record(Event("loss"))
        outputs = returned.dropped_bytes()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise MiCSConfigError("The loss is not a tensor that needs a gradient. Return such a one from loss=.")
        if backward:
            loss.backward()
        record(Event("end"))
    tracker.classify()
    _leave_out_partial_gradients([event for event, _ in events], gradient_sizes)
    counts = _Replay(unit_of, _kept_storages(event for event, _ in events)).run(events)
    counts[None].outputs = outputs
    return counts


def _leave_out_partial_gradients(events: Sequence[Event], gradient_sizes: set[int]) -> None:
    """Where a parameter is used at both ends of a model, the gradient of one use waits for that of the other.

    It is no activation: gradients count elsewhere.
    """
    waiting: dict[int, Storage] = {}
    kinds = [event.kind for event in events]
    if "backward_end" not in kinds:
        return
    for event in events[kinds.index("loss") : kinds.index("backward_end")]:
        if event.storage is not None:
            waiting.pop(id(event.storage), None)
            if event.change in gradient_sizes:
                waiting[id(event.storage)] = event.storage
    for storage in waiting.values():
        storage.is_activation, storage.is_gradient = False, True


def _kept_storages(events: Iterable[Event]) -> set[int]:
    """Returns what is left of the forward pass, by ``id``."""
    sizes: Counter[int] = Counter()
    for event in itertools.takewhile(lambda event: event.kind != "loss", events):
        if event.storage is not None:
            sizes[id(event.storage)] += event.change
    return {key for key, size in sizes.items() if size > 0}


@dataclass
class _Pass:
    """A unit's forward or backward pass under way."""

    unit: Key
    peak: int = 0  # most bytes alive
    kept_before: int = 0  # bytes kept for the backward pass that are there when it begins


class _Replay:
    """Goes through a record, and keeps account of which unit is at work."""

    def __init__(self, unit_of: Mapping[Any, Modules], kept_storages: set[int]) -> None:
        self._unit_of, self._kept_storages = unit_of, kept_storages
        self._counts: Trace = {None: Counts()}
        self._passes = [_Pass(None)]
        self._in_backward = self._reached_blocks = False
        # Bytes alive, and those of them that stay until the backward pass.
        self._live = self._kept = 0
        self._done: _Done = (0, Work())

    def run(self, events: _Record) -> Trace:
        """Returns the counts by unit."""
        for event, done in events:
            if event.storage is not None:
                if event.storage.is_activation and abs(event.change) > _SCALAR_BYTES:
                    self._change(event.storage, event.change)
                elif event.storage.is_gradient and not self._reached_blocks:
                    self._counts[None].early_gradients += event.change
                continue
            self._charge(done)
            if event.kind == "loss":
                self._end_forward(None)
                self._in_backward, self._passes = True, [_Pass(None, kept_before=self._kept)]
            elif (unit := self._unit_of.get(event.module)) is not None:
                self._move(event.kind, unit)
        return self._counts

    def _charge(self, done: _Done) -> None:
        counts = self._counts[self._passes[-1].unit]
        flops, work = done[0] - self._done[0], done[1] - self._done[1]
        if self._in_backward:
            counts.backward_flops += flops
            counts.backward_launches += work.launches
            counts.backward_traffic += work.traffic
        else:
            counts.forward_flops += flops
            counts.forward_launches += work.launches
            counts.forward_traffic += work.traffic
            counts.attention += work.attention
            counts.masked += work.masked
        self._done = done

    def _change(self, storage: Storage, change: int) -> None:
        current, is_kept = self._passes[-1], id(storage) in self._kept_storages
        counts = self._counts[current.unit]
        self._live += change
        self._kept += change * is_kept
        if self._in_backward:
            counts.backward_extra = max(counts.backward_extra, self._live - current.kept_before)
        else:
            counts.saved += change * is_kept
            counts.rest += change * (is_kept and not storage.is_product)
            counts.products += max(0, change) * storage.is_product
            current.peak = max(current.peak, self._live)

    def _move(self, kind: str, unit: Modules) -> None:
        if kind == "forward" and not self._in_backward:
            self._counts.setdefault(unit, Counts())
            self._passes.append(_Pass(unit, peak=self._live))
        elif kind == "forward_end" and not self._in_backward:
            self._end_forward(unit)
        elif kind == "backward" and all(other.unit != unit for other in self._passes):
            self._reached_blocks = True
            self._passes.append(_Pass(unit, kept_before=self._kept))
        elif kind == "backward_end":
            self._passes = [other for other in self._passes if other.unit != unit]

    def _end_forward(self, unit: Key) -> None:
        if self._passes[-1].unit == unit:
            counts = self._counts[unit]
            counts.forward_extra = max(counts.forward_extra, self._passes.pop().peak - self._kept)
