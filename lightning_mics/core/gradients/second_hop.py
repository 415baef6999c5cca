"""Hop two of a unit: how its sums become means over all replicas, on every rank or by slices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics.core._torch import AllGather, ReduceScatter, UnitParam, chunk_cat, is_gloo, local_tensor
from lightning_mics.core.gradients.layout import FlatLayout
from lightning_mics.core.gradients.reductions import Reduction
from lightning_mics.core.places import here
from lightning_mics.core.slices import Slices

# Gradients that were averaged earlier, while their parameters take new ones.
Aside = MutableMapping[UnitParam, Tensor]


@dataclass(frozen=True)
class Flight:
    """Hop two in flight.

    Attributes:
        work: Its handle.
        layout: The parameters that take part.
        source: The way of hop one whose sums it was made of.
        sent: What is sent: memory of the reduce stream, kept until that stream has waited for ``work``.
        result: Where the result will be.
    """

    work: dist.Work | None
    layout: FlatLayout
    source: Reduction
    sent: Tensor
    result: Tensor

    def wait(self) -> None:
        """Makes the current stream wait for it."""
        if self.work is not None:
            self.work.wait()


class SecondHop(ABC):
    """One way to run hop two. All of it runs on the reduce stream.

    What travels first may be narrower than the sums that are made of it, and travel on.

    Attributes:
        makes_slices: Whether gradients are slices afterwards.
    """

    makes_slices = False

    @abstractmethod
    def launch(
        self, layout: FlatLayout, source: Reduction, sums: Tensor, dtype: torch.dtype, device: torch.device
    ) -> Flight:
        """Starts it.

        Args:
            layout: The parameters that take part.
            source: The way of hop one whose sums they are.
            sums: The sums, of shape ``[layout.numel]``.
            dtype: What they are reduced in.
            device: Where this rank communicates.
        """

    @abstractmethod
    def take(self, flight: Flight, aside: Aside) -> None:
        """Puts the result into the gradients. It has been waited for."""

    def undo(self, flight: Flight) -> None:  # noqa: B027
        """Gives the gradients back that a pass which failed has sent."""


class AllReduce(SecondHop):
    """All ranks get the mean of their whole shard.

    Args:
        group: The replication group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def launch(
        self, layout: FlatLayout, source: Reduction, sums: Tensor, dtype: torch.dtype, device: torch.device
    ) -> Flight:
        """Starts an all-reduce that averages."""
        buffer = sums.to(device=device, dtype=dtype)
        here.launched[id(self._group)] += 1
        work = dist.all_reduce(buffer, op=dist.ReduceOp.AVG, group=self._group, async_op=True)
        return Flight(work, layout, source, buffer, buffer)

    def take(self, flight: Flight, aside: Aside) -> None:
        """Makes the means the window's sums."""
        flight.source.take(flight.layout, flight.result)


class AllReduceOfWideSums(AllReduce):
    """Replicas exchange pieces in 16 bits; each adds up its own, and all get the sums.

    Args:
        group: The replication group.
        wire: Dtype of the pieces.
        all_gather: How sums travel, behind pieces that were sent before.
        reduce_scatter: How pieces travel.
    """

    def __init__(
        self, group: dist.ProcessGroup, wire: torch.dtype, all_gather: AllGather, reduce_scatter: ReduceScatter
    ) -> None:
        super().__init__(group)
        self._wire, self._all_gather, self._reduce_scatter = wire, all_gather, reduce_scatter

    def launch(
        self, layout: FlatLayout, source: Reduction, sums: Tensor, dtype: torch.dtype, device: torch.device
    ) -> Flight:
        """Starts a reduce-scatter that averages, and the gather of its results."""
        group = self._group
        chunk = -(-layout.numel // group.size())
        sent = torch.zeros(group.size() * chunk, dtype=self._wire, device=device)
        sent[: layout.numel] = sums
        result = torch.empty(len(sent), dtype=dtype_of_sums(self._wire, dtype), device=device)
        mine = result.view(group.size(), -1)[group.rank()]
        here.launched[id(group)] += 2 * (not is_gloo(group))
        self._reduce_scatter(mine, sent, group, dist.ReduceOp.AVG, async_op=True)
        work = self._all_gather(result, mine, group, async_op=True)
        return Flight(work, layout, source, sent, result[: layout.numel])


def dtype_of_sums(wire: torch.dtype | None, reduce_dtype: torch.dtype) -> torch.dtype:
    """Returns in which dtype replicas add up what they exchange."""
    return reduce_dtype if wire is None else torch.promote_types(reduce_dtype, torch.float32)


class ReduceToSlices(SecondHop):
    """Each rank gets the mean of its slices alone, which become the gradients.

    Averaging again would change what is averaged already, so that is set aside while new gradients come, and added.

    Args:
        slices: The slices.
        reduce_scatter: How messages travel between the ranks that divide a shard.
        instances: Ranks that hold the same slices.
        wire: Dtype in which pieces travel to those who add them up; ``None`` for that of the sums.
    """

    makes_slices = True

    def __init__(
        self,
        slices: Slices,
        reduce_scatter: ReduceScatter,
        instances: dist.ProcessGroup,
        wire: torch.dtype | None = None,
    ) -> None:
        self._slices, self._reduce_scatter, self._instances, self._wire = slices, reduce_scatter, instances, wire

    def launch(
        self, layout: FlatLayout, source: Reduction, sums: Tensor, dtype: torch.dtype, device: torch.device
    ) -> Flight:
        """Starts a reduce-scatter that averages; between instances an all-reduce of what is left of it follows."""
        group = self._slices.group
        shards = [shard for shard in layout.places(sums) if shard.numel()]
        sent = chunk_cat(shards, group.size()) if shards else sums.new_empty(group.size(), 0)
        sent = sent.to(device=device, dtype=self._wire or dtype)
        result = sent.new_empty(sent.shape[1], dtype=dtype_of_sums(self._wire, dtype))
        for param in layout.params:
            param.sharded.grad = None
        if not shards:
            return Flight(None, layout, source, sent, result)
        here.launched[id(group)] += not is_gloo(group)
        work = self._reduce_scatter(result, sent.view(-1), group, dist.ReduceOp.AVG, async_op=True)
        if self._instances.size() > 1:
            if work is not None:
                work.wait()
            here.launched[id(self._instances)] += 1
            work = dist.all_reduce(result, op=dist.ReduceOp.AVG, group=self._instances, async_op=True)
        return Flight(work, layout, source, sent, result)

    def take(self, flight: Flight, aside: Aside) -> None:
        """Makes the means, and what was averaged before, the gradients."""
        start = 0
        for param in flight.layout.params:
            shape = self._slices.local(param.sharded).shape
            mean = flight.result[start : start + shape.numel()].view(shape)
            start += self._slices.chunk_numel(param.local_shape)
            earlier = aside.pop(param, None)
            mean = mean.to(device=local_tensor(param.sharded).device)
            if earlier is None:
                earlier = self._slices.like(param.sharded, mean.to(param.grad_dtype))
            else:
                local_tensor(earlier).add_(mean)
            param.sharded.grad = earlier

    def undo(self, flight: Flight) -> None:
        """Unpacks what was sent."""
        params = flight.layout.params
        shards = [torch.empty_like(local_tensor(param.sharded), dtype=param.grad_dtype) for param in params]
        self._slices.unpack(flight.sent, shards, keeps_own=False)
        for param, shard in zip(params, shards, strict=True):
            param.set_local_grad(shard)
