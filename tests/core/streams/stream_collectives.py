"""Collectives on the streams on which NCCL would run them; those of tensors in host memory are the host's, as gloo's.

Of the fake process group they give what one rank would see if all ranks held the same values. Those of a real one are
run as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from stream_checker import StreamChecker
from stream_clocks import Stream, merge
from torch import Tensor

# What the other ranks add to an all-reduced message.
Peers = Callable[[Tensor], object]
# What a collective reads, what it writes, and how it comes by its values without other ranks.
Planned = tuple[list[Tensor], list[Tensor], Callable[[], object]]
Plan = Callable[..., Planned]


class StandInWork(dist.Work):
    """Handle of a collective.

    Args:
        checker: The run.
        stream: The group's stream, or ``None`` if the collective ran on the current one.
        is_of_host: Whether it is the host that has to wait.
    """

    def __init__(self, checker: StreamChecker, stream: Stream | None, *, is_of_host: bool = False) -> None:
        super().__init__()
        self._timeline = checker.timeline
        self._event = None if stream is None else stream.record_event()
        self._is_of_host = is_of_host
        self.when_waited: Callable[[], object] | None = None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Makes the current stream wait, or the host: not for the device, but for a collective of its own."""
        if self._event is not None and self._timeline.waits.runs("Work.wait"):
            waiter = self._timeline.host_stream if self._is_of_host else self._timeline.current
            merge(waiter.clock, self._event.clock)
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
        is_real: Whether the process group has other ranks.
    """

    def __init__(self, checker: StreamChecker, peers: Peers | None = None, *, is_real: bool = False) -> None:
        self._checker = checker
        self._peers = peers
        self._is_real = is_real
        # NCCL keeps the tensors of an asynchronous collective until it is waited for.
        self._in_flight: dict[int, list[Tensor]] = {}
        self._num_launched = 0
        self._last: dict[str, StandInWork] = {}

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Returns functions by the names of the methods that they replace."""
        singles = {
            "all_gather_single": _gather,
            "_allgather_base": _gather,
            "reduce_scatter_single": _reduce_scatter,
            "_reduce_scatter_base": _reduce_scatter,
            "allgather": _gather_list,
            "allreduce": self._all_reduce,
            "broadcast": _broadcast,
        }
        coalesced = {
            "all_gather_single_coalesced": "all_gather_single",
            "allgather_into_tensor_coalesced": "_allgather_base",
            "reduce_scatter_single_coalesced": "reduce_scatter_single",
            "reduce_scatter_tensor_coalesced": "_reduce_scatter_base",
        }
        replaced = {name: self._launching(name, plan) for name, plan in singles.items()}
        replaced |= {name: _each(replaced[one]) for name, one in coalesced.items()}
        # Plain functions become methods of the group; bound ones would not be told which group it is.
        replaced["_start_coalescing"] = lambda group, device: None
        replaced["_end_coalescing"] = lambda group, device: self._end_coalescing(group)
        replaced["barrier"] = lambda group, *options, **named: self._barrier()
        return {name: function for name, function in replaced.items() if hasattr(dist.ProcessGroup, name)}

    def _launching(self, name: str, plan: Plan) -> Callable[..., StandInWork]:
        """Returns what launches a collective: ``plan`` says what it reads, writes and does without other ranks."""
        original = getattr(dist.ProcessGroup, name, None)

        def launch(group: dist.ProcessGroup, *args: Any) -> StandInWork:
            reads, writes, run = plan(group, *args)
            if self._is_real and original is not None:
                run = functools.partial(_run_now, original, group, *args)
            is_async = any(getattr(option, "asyncOp", False) for option in args)
            return self._launch(group, plan.__name__.strip("_"), reads, writes, run, is_async=is_async)

        return launch

    def _launch(
        self,
        group: dist.ProcessGroup,
        name: str,
        reads: list[Tensor],
        writes: list[Tensor],
        run: Callable[[], object],
        *,
        is_async: bool,
    ) -> StandInWork:
        is_of_host = self._checker.is_of_host([*reads, *writes])
        stream = self._checker.collective(group, name, reads, writes, run, is_async=is_async, is_of_host=is_of_host)
        work = self._last[group.group_name] = StandInWork(self._checker, stream, is_of_host=is_of_host)
        if stream is not None:
            self._num_launched += 1
            self._in_flight[self._num_launched] = [*reads, *writes]
            work.when_waited = functools.partial(self._in_flight.pop, self._num_launched, None)
        return work

    def _all_reduce(self, group: dist.ProcessGroup, tensors: Any, *options: Any) -> Planned:
        tensors = tensors if isinstance(tensors, list) else [tensors]

        def run() -> None:
            if self._peers is not None and any(option.reduceOp == dist.ReduceOp.MAX for option in options):
                for tensor in tensors:
                    self._peers(tensor)

        return tensors, tensors, run

    def _barrier(self) -> StandInWork:
        """NCCL's is a collective that the host waits for."""
        if not self._checker.has_gloo:
            self._checker.timeline.wait_on_host("barrier")
        return StandInWork(self._checker, None)

    def _end_coalescing(self, group: dist.ProcessGroup) -> StandInWork:
        """Returns the handle of all that was launched: the last one's, as they share a stream."""
        return self._last.get(group.group_name) or StandInWork(self._checker, None)


def _gather(group: dist.ProcessGroup, output: Tensor, source: Tensor, *options: Any) -> Planned:
    def run() -> None:
        parts = output.view(group.size(), -1)
        parts.copy_(source.reshape(1, -1).clone().expand_as(parts))

    return [source], [output], run


def _gather_list(group: dist.ProcessGroup, outputs: Any, sources: Any, *options: Any) -> Planned:
    def run() -> None:
        for output in outputs[0]:
            output.copy_(sources[0])

    return sources, outputs[0], run


def _reduce_scatter(group: dist.ProcessGroup, output: Tensor, source: Tensor, *options: Any) -> Planned:
    def run() -> None:
        output.copy_(source.reshape(group.size(), *output.shape)[group.rank()].clone())

    return [source], [output], run


def _broadcast(group: dist.ProcessGroup, tensors: Any, *options: Any) -> Planned:
    is_source = any(getattr(option, "rootRank", None) == group.rank() for option in options)
    return tensors, [] if is_source else tensors, lambda: None


def _run_now(method: Callable[..., Any], *args: Any) -> None:
    work = method(*args)
    if work is not None:
        work.wait()


def _each(one: Callable[..., StandInWork]) -> Callable[..., StandInWork]:
    def coalesced(group: dist.ProcessGroup, outputs: list[Tensor], sources: list[Tensor], *options: Any) -> StandInWork:
        works = [one(group, output, source, *options) for output, source in zip(outputs, sources, strict=True)]
        return works[-1]

    return coalesced


def same_objects(gather: Callable[..., None]) -> Callable[..., None]:
    """Stands for ``dist.all_gather_object``: all ranks answer alike, but for their own rank."""

    def gather_same(gathered: list[Any], value: Any, group: dist.ProcessGroup | None = None) -> None:
        gather(gathered, value, group)
        if type(value) is int and value == dist.get_rank():
            gathered[:] = dist.get_process_group_ranks(group or dist.group.WORLD)

    return gather_same


def own_objects(broadcast: Callable[..., None]) -> Callable[..., None]:
    """Stands for ``dist.broadcast_object_list``: whoever sends has what this rank has."""

    def broadcast_own(values: list[Any], src: int | None = None, group: Any = None, **options: Any) -> None:
        broadcast(values, dist.get_rank(), group, **options)

    return broadcast_own
