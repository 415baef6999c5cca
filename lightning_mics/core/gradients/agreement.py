"""What the ranks tell each other at the end of a window, in one small message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from lightning_mics.core.gradients.unit import Phase, UnitGradients
from lightning_mics.core.mesh import MiCSMesh
from lightning_mics.errors import SelfCheckError

_SLOT = 8  # bytes: a fingerprint and its complement


class CollectiveOrder:
    """A fingerprint of the order in which a rank ran its partition collectives."""

    def __init__(self) -> None:
        self._hash = 0

    def note(self, unit_index: int, kind: int) -> None:
        """Folds in a collective: which unit's, and 0 for a gather or 1 for a reduction."""
        self._hash = (self._hash * 1_000_003 + unit_index * 2 + kind + 1) & 0xFFFFFFFF

    def clear(self) -> None:
        """Starts a new window."""
        self._hash = 0

    def slot(self) -> bytes:
        """Returns the fingerprint and its complement.

        The maximum of a byte and that of its complement, over some ranks, add up to 255 only if all sent one byte.
        """
        order = self._hash.to_bytes(_SLOT // 2, "big")
        return order + bytes(255 - byte for byte in order)


def agree(
    mesh: MiCSMesh, units: Sequence[UnitGradients], order: CollectiveOrder
) -> tuple[Iterator[bool], Sequence[bool]]:
    """Exchanges what was used, what is outdated, and the order of collectives. Collective over the world.

    Returns:
        Parameter by parameter, whether any rank used it; unit by unit, whether any rank's hop two is outdated.

    Raises:
        SelfCheckError: On every rank, if ranks of a partition group ran their collectives in different order.
    """
    used = [flag for unit in units for flag in unit.use.used]
    outdated = [unit.phase is Phase.OUTDATED for unit in units]
    slots = bytearray(_SLOT * mesh.layout.num_replicas)
    mine = _SLOT * mesh.layout.replica_of(dist.get_rank())
    slots[mine : mine + _SLOT] = order.slot()
    order.clear()
    message = torch.tensor([*used, *outdated, *slots], dtype=torch.uint8).to(units[0].group.device)
    dist.all_reduce(message, op=dist.ReduceOp.MAX)
    answer = message.tolist()
    flags, slots_of_all = answer[: len(used) + len(outdated)], answer[len(used) + len(outdated) :]
    _check_order(mesh, slots_of_all)
    return map(bool, flags[: len(used)]), list(map(bool, flags[len(used) :]))


def _check_order(mesh: MiCSMesh, slots: Sequence[int]) -> None:
    half = _SLOT // 2
    for replica, group in enumerate(mesh.layout.partition_groups):
        slot = slots[_SLOT * replica : _SLOT * (replica + 1)]
        # Nothing came from ranks that the fake backend only pretends to have.
        if any(slot) and any(high + low != 255 for high, low in zip(slot[:half], slot[half:], strict=True)):
            raise SelfCheckError(
                f"Ranks {list(group)} of one partition group ran the units of the model in different order, so "
                "gathered parameters or gradients may belong to different units. Let every rank of a partition "
                "take the same path through the model, put the modules of the branch into one unit (wrap=), or "
                "use shard_size=1."
            )
