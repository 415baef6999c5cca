"""The partition group's collectives on rings: flat or in two stages, out of and into FSDP2's own buffers.

They run on the thread of communication, where one may run on beside the pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics.core._torch import AllGather, ReduceScatter, reduce_scatter_single
from lightning_mics.core.collectives import Allocating, OnCall, add_up
from lightning_mics.core.cpu.rings import (
    CommunicationThread,
    communication_thread,
    exchange,
    ring_all_gather,
    ring_reduce_scatter,
)
from lightning_mics.core.mesh import Stages
from lightning_mics.core.places import Call

# From here on the two stages run at once, a node's block in one while the next block is in the other; below, the
# greater number of messages takes longer than what it saves.
_MIN_CHUNK_BYTES = 2**18


class _OnRings(Allocating):
    """A collective on one ring or on two.

    Args:
        stages: The groups it runs in, in the order of a gather.
        on_call: Told the bytes of each whole message.
        call: Which one it is; those of different calls never meet.
        thread: Who runs it.
    """

    def __init__(
        self,
        stages: Stages,
        on_call: OnCall | None = None,
        call: Call | None = None,
        thread: CommunicationThread = communication_thread,
    ) -> None:
        self._stages, self._on_call, self._call, self._thread = stages, on_call, call, thread
        self._tag: dict[str, Any] = {} if call is None else {"tag": call.tag}


class RingAllGather(_OnRings, AllGather):
    """An all-gather on one ring or on two; bitwise equal to any other."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gathers ``input_tensor`` (shape ``[n]``) of all ranks into ``output_tensor`` (shape ``[p * n]``)."""
        if self._on_call is not None:
            self._on_call(output_tensor.nbytes)
        place = output_tensor.view(group.size(), -1)[group.rank()]
        if input_tensor.data_ptr() != place.data_ptr():  # FSDP2 has it there already
            place.copy_(input_tensor)
        return self._thread.run(lambda: self._gather(output_tensor), async_op, self._call)

    def _gather(self, output: Tensor) -> None:
        if len(self._stages) == 1:
            (group,) = self._stages
            ring_all_gather([[shard] for shard in output.view(group.size(), -1)], group, **self._tag)
            return
        inter, intra = self._stages
        blocks = output.view(inter.size(), intra.size(), -1)
        mine = [[block[intra.rank()]] for block in blocks]
        if mine[0][0].nbytes < _MIN_CHUNK_BYTES:
            ring_all_gather(mine, inter, **self._tag)
            ring_all_gather([list(blocks[:, rank]) for rank in range(intra.size())], intra, **self._tag)
            return

        def inside(node: int) -> None:
            ring_all_gather([[shard] for shard in blocks[node]], intra, **self._tag)

        ring_all_gather(mine, inter, inside, **self._tag)


class RingReduceScatter(_OnRings, ReduceScatter):
    """A reduce-scatter on one ring or on two, which may run on beside the backward pass.

    FSDP2 takes the output for finished when the call returns. Who calls it inside of :meth:`deferring` waits for it
    with :meth:`wait_pending`, and keeps the output from being read before that.

    Attributes:
        pending: The handle of a reduction that runs on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pending: dist.Work | None = None
        self._deferred_dtype: torch.dtype | None = None

    @contextmanager
    def deferring(self, dtype: torch.dtype) -> Iterator[None]:
        """Lets a reduction inside this context run on, if its output is of the gradients' ``dtype``."""
        self._deferred_dtype = dtype
        try:
            yield
        finally:
            self._deferred_dtype = None

    def wait_pending(self) -> None:
        """Waits for a reduction that runs on."""
        work, self.pending = self.pending, None
        if work is not None:
            work.wait()

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
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            return reduce_scatter_single(output_tensor, input_tensor, group=group, op=op, async_op=async_op)
        # As soon as the call returns, FSDP2 divides anything but an average, and casts another dtype to the gradient's.
        defers = output_tensor.dtype == self._deferred_dtype and op == dist.ReduceOp.AVG
        run = functools.partial(self._reduce, output_tensor, input_tensor, op)
        work = self._thread.run(run, async_op or defers, self._call)
        if defers:
            self.pending = work
        return work

    def _reduce(self, output: Tensor, message: Tensor, op: object) -> None:
        if len(self._stages) == 1:
            (group,) = self._stages
            if output.dtype != message.dtype:  # a ring would round each partial sum
                received = torch.empty_like(message)
                exchange(received.view(group.size(), -1), message.view(group.size(), -1), group)
                add_up(output, received, op)
                return
            ring_reduce_scatter(output, message.view(group.size(), -1).__getitem__, group, op, **self._tag)
            return
        inter, intra = self._stages
        blocks = message.view(inter.size(), intra.size(), -1)
        inside = message.new_empty(inter.size(), blocks.shape[-1])

        def reduced(node: int) -> Tensor:
            ring_reduce_scatter(inside[node], blocks[node].__getitem__, intra, op, **self._tag)
            return inside[node]

        in_chunks = output.nbytes >= _MIN_CHUNK_BYTES
        if not in_chunks:
            ring_reduce_scatter(inside, blocks.transpose(0, 1).__getitem__, intra, op, **self._tag)
        ring_reduce_scatter(output, reduced if in_chunks else inside.__getitem__, inter, op, **self._tag)
