"""Gathering the next unit while this one computes, where no stream does it: on CPUs.

On accelerators FSDP2 gathers on a stream of its own, so the host runs ahead and gathers overlap. On CPUs it would wait
for each gather. In backward passes FSDP2 gathers ahead by itself, in the reverse order of the forward pass; in forward
passes it has to be told the order, which the first one shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from torch.distributed.fsdp import FSDPModule

from lightning_mics._compat import UnitParamGroup, gather_beside


class ForwardPrefetch:
    """Learns the order of units in the first forward pass, and gathers ahead in those that follow.

    Args:
        modules: The modules of all units.
        groups: The parameters of all units.
    """

    def __init__(self, modules: Sequence[FSDPModule], groups: Sequence[UnitParamGroup]) -> None:
        self._modules, self._groups = modules, groups
        self._order: list[int] | None = []
        for module in modules:
            gather_beside(module)

    def note_gather(self, index: int) -> None:
        """Notes that a unit is gathered."""
        if self._order is not None:
            self._order.append(index)

    def forward_ended(self) -> None:
        """Applies what was learnt, and gives up where a forward pass takes another path than the first one."""
        if self._order:
            times = Counter(self._order)
            for index, following in pairwise(self._order):
                if times[index] == times[following] == 1:  # otherwise one cannot tell which use comes next
                    self._modules[index].set_modules_to_forward_prefetch([self._modules[following]])
            self._order = None
        unused = [group for group in self._groups if group.discard_prefetched()]
        if unused:
            for module in self._modules:
                module.set_modules_to_forward_prefetch([])
