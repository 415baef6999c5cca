"""From unread parameters to shards: each rank reads its rows, once the model is sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from lightning_mics.checkpoint import ranks, storage
from lightning_mics.core._torch import Unread, become, is_unread, local_tensor, realize, source_of
from lightning_mics.core.mesh import MiCSMesh
from lightning_mics.core.replicas import require_agreement

_BLOCK_BYTES = 1 << 23


def agree_on_unread(model: nn.Module, device: torch.device) -> None:
    """Reads what not all ranks have left unread, and checks that they read the rest from the same files.

    Collective over the world; the model's parameters have the same names on all ranks.

    Args:
        model: The model, not sharded.
        device: Where this rank communicates.

    Raises:
        MiCSConfigError: On every rank, if ranks would read different files.
    """
    params = dict(model.named_parameters())
    unread = torch.tensor([is_unread(param) for param in params.values()], dtype=torch.int64, device=device)
    dist.all_reduce(unread, op=dist.ReduceOp.MIN)
    found: dict[str, Tensor] = {}
    for (name, param), is_everywhere in zip(params.items(), unread.tolist(), strict=True):
        if is_everywhere:
            found[name] = param
        else:
            realize(param)
    if not found:
        return
    told = ranks.on_each_rank(lambda: [f"{name} {describe(source_of(param))}" for name, param in found.items()])
    require_agreement({"the files of pretrained weights": told}, device)


def describe(source: Any) -> str:
    """Tells sources apart, by the same text on all ranks."""
    return f"{source.dtype} {' '.join(sorted(file.digest for file in source.files()))}"


class Waiting:
    """Parameters of a model that lie on the meta device until its shards can be filled.

    Attributes:
        sources: Where they are read from, by all of their names.
        params: The parameters themselves, as they were before the model is sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        named = {name: param for name, param in model.named_parameters() if is_unread(param)}
        self.sources: dict[str, Any] = {name: source_of(param) for name, param in named.items()}
        self.params = list(named.values())
        self._devices = [param.device for param in self.params]

    def fill(self, model: nn.Module, mesh: MiCSMesh) -> None:
        """Reads this rank's rows into the shards. Collective over the world.

        Of files on disks the page cache keeps one copy for all ranks of a node. What lies in object storage is read by
        one replica, which hands it to the others.

        Raises:
            CheckpointError: On every rank, if a file cannot be read.
        """
        if not self.sources:
            return
        shards = dict(model.named_parameters())
        targets = {name: shards[name].detach() for name in self.sources}
        handed = [name for name, source in self.sources.items() if any(file.is_remote for file in source.files())]
        is_first = mesh.device_mesh.get_local_rank("replicate") == 0
        own = {name: self.sources[name] for name in targets if is_first or name not in handed}
        ranks.on_each_rank(lambda: read_into({name: targets[name] for name in own}, own))
        for name in handed if mesh.layout.num_replicas > 1 else ():
            if (local := local_tensor(targets[name])).numel():
                dist.broadcast(local, group=mesh.replication_group, group_src=0)

    def _restore(self) -> None:
        for param, source, device in zip(self.params, self.sources.values(), self._devices, strict=True):
            if param.is_meta:
                become(param, Unread(source, device))


@contextmanager
def waiting(model: nn.Module) -> Iterator[Waiting]:
    """Puts unread parameters of a model on the meta device; back where they were if what follows raises."""
    found = Waiting(model)
    for param in found.params:
        become(param, torch.empty(param.shape, dtype=param.dtype, device="meta"))
    try:
        yield found
    except BaseException:
        found._restore()
        raise


def read_into(targets: Mapping[str, Tensor], sources: Mapping[str, Any]) -> None:
    """Reads this rank's part of tensors; communicates nothing.

    Args:
        targets: Shards or whole tensors, which are filled in place, in their own dtypes.
        sources: Where they are read from, by the same names.
    """
    with torch.no_grad(), ranks.quiet_dcp(alone=True):
        dcp.load(
            dict(targets),
            storage_reader=_Reader(sources),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )


class _Reader(dcp.StorageReader):
    """Reads for DCP, which knows what of a tensor is this rank's."""

    def __init__(self, sources: Mapping[str, Any]) -> None:
        self._sources = sources

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _described(source) for name, source in self._sources.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        blocks: list[Callable[[], object]] = []
        for item in plan.items:
            source, target = self._sources[item.storage_index.fqn], planner.resolve_tensor(item).detach()
            blocks += _blocks(source, target, item.storage_offsets, item.lengths)
        storage.each(_run, blocks)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _run(block: Callable[[], object]) -> None:
    block()


def _described(source: Any) -> TensorStorageMetadata:
    size = torch.Size(source.shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(TensorProperties(dtype=source.dtype), size, [chunk])


def _blocks(source: Any, target: Tensor, offsets: torch.Size, lengths: torch.Size) -> Iterator[Callable[[], object]]:
    """Yields what reads a part, some of its rows at a time, so that little is in memory beside it."""

    def read(first: int, count: int) -> None:
        with torch.no_grad():
            source.fill(target[first : first + count], [offsets[0] + first, *offsets[1:]], [count, *lengths[1:]])

    if not lengths:
        yield lambda: source.fill(target, (), ())
        return
    rows = max(1, _BLOCK_BYTES * lengths[0] // max(1, target.numel() * source.dtype.itemsize))
    for first in range(0, lengths[0], rows):
        yield lambda first=first: read(first, min(rows, lengths[0] - first))  # type: ignore[misc]
