"""The partition group's collectives, flat or in two stages.

Ranks are node-major, so a message over ``p = g * k`` ranks is ``g`` contiguous node blocks of ``k`` shards. The
hierarchical gather first runs across nodes (each rank fetches the shards of its peers with the same place in other
nodes; ``k`` such exchanges in parallel), then inside the node, gathering each node block in place. Only ``1/k`` of the
message is copied, and nothing on the rings that carry CPU tensors. The reduce-scatter is the same in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

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
from lightning_mics.core.cpu.rings import communication_thread, ring_all_gather, ring_reduce_scatter, runs_on_ring

OnCall = Callable[[int], None]


class _StagedWork(dist.Work):
    """Handle of an asynchronous two-stage collective: its second stage starts when the handle is waited on.

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


def _put_into_place(shard: Tensor, place: Tensor) -> None:
    """Copies a rank's own shard into the gathered message, unless it is there already, as FSDP2 has it."""
    if shard.data_ptr() != place.data_ptr():
        place.copy_(shard)


class _Allocate:
    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns an uninitialised buffer."""
        return torch.empty(*size, dtype=dtype, device=device)


class FlatAllGather(_Allocate, AllGather):
    """One collective over the whole partition group.

    Args:
        on_call: Told the bytes of each gathered message.
    """

    def __init__(self, on_call: OnCall | None = None) -> None:
        self._on_call = on_call

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gathers ``input_tensor`` (shape ``[n]``) of all ranks into ``output_tensor`` (shape ``[p * n]``)."""
        if self._on_call is not None:
            self._on_call(output_tensor.nbytes)
        if not runs_on_ring(output_tensor, group):
            return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        shards = output_tensor.view(group.size(), -1)
        _put_into_place(input_tensor, shards[group.rank()])
        return communication_thread.run(lambda: ring_all_gather([[shard] for shard in shards], group), async_op)


class DeferrableReduceScatter(_Allocate, ReduceScatter):
    """A reduce-scatter that can run beside the backward pass, where a ring carries it.

    FSDP2 takes the output for finished when the call returns; whoever sets ``defer`` waits for ``pending`` and keeps
    the output from being read before that.

    Attributes:
        defer: The dtype of gradients whose reduction may run on; ``None`` if it may not.
        pending: The handle of a reduction that does.
    """

    defer: torch.dtype | None = None
    pending: dist.Work | None = None

    def _run_on_ring(self, reduce: Callable[[], None], output: Tensor, op: object, async_op: bool) -> dist.Work | None:
        # As soon as the call returns, FSDP2 divides anything but an average, and casts another dtype to the gradient's.
        defers = output.dtype == self.defer and op == dist.ReduceOp.AVG
        work = communication_thread.run(reduce, async_op or defers)
        if defers:
            self.pending = work
        return work


class FlatReduceScatter(DeferrableReduceScatter):
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
        if not runs_on_ring(input_tensor, group, op):
            return reduce_scatter_single(output_tensor, input_tensor, group=group, op=op, async_op=async_op)
        parts = list(input_tensor.view(group.size(), -1))
        return self._run_on_ring(
            lambda: ring_reduce_scatter(output_tensor, parts, group, op), output_tensor, op, async_op
        )


class HierarchicalAllGather(_Allocate, AllGather):
    """An all-gather across nodes, then inside them; bitwise equal to the flat one.

    Args:
        intra_group: This rank's peers of the partition on its own node, ``k`` ranks in order.
        inter_group: This rank's peers of the partition with the same place on other nodes, ``g`` ranks in order.
        on_call: Told the bytes of each gathered message.
    """

    def __init__(
        self, intra_group: dist.ProcessGroup, inter_group: dist.ProcessGroup, on_call: OnCall | None = None
    ) -> None:
        self._intra, self._inter, self._on_call = intra_group, inter_group, on_call

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gathers ``input_tensor`` (shape ``[n]``) of all ranks into ``output_tensor`` (shape ``[g * k * n]``).

        ``input_tensor`` may be this rank's own place in ``output_tensor``. With ``async_op`` the stage inside nodes
        runs when the returned handle is waited on.
        """
        if self._on_call is not None:
            self._on_call(output_tensor.nbytes)
        num_nodes, local_size = self._inter.size(), self._intra.size()
        blocks = output_tensor.view(num_nodes, local_size, -1)
        local_rank = self._intra.rank()
        if runs_on_ring(output_tensor, self._inter):
            _put_into_place(input_tensor, blocks[self._inter.rank(), local_rank])
            return communication_thread.run(lambda: self._gather_on_rings(blocks), async_op)
        across = torch.empty(num_nodes * input_tensor.numel(), dtype=input_tensor.dtype, device=input_tensor.device)

        def inside_nodes() -> None:
            mine = blocks[:, local_rank]
            mine.copy_(across.view(num_nodes, -1))
            if local_size > 1:
                with batched(self._intra, output_tensor.device):
                    for block, part in zip(blocks, mine, strict=True):
                        all_gather_single(block.view(-1), part, group=self._intra)

        first = all_gather_single(across, input_tensor, group=self._inter, async_op=async_op)
        if async_op:
            return _StagedWork(first, inside_nodes)
        inside_nodes()
        return None

    def _gather_on_rings(self, blocks: Tensor) -> None:
        """Gathers in place; ``blocks`` has the shape ``[g, k, n]``."""
        local_rank = self._intra.rank()
        ring_all_gather([[block[local_rank]] for block in blocks], self._inter)
        ring_all_gather([list(blocks[:, rank]) for rank in range(self._intra.size())], self._intra)


class HierarchicalReduceScatter(DeferrableReduceScatter):
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
        num_nodes, local_size = self._inter.size(), self._intra.size()
        blocks = input_tensor.view(num_nodes, -1)
        if runs_on_ring(input_tensor, self._inter, op):
            parts = input_tensor.view(num_nodes, local_size, -1).transpose(0, 1)
            return self._run_on_ring(
                lambda: self._reduce_on_rings(output_tensor, parts, op), output_tensor, op, async_op
            )
        if local_size == 1:
            inside = input_tensor
        else:
            inside = torch.empty(
                num_nodes * output_tensor.numel(), dtype=input_tensor.dtype, device=input_tensor.device
            )
            with batched(self._intra, input_tensor.device):
                for part, block in zip(inside.view(num_nodes, -1), blocks, strict=True):
                    reduce_scatter_single(part, block, group=self._intra, op=op)
            if is_premul_sum(op):  # the factor is in already
                op = dist.ReduceOp.SUM
        return reduce_scatter_single(output_tensor, inside, group=self._inter, op=op, async_op=async_op)

    def _reduce_on_rings(self, output: Tensor, parts: Tensor, op: object) -> None:
        """Reduces ``parts`` of shape ``[k, g, n]``."""
        inside = torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device)
        ring_reduce_scatter(inside, list(parts), self._intra, op)
        ring_reduce_scatter(output, list(inside), self._inter, op)
