"""Gathering the next unit while this one computes, where no stream does it: on CPUs.

On accelerators FSDP2 gathers on a stream of its own, so the host runs ahead and gathers overlap. On CPUs it would wait
for each gather. In backward passes FSDP2 gathers ahead by itself, in the reverse order of the forward pass; for forward
passes the order is learnt here, from the first one that trains.

Invariants:

- Only a forward pass of the root gathers ahead, never the recomputation of activations in a backward pass.
- What was gathered ahead is used only if the shards are still what they were; otherwise it is gathered anew.
- Nothing that was gathered ahead outlives the root's forward pass or an optimizer step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from lightning_mics.core._torch import UnitParamGroup, current_backward_id, outside_graphs


class ForwardPrefetch:
    """Learns the order of units in the first forward pass that trains, and gathers ahead in those that follow.

    Args:
        units: Each unit's first module and its parameters; the root first. Units without parameters have ``None``.
    """

    def __init__(self, units: Sequence[tuple[nn.Module, UnitParamGroup | None]]) -> None:
        self._groups = [group for _, group in units]
        self._following: dict[int, int] | None = None
        self._order: list[int] = []
        self._is_forward = False
        for index, (module, group) in enumerate(units):
            if group is not None:
                # Before FSDP2 waits for it, and when it has.
                module.register_forward_pre_hook(outside_graphs(self._before(group)), prepend=True)
                module.register_forward_pre_hook(outside_graphs(self._after(index)))

    def _before(self, group: UnitParamGroup) -> Callable[..., None]:
        def drop_if_stale(module: nn.Module, args: object) -> None:
            if group.is_prefetched_stale:
                group.discard_prefetched()

        return drop_if_stale

    def _after(self, index: int) -> Callable[..., None]:
        def gather_following(module: nn.Module, args: object) -> None:
            if not self._is_forward or not self._following or current_backward_id() != -1:
                return
            following = self._groups[self._following.get(index, index)]
            if following is not self._groups[index] and following is not None:
                following.prefetch()

        return gather_following

    def noting(self, index: int, on_gather: Callable[[int], None]) -> Callable[[int], None]:
        """Returns a function that notes a gather of a unit, and tells another one of its bytes."""

        def note(message_bytes: int) -> None:
            on_gather(message_bytes)
            if self._is_forward and self._following is None and current_backward_id() == -1:
                self._order.append(index)

        return note

    def forward_begins(self) -> None:
        """Notes the beginning of a forward pass of the root."""
        self._is_forward = True
        self._order.clear()

    def forward_ended(self) -> None:
        """Notes the end of a forward pass of the root, and learns: the order, and what was gathered in vain."""
        self._is_forward = False
        if self._following is None and torch.is_grad_enabled():
            times = Counter(self._order)
            # Of a unit that runs twice one cannot tell which use comes next.
            self._following = {
                unit: following for unit, following in pairwise(self._order) if times[unit] == times[following] == 1
            }
        for index, group in enumerate(self._groups):
            if group is not None and group.discard_prefetched() and self._following:
                self._following = {unit: after for unit, after in self._following.items() if after != index}
