"""``nn.Embedding(max_norm=)``: each rank renormalises the rows that it looks up, and shards take those of all ranks.

PyTorch scales rows in place, in forward, before it looks them up. A rank does so in its gathered copy, with the rows of
its own batch. The shard must get the rows that any rank looked up, as one process with the global batch would scale
them. Scaling a row twice changes nothing, so it is enough to do so at the end of a window, before the optimizer acts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics.core._torch import UnitParamGroup, outside_graphs
from lightning_mics.core.gradients.window import AccumulationWindow, WindowObserver
from lightning_mics.core.masters import changed, own_rows
from lightning_mics.core.mesh import MiCSMesh, communication_device

_TINY = 1e-7  # what PyTorch adds to a row's norm


class RowNorms(WindowObserver):
    """Renormalises the shards of embeddings that have ``max_norm``.

    Args:
        model: The sharded model.
        mesh: The groups.
    """

    def __init__(self, model: nn.Module, mesh: MiCSMesh) -> None:
        self._mesh = mesh
        kinds = nn.Embedding | nn.EmbeddingBag
        self._tables = [
            _Table(module, communication_device(mesh.device_mesh.device_type))
            for module in model.modules()
            if isinstance(module, kinds) and module.max_norm is not None and isinstance(module.weight, DTensor)
        ]
        self._weights: list[Any] = [table.weight for table in self._tables]

    def owned(self, group: UnitParamGroup) -> frozenset[int]:
        """Returns which parameters of a unit are such embeddings."""
        return frozenset(
            index
            for index, param in enumerate(group.params)
            if any(param.sharded is weight for weight in self._weights)
        )

    def after_window(self, window: AccumulationWindow) -> bool:
        """Renormalises what any rank looked up. Collective over the world."""
        if self._tables:
            window.restore_rows()
        for table in self._tables:
            for group in (self._mesh.partition_group, self._mesh.replication_group):
                if group.size() > 1:
                    dist.all_reduce(table.looked_up, op=dist.ReduceOp.MAX, group=group)
            table.renormalise()
        return not self._tables


class _Table:
    """One embedding.

    Attributes:
        weight: Its shard.
        looked_up: By row, whether it was looked up in the window.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        self.weight: DTensor = module.weight
        self._max_norm, self._order = float(module.max_norm), float(module.norm_type)
        self.looked_up = torch.zeros(len(self.weight), dtype=torch.uint8, device=device)
        module.register_forward_pre_hook(outside_graphs(self._note), with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows: Tensor = args[0] if args else kwargs["input"]
        self.looked_up.index_fill_(0, rows.reshape(-1).long(), 1)

    @torch.no_grad()
    def renormalise(self) -> None:
        """Scales the rows of this rank that are too long."""
        local, start = own_rows(self.weight)
        mine = self.looked_up[start : start + len(local)].to(local.device).bool()
        norms = torch.linalg.vector_norm(local, ord=self._order, dim=1)
        scale = torch.where(mine & (norms > self._max_norm), self._max_norm / (norms + _TINY), 1.0)
        local.mul_(scale.to(local.dtype).unsqueeze(1))
        changed([self.weight])
        self.looked_up.zero_()
