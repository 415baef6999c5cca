"""The partition group's collectives, flat or in two stages.

Ranks are node-major, so a message over ``p = g * k`` ranks is ``g`` contiguous node blocks of ``k`` shards. The
hierarchical gather first runs across nodes (each rank fetches the shards of its peers with the same place in other
nodes; ``k`` such exchanges in parallel), then inside the node, gathering each node block in place: its own block
meanwhile, the others when they are there. Only ``1/k`` of the message is copied. The reduce-scatter is the same in
reverse, one stage after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics.core._torch import (
    AllGather,
    ReduceScatter,
    all_gather_single,
    batched,
    is_premul_sum,
    reduce_scatter_single,
)

OnCall = Callable[[int], None]


class _StagedWork(dist.Work):
    """Handle of a two-stage collective where there are no streams: its second stage runs when it is waited on.

    All ranks of a partition wait on their handles in the same order, so the second stages pair up. FSDP2 only waits on
    handles that are a ``dist.Work``.
    """

    def __init__(self, first: dist.Work, second: Callable[[], None]) -> None:
        super().__init__()
        self._first: dist.Work | None = first
        self._second = second

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self._first is not None:
            self._first.wait()
            self._first = None
            self._second()
        return True

    def is_completed(self) -> bool:
        return self._first is None


class _StreamWork(dist.Work):
    """Handle of what runs on a stream, with the tensors that must live until it is waited on."""

    def __init__(self, stream: Any, handle: Any, *tensors: Tensor) -> None:
        super().__init__()
        self._event, self._handle, self._tensors = stream.record_event(), handle, tensors

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._handle.current_stream().wait_event(self._event)
        self._tensors = ()
        return True

    def is_completed(self) -> bool:
        return bool(self._event.query())


class StageStream:
    """The stream on which an asynchronous collective runs all of its stages, one for all units of a model.

    The second stage so starts as soon as the first one is done, and not when somebody waits for it.
    """

    def __init__(self) -> None:
        self._stream: Any = None

    def run(self, collective: Callable[[Tensor, Tensor], None], output: Tensor, source: Tensor) -> dist.Work:
        """Runs ``collective(output, source)`` behind what the current stream was given so far; returns its handle."""
        handle = torch.get_device_module(output.device.type)
        if self._stream is None:
            self._stream = handle.Stream(priority=-1)
        self._stream.wait_stream(handle.current_stream())
        with handle.stream(self._stream):
            collective(output, source)
        return _StreamWork(self._stream, handle, output, source)


class Allocating:
    """Takes buffers from PyTorch's allocator."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns an uninitialised buffer."""
        return torch.empty(*size, dtype=dtype, device=device)


class FlatAllGather(Allocating, AllGather):
    """One collective over the whole partition group.

    Args:
        on_call: Told the bytes of each gathered message.
        stream: Where asynchronous gathers run; by default where the backend has it.
    """

    def __init__(self, on_call: OnCall | None = None, stream: StageStream | None = None) -> None:
        self._on_call, self._stream = on_call, stream

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gathers ``input_tensor`` (shape ``[n]``) of all ranks into ``output_tensor`` (shape ``[p * n]``)."""
        if self._on_call is not None:
            self._on_call(output_tensor.nbytes)
        if async_op and self._stream is not None:
            run = functools.partial(all_gather_single, group=group)
            return self._stream.run(run, output_tensor, input_tensor)
        return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class FlatReduceScatter(Allocating, ReduceScatter):
    """One collective over the whole partition group.

    Args:
        on_call: Told the bytes of each reduced message.
    """

    def __init__(self, on_call: OnCall | None = None) -> None:
        self._on_call = on_call

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduces ``input_tensor`` (shape ``[p * n]``) and leaves this rank's part in ``output_tensor`` (``[n]``)."""
        if self._on_call is not None:
            self._on_call(input_tensor.nbytes)
        return reduce_scatter_single(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


class WideReduceScatter(Allocating, ReduceScatter):
    """A reduce-scatter of 16-bit messages whose sums are wider: ranks exchange parts, and each adds up its own.

    Args:
        stream: Where it runs.
    """

    def __init__(self, stream: StageStream) -> None:
        self._stream = stream

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduces ``input_tensor`` (shape ``[r * n]``) and leaves this rank's part in ``output_tensor`` (``[n]``)."""

        def reduce(output: Tensor, message: Tensor) -> None:
            received = torch.empty_like(message)
            dist.all_to_all_single(received, message, group=group)
            add_up(output, received, op)

        if async_op:
            return self._stream.run(reduce, output_tensor, input_tensor)
        reduce(output_tensor, input_tensor)
        return None


def add_up(output: Tensor, received: Tensor, op: object) -> None:
    """Sums (or averages) what the ranks of a group have sent, one behind another, in the dtype of the result."""
    parts = received.view(-1, output.numel())
    torch.sum(parts, 0, dtype=output.dtype, out=output)
    if op == dist.ReduceOp.AVG:
        output /= len(parts)


class HierarchicalAllGather(Allocating, AllGather):
    """An all-gather across nodes, then inside them; bitwise equal to the flat one.

    Args:
        intra_group: This rank's peers of the partition on its own node, ``k`` ranks in order.
        inter_group: This rank's peers of the partition with the same place on other nodes, ``g`` ranks in order.
        on_call: Told the bytes of each gathered message.
        stream: Where asynchronous gathers run.
    """

    def __init__(
        self,
        intra_group: dist.ProcessGroup,
        inter_group: dist.ProcessGroup,
        on_call: OnCall | None = None,
        stream: StageStream | None = None,
    ) -> None:
        self._intra, self._inter, self._on_call = intra_group, inter_group, on_call
        self._stream = stream or StageStream()

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gathers ``input_tensor`` (shape ``[n]``) of all ranks into ``output_tensor`` (shape ``[g * k * n]``).

        ``input_tensor`` may be this rank's own place in ``output_tensor``. Without streams, and with ``async_op``, the
        stage inside nodes runs when the returned handle is waited on.
        """
        if self._on_call is not None:
            self._on_call(output_tensor.nbytes)
        if not async_op:
            self._gather(output_tensor, input_tensor)
            return None
        if output_tensor.device.type != "cpu":
            return self._stream.run(self._gather, output_tensor, input_tensor)
        across, work = self._across_nodes(input_tensor)

        def inside_nodes() -> None:
            self._inside_own_node(output_tensor, input_tensor)
            self._inside_other_nodes(output_tensor, across)

        return _StagedWork(work, inside_nodes)

    def _gather(self, output: Tensor, source: Tensor) -> None:
        across, work = self._across_nodes(source)
        self._inside_own_node(output, source)
        work.wait()
        self._inside_other_nodes(output, across)

    def _across_nodes(self, source: Tensor) -> tuple[Tensor, dist.Work]:
        """Returns this rank's place of each node, of shape ``[g * n]``, and the handle of what brings it."""
        across = source.new_empty(self._inter.size() * source.numel())
        # Not the source itself, which may lie in the block that is written meanwhile.
        mine = across.view(self._inter.size(), -1)[self._inter.rank()].copy_(source)
        return across, all_gather_single(across, mine, group=self._inter, async_op=True)

    def _inside_own_node(self, output: Tensor, source: Tensor) -> None:
        """Gathers the block for which nothing has to come from other nodes, while that is under way."""
        if self._intra.size() > 1:
            block = output.view(self._inter.size(), -1)[self._inter.rank()]
            all_gather_single(block, source, group=self._intra)

    def _inside_other_nodes(self, output: Tensor, across: Tensor) -> None:
        num_nodes, local_size = self._inter.size(), self._intra.size()
        blocks = output.view(num_nodes, local_size, -1)
        mine = blocks[:, self._intra.rank()]
        mine.copy_(across.view(num_nodes, -1))
        if local_size > 1:
            with batched(self._intra, output.device):
                for node, (block, part) in enumerate(zip(blocks, mine, strict=True)):
                    if node != self._inter.rank():
                        all_gather_single(block.view(-1), part, group=self._intra)


class HierarchicalReduceScatter(Allocating, ReduceScatter):
    """A reduce-scatter inside nodes, then across them.

    Args:
        intra_group: This rank's peers of the partition on its own node, ``k`` ranks in order.
        inter_group: This rank's peers of the partition with the same place on other nodes, ``g`` ranks in order.
        on_call: Told the bytes of each reduced message.
    """

    def __init__(
        self, intra_group: dist.ProcessGroup, inter_group: dist.ProcessGroup, on_call: OnCall | None = None
    ) -> None:
        self._intra, self._inter, self._on_call = intra_group, inter_group, on_call

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduces ``input_tensor`` (shape ``[g * k * n]``), leaving this rank's part in ``output_tensor`` (``[n]``).

        With ``async_op`` only the stage across nodes is asynchronous.
        """
        if self._on_call is not None:
            self._on_call(input_tensor.nbytes)
        inside = input_tensor
        if self._intra.size() > 1:
            inside = self._reduce_inside_nodes(input_tensor, output_tensor.numel(), op)
            if is_premul_sum(op):  # the factor is in already
                op = dist.ReduceOp.SUM
        return reduce_scatter_single(output_tensor, inside, group=self._inter, op=op, async_op=async_op)

    def _reduce_inside_nodes(self, message: Tensor, numel: int, op: dist.ReduceOp | dist.ReduceOp.RedOpType) -> Tensor:
        """Returns what this node has for its place in each node, of shape ``[g * n]``."""
        num_nodes = self._inter.size()
        inside = message.new_empty(num_nodes * numel)
        with batched(self._intra, message.device):
            for part, block in zip(inside.view(num_nodes, -1), message.view(num_nodes, -1), strict=True):
                reduce_scatter_single(part, block, group=self._intra, op=op)
        return inside
