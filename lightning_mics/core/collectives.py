"""The partition group's collectives, flat or in two stages.

Ranks are node-major, so a message over ``p = g * k`` ranks is ``g`` contiguous node blocks of ``k`` shards. The
hierarchical gather first runs across nodes (each rank fetches the shards of its peers with the same place in other
nodes; ``k`` such exchanges in parallel), then inside the node, gathering each node block in place. Only ``1/k`` of the
message is copied. The reduce-scatter is the same in reverse.
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


class Allocating:
    """Takes buffers from PyTorch's allocator."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns an uninitialised buffer."""
        return torch.empty(*size, dtype=dtype, device=device)


class FlatAllGather(Allocating, AllGather):
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


class HierarchicalAllGather(Allocating, AllGather):
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
        across = input_tensor.new_empty(num_nodes * input_tensor.numel())

        def inside_nodes() -> None:
            mine = blocks[:, self._intra.rank()]
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
