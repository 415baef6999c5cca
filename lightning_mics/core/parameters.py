"""What ``model.parameters()`` are: shards between passes, and whatever is done to gathered ones inside passes counts.

Invariants:

- Outside of a forward or backward pass modules hold shards. What FSDP2 keeps gathered for the backward pass is kept,
  and comes back when the next pass begins, or is gathered anew if the shards were written meanwhile.
- Gathered parameters and shards agree on ``requires_grad``, and on values, wherever one takes the place of the other.
- A step of an optimizer counts as a write to the shards that have a gradient, also where it is fused.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_mics.core._torch import GatheredParams, UnitParamGroup
from lightning_mics.core.gradients.agreement import CollectiveOrder
from lightning_mics.errors import MiCSError


class Parameters:
    """The parameters of one sharded model, as its modules hold them.

    Args:
        groups: Those of each unit.
        skips: By unit, parameters whose writes in a pass are somebody else's to keep.
        order: Where writes are noted.
    """

    def __init__(
        self, groups: Sequence[UnitParamGroup], skips: Sequence[frozenset[int]], order: CollectiveOrder
    ) -> None:
        self._order = order
        self._units = [
            GatheredParams(group, self.begin_use, self._note_writes, skipped)
            for group, skipped in zip(groups, skips, strict=True)
        ]
        self._show_shards = True
        self._gathered_names: dict[int, str] = {}
        _MODELS.add(self)
        _watch_steps()

    def begin_use(self) -> None:
        """Registers what is gathered already, for the pass that begins."""
        if self._show_shards:
            self._show_shards = False
            for unit in self._units:
                unit.show_gathered()

    def end_pass(self) -> None:
        """Registers the shards."""
        self._show_shards = True
        for unit in self._units:
            unit.show_shards()

    def share_requires_grad(self) -> None:
        """Makes what was set on shards inside a pass hold for what is gathered."""
        for unit in self._units:
            if unit.is_gathered:
                unit.share_requires_grad()

    def gathered_name(self, ids: set[int]) -> str | None:
        """Returns the name of a gathered parameter whose ``id`` is among some."""
        known = self._gathered_names
        if len(known) < sum(len(unit.unit.params) for unit in self._units):  # they stay the same for good
            known.update(
                (id(param), unit.name(index)) for unit in self._units for index, param in enumerate(unit.gathered)
            )
        found = known.keys() & ids
        return known[min(found)] if found else None

    def owned(self) -> set[int]:
        """Returns the ``id`` of each shard."""
        return {id(param.sharded) for unit in self._units for param in unit.unit.params}

    def _note_writes(self, unit: GatheredParams, indices: list[int]) -> None:
        """Notes what was written, which ranks compare at the end of the window; the host waits for it."""
        gathered = unit.gathered
        sums = torch.stack([_sum_of_bits(gathered[index]) for index in indices]).tolist()
        for index, checksum in zip(indices, sums, strict=True):
            self._order.note_write(unit.name(index), checksum)


def _sum_of_bits(param: Tensor) -> Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return param.detach().view(kinds[param.itemsize]).sum(dtype=torch.int64)


_MODELS: weakref.WeakSet[Parameters] = weakref.WeakSet()


@functools.cache
def _watch_steps() -> None:
    # One hook for all, and for good: PyTorch goes through its hooks while models may be collected.
    register_optimizer_step_pre_hook(_refuse_gathered)
    register_optimizer_step_post_hook(_note_step)


def _refuse_gathered(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for model in list(_MODELS):
        name = model.gathered_name(ids)
        if name is not None:
            raise MiCSError(
                f"{type(optimizer).__name__} holds the gathered parameter {name!r}, which is freed after the pass and "
                "gets no gradient. Create the optimizer outside of forward and of training_step, where "
                "model.parameters() are shards."
            )


def _note_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    stepped = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    for model in list(_MODELS):
        owned = model.owned()
        increment_version([param for param in stepped if id(param) in owned])
