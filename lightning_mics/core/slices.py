"""Optimizer states divided further than parameters: of its shard, each rank steps on a slice of rows.

Parameters stay shards of the partition group, and optimizers keep them. Their states are DTensors on a mesh of two
dimensions, first over the partition and then over the replicas that divide them, both by rows: the blocks are
contiguous, and where the ranks of a partition get ``ceil(n / p)`` rows of a parameter, those of a shard get
``ceil(rows / m)`` of these. Some get none. A step is taken on the slice, a view of the shard's memory; then the other
rows come from those who stepped on them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from lightning_mics.core._torch import AllGather, UnitParam, dtensor_over, local_tensor, notes_by_shard, shard_like
from lightning_mics.core.mesh import communication_device
from lightning_mics.metrics import CommLedger, Hop

# Whose slices parameters are divided into.
_SLICES = notes_by_shard()


@dataclass(frozen=True)
class RowsUnderWay:
    """Rows of some shards on their way from those who stepped on them.

    Attributes:
        work: The handle.
        shards: The shards.
        sent: This rank's rows, kept until they are sent.
        everyones: Where those of each rank will be.
    """

    work: dist.Work | None
    shards: list[Tensor]
    sent: Tensor
    everyones: Tensor


class Slices:
    """The slices of the shards of one model.

    Args:
        mesh: Two-dimensional mesh ``(shard, slice)``.
        all_gather: How messages travel between the ranks that divide a shard.
        wire: Dtype in which rows come from those who stepped on them, where it is narrower than a shard's.

    Attributes:
        mesh: See above.
        group: The ranks that divide a shard.
        stale: Shards, by ``id``, of which rows of other ranks are stale.
        with_masters: Parameters whose shards have masters.
    """

    def __init__(self, mesh: DeviceMesh, all_gather: AllGather, wire: torch.dtype | None = None) -> None:
        self.mesh, self._all_gather, self._wire = mesh, all_gather, wire
        self.group = mesh.get_group("slice")
        self._place = self.group.rank()
        self.stale: set[int] = set()
        self.with_masters: weakref.WeakSet[UnitParam] = weakref.WeakSet()  # shards lead here, and must not last by it

    def watch(self, params: Iterable[UnitParam]) -> None:
        """Makes shards known to :func:`slices_of`: all, and later what replaced one."""
        for param in params:
            _SLICES[param.sharded] = self

    def rows(self, num_rows: int, place: int | None = None) -> slice:
        """Returns which rows of a shard are a rank's, by default this one's."""
        return rows_at(self._place if place is None else place, self.group.size(), num_rows)

    def local(self, tensor: Tensor) -> Tensor:
        """Returns this rank's rows of a parameter, its gradient or a state, as a view of their memory."""
        local = local_tensor(tensor)
        return local[self.rows(len(local))] if isinstance(tensor, DTensor) and not is_slice(tensor) else local

    def like(self, param: Tensor, local: Tensor) -> DTensor:
        """Returns a DTensor of a parameter's shape, over this rank's rows."""
        return dtensor_over(local, self.mesh, [Shard(0), Shard(0)], param)

    def rounds(self, param: UnitParam) -> bool:
        """Returns whether rows of a shard are rounded on their way."""
        return self._wire is not None and self._wire.itemsize < param.sharded.dtype.itemsize

    @torch.no_grad()
    def gather(
        self, params: Iterable[UnitParam], unit: str, ledger: CommLedger, *, exact: bool = False
    ) -> list[RowsUnderWay]:
        """Begins to fetch the rows of shards that other ranks have stepped on. Collective over the group of slices.

        Args:
            params: Parameters of one unit, the same on all ranks of the group.
            unit: Its name.
            ledger: Where it is recorded.
            exact: Whether no row is rounded on its way.

        Returns:
            What :meth:`put` is to be called with before anybody reads or writes the shards.
        """
        under_way = []
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for param in params:
            shard = local_tensor(param.sharded)
            dtype = self._wire if self.rounds(param) and not exact else None
            by_dtype.setdefault(dtype or shard.dtype, []).append(shard)
        for dtype, shards in by_dtype.items():
            mine = self._packed(shards, dtype).to(communication_device(self.mesh.device_type))
            if mine.numel():
                everyones = torch.empty(self.group.size() * len(mine), dtype=dtype, device=mine.device)
                work = self._all_gather(everyones, mine, self.group, async_op=True)
                ledger.record(unit, Hop.REPLICATION_GATHER, everyones.nbytes)
                under_way.append(RowsUnderWay(work, shards, mine, everyones.view(self.group.size(), -1)))
        return under_way

    @torch.no_grad()
    def put(self, under_way: Iterable[RowsUnderWay]) -> None:
        """Waits for rows and puts them into the shards, on the current stream."""
        for rows in under_way:
            if rows.work is not None:
                rows.work.wait()
            self.unpack(rows.everyones, rows.shards, keeps_own=True)

    def _packed(self, shards: list[Tensor], dtype: torch.dtype) -> Tensor:
        chunks = []
        for shard in shards:
            own = shard[self.rows(len(shard))].to(dtype)
            padding = self.chunk_numel(shard.shape) - own.numel()
            chunks += [own.reshape(-1), own.new_zeros(padding)]
        return torch.cat(chunks)

    def unpack(self, chunks: Tensor, shards: Iterable[Tensor], *, keeps_own: bool) -> None:
        """Puts chunks, each rank's slices of some shards one behind another, into the shards.

        Args:
            chunks: Of shape ``[ranks, elements]``.
            shards: Where they go.
            keeps_own: Whether this rank's slices stay as they are.
        """
        start = 0
        for shard in shards:
            for place, chunk in enumerate(chunks):
                rows = shard[self.rows(len(shard), place)]
                if rows.numel() and not (keeps_own and place == self._place):
                    rows.copy_(chunk[start : start + rows.numel()].view(rows.shape))
            start += self.chunk_numel(shard.shape)

    def chunk_numel(self, shape: torch.Size) -> int:
        """Returns the elements of the largest slice of a shard of some shape."""
        return -(-shape[0] // self.group.size()) * shape[1:].numel()


def rows_at(place: int, size: int, num_rows: int) -> slice:
    """Returns which of some rows are a rank's, where ``size`` ranks divide them."""
    chunk = -(-num_rows // size)
    return slice(min(place * chunk, num_rows), min((place + 1) * chunk, num_rows))


def is_slice(tensor: Tensor) -> bool:
    """Returns whether a gradient or a state is one of a slice, and not of a shard."""
    return isinstance(tensor, DTensor) and tensor.device_mesh.ndim == 2


def slices_of(param: Tensor) -> Slices | None:
    """Returns the slices of a shard; ``None`` where optimizer states are divided as parameters are."""
    found: Slices | None = _SLICES.get(param) if _SLICES else None  # asked for every parameter in every step
    return found


def empty_state(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns memory for a state of a parameter's shape, laid out as its optimizer's states are."""
    slices = slices_of(param)
    if slices is None:
        return torch.empty_like(param.detach(), dtype=dtype)
    return slices.like(param, torch.empty_like(slices.local(param).detach(), dtype=dtype))


def state_like(value: Tensor, param: Tensor) -> Tensor:
    """Returns this rank's part of a whole state, laid out as its optimizer's states are, in memory of its own.

    A state of another shape than the parameter's is whole on every rank.
    """
    shard, slices = shard_like(value, param), slices_of(param)
    if slices is None or not isinstance(shard, DTensor):
        return shard.clone()
    return slices.like(param, slices.local(shard).clone())


def divide_states(optimizer: Optimizer) -> None:
    """Keeps this rank's slices of states that are shards, as some optimizers make them when they are made."""
    for param, states in optimizer.state.items() if _SLICES else ():
        slices = slices_of(param) if isinstance(param, DTensor) else None
        if slices is None:
            continue
        for name, value in states.items():
            if isinstance(value, DTensor) and not is_slice(value) and value.shape == param.shape:
                states[name] = slices.like(param, slices.local(value).clone())
