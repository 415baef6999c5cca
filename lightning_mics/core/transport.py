"""How the collectives of a partition travel, and what lets them overlap with computation: chosen here, once a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from lightning_mics.core._torch import AllGather, ReduceScatter, UnitParamGroup, gather_asynchronously, is_gloo
from lightning_mics.core.collectives import (
    FlatAllGather,
    FlatReduceScatter,
    HierarchicalAllGather,
    HierarchicalReduceScatter,
    OnCall,
    StageStream,
    WideReduceScatter,
)
from lightning_mics.core.cpu.collectives import RingAllGather, RingReduceScatter
from lightning_mics.core.cpu.deferred import DeferredReduction
from lightning_mics.core.cpu.prefetch import ForwardPrefetch
from lightning_mics.core.cpu.rings import replication_thread
from lightning_mics.core.gradients.reductions import Reduction
from lightning_mics.core.mesh import Stages
from lightning_mics.core.places import Call


class Transport(ABC):
    """One way for collectives to travel."""

    @abstractmethod
    def all_gather(self, stages: Stages, on_call: OnCall | None = None, call: Call | None = None) -> AllGather:
        """Returns a gather.

        Args:
            stages: The groups it runs in, as :meth:`MiCSMesh.stages` has them.
            on_call: Told the bytes of each message.
            call: Which one it is, for the watch; on a device it is the host's waits that are watched.
        """

    @abstractmethod
    def reduce_scatter(self, stages: Stages, on_call: OnCall | None = None, call: Call | None = None) -> ReduceScatter:
        """Returns a reduce-scatter; the arguments are those of :meth:`all_gather`."""

    def replication(self, group: dist.ProcessGroup, *, widens: bool = False) -> tuple[AllGather, ReduceScatter]:
        """Returns a gather and a reduce-scatter between replicas, beside which those of partitions go on.

        Args:
            group: The replicas.
            widens: Whether sums are wider than messages. What is started later also runs later then.
        """
        if not widens:
            return FlatAllGather(), FlatReduceScatter()
        stream = StageStream()
        return FlatAllGather(stream=stream), WideReduceScatter(stream)

    def reductions(self, group: UnitParamGroup, reduce_scatter: ReduceScatter) -> list[Reduction]:
        """Returns ways to run hop one of a unit that overlap better than FSDP2's own."""
        return []

    def prefetch(self, units: Sequence[tuple[nn.Module, UnitParamGroup | None]]) -> ForwardPrefetch | None:
        """Makes gathers overlap with forward passes, where FSDP2 alone does not; the root is the first unit."""
        return None


class DeviceTransport(Transport):
    """The backend's own collectives; FSDP2 overlaps them on an accelerator's streams."""

    def __init__(self) -> None:
        self._stream = StageStream()

    def all_gather(self, stages: Stages, on_call: OnCall | None = None, call: Call | None = None) -> AllGather:
        """Returns a gather."""
        if len(stages) == 1:
            return FlatAllGather(on_call)
        inter, intra = stages
        return HierarchicalAllGather(intra, inter, on_call, self._stream)

    def reduce_scatter(self, stages: Stages, on_call: OnCall | None = None, call: Call | None = None) -> ReduceScatter:
        """Returns a reduce-scatter."""
        if len(stages) == 1:
            return FlatReduceScatter(on_call)
        inter, intra = stages
        return HierarchicalReduceScatter(intra, inter, on_call)


class RingTransport(Transport):
    """Rings over gloo, on a thread that takes the place of streams.

    Args:
        overlaps: Whether collectives run beside the computation.
    """

    def __init__(self, *, overlaps: bool) -> None:
        self._overlaps = overlaps

    def all_gather(self, stages: Stages, on_call: OnCall | None = None, call: Call | None = None) -> RingAllGather:
        """Returns a gather."""
        return RingAllGather(stages, on_call, call)

    def reduce_scatter(
        self, stages: Stages, on_call: OnCall | None = None, call: Call | None = None
    ) -> RingReduceScatter:
        """Returns a reduce-scatter."""
        return RingReduceScatter(stages, on_call, call)

    def replication(self, group: dist.ProcessGroup, *, widens: bool = False) -> tuple[AllGather, ReduceScatter]:
        """Returns rings on a thread of their own."""
        return RingAllGather([group], thread=replication_thread), RingReduceScatter([group], thread=replication_thread)

    def reductions(self, group: UnitParamGroup, reduce_scatter: ReduceScatter) -> list[Reduction]:
        """Lets hop one run on beside the backward pass."""
        assert isinstance(reduce_scatter, RingReduceScatter)
        return [DeferredReduction(group, reduce_scatter)] if self._overlaps else []

    def prefetch(self, units: Sequence[tuple[nn.Module, UnitParamGroup | None]]) -> ForwardPrefetch | None:
        """Gathers each unit while the one before it computes."""
        if not self._overlaps:
            return None
        gather_asynchronously(units[0][0])
        return ForwardPrefetch(units)


def transport_for(group: dist.ProcessGroup, device_type: str, *, cpu_offload: bool = False) -> Transport:
    """Returns how the tensors of a group travel.

    Args:
        group: A partition group.
        device_type: Where its tensors are, ``"cuda"`` or ``"cpu"``.
        cpu_offload: Whether shards and gradients live in host memory; nothing is deferred then.
    """
    if device_type != "cpu" or not is_gloo(group):
        return DeviceTransport()
    return RingTransport(overlaps=not cpu_offload)
