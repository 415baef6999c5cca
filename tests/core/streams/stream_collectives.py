"""Collectives of the fake process group, on the streams on which NCCL would run them.

They give what one rank would see if all ranks held the same values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from stream_checker import StreamChecker
from stream_clocks import Stream, merge
from torch import Tensor

# What the other ranks add to an all-reduced message.
Peers = Callable[[Tensor], object]


class StandInWork(dist.Work):
    """Handle of a collective.

    Args:
        checker: The run.
        stream: The group's stream, or ``None`` if the collective ran on the current one.
    """

    def __init__(self, checker: StreamChecker, stream: Stream | None) -> None:
        super().__init__()
        self._timeline = checker.timeline
        self._event = None if stream is None else stream.record_event()
        self.when_waited: Callable[[], object] | None = None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Makes the current stream wait."""
        if self._event is not None and self._timeline.waits.runs("Work.wait"):
            merge(self._timeline.current.clock, self._event.clock)
        if self.when_waited is not None:
            self.when_waited()
        return True

    def is_completed(self) -> bool:
        """Returns that it is over, as its values are there."""
        return True


class Collectives:
    """Methods that take the place of those of ``dist.ProcessGroup``.

    Args:
        checker: The run.
        peers: What other ranks add to the messages of all-reduces that take the maximum.
    """

    def __init__(self, checker: StreamChecker, peers: Peers | None = None) -> None:
        self._checker = checker
        self._peers = peers
        # NCCL keeps the tensors of an asynchronous collective until it is waited for.
        self._in_flight: dict[int, list[Tensor]] = {}
        self._num_launched = 0
        self._last: dict[str, StandInWork] = {}

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Returns functions by the names of the methods that they replace."""
        gather, scatter = self._all_gather, self._reduce_scatter
        replaced: dict[str, Callable[..., Any]] = {
            "all_gather_single": gather,
            "_allgather_base": gather,
            "all_gather_single_coalesced": _each(gather),
            "allgather_into_tensor_coalesced": _each(gather),
            "reduce_scatter_single": scatter,
            "_reduce_scatter_base": scatter,
            "reduce_scatter_single_coalesced": _each(scatter),
            "reduce_scatter_tensor_coalesced": _each(scatter),
            "allreduce": self._all_reduce,
            "_start_coalescing": lambda group, device: None,
            "_end_coalescing": self._end_coalescing,
        }
        # A plain function becomes a method of the group; a bound one would not be told which group it is.
        return {name: _as_method(function) for name, function in replaced.items() if hasattr(dist.ProcessGroup, name)}

    def _launch(
        self,
        group: dist.ProcessGroup,
        name: str,
        reads: list[Tensor],
        writes: list[Tensor],
        run: Callable[[], object],
        options: Sequence[Any],
    ) -> StandInWork:
        is_async = any(getattr(option, "asyncOp", False) for option in options)
        stream = self._checker.collective(group, name, reads, writes, run, is_async=is_async)
        work = self._last[group.group_name] = StandInWork(self._checker, stream)
        if stream is not None:
            self._num_launched += 1
            self._in_flight[self._num_launched] = [*reads, *writes]
            work.when_waited = functools.partial(self._in_flight.pop, self._num_launched, None)
        return work

    def _all_gather(self, group: dist.ProcessGroup, output: Tensor, source: Tensor, *options: Any) -> StandInWork:
        def run() -> None:
            parts = output.view(group.size(), -1)
            parts.copy_(source.reshape(1, -1).clone().expand_as(parts))

        return self._launch(group, "all_gather", [source], [output], run, options)

    def _reduce_scatter(self, group: dist.ProcessGroup, output: Tensor, source: Tensor, *options: Any) -> StandInWork:
        def run() -> None:
            output.copy_(source.reshape(group.size(), *output.shape)[group.rank()].clone())

        return self._launch(group, "reduce_scatter", [source], [output], run, options)

    def _all_reduce(self, group: dist.ProcessGroup, tensors: Any, *options: Any) -> StandInWork:
        tensors = tensors if isinstance(tensors, list) else [tensors]

        def run() -> None:
            if self._peers is not None and any(option.reduceOp == dist.ReduceOp.MAX for option in options):
                for tensor in tensors:
                    self._peers(tensor)

        return self._launch(group, "all_reduce", tensors, tensors, run, options)

    def _end_coalescing(self, group: dist.ProcessGroup, device: torch.device) -> StandInWork:
        """Returns the handle of all that was launched: the last one's, as they share a stream."""
        return self._last.get(group.group_name) or StandInWork(self._checker, None)


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda group, *args: function(group, *args)


def _each(one: Callable[..., StandInWork]) -> Callable[..., StandInWork]:
    def coalesced(group: dist.ProcessGroup, outputs: list[Tensor], sources: list[Tensor], *options: Any) -> StandInWork:
        works = [one(group, output, source, *options) for output, source in zip(outputs, sources, strict=True)]
        return works[-1]

    return coalesced


def same_objects(gathered: list[Any], value: Any, group: dist.ProcessGroup | None = None) -> None:
    """Stands for ``dist.all_gather_object``: all ranks answer alike, but for their own rank."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    is_rank = type(value) is int and value == dist.get_rank()
    gathered[:] = ranks if is_rank else [value] * len(ranks)
