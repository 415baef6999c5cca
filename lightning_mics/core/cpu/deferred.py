"""A reduce-scatter that runs on beside the backward pass, where no stream does it: on CPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_mics.core._torch import UnitParam, UnitParamGroup, local_tensor
from lightning_mics.core.cpu.collectives import RingReduceScatter
from lightning_mics.core.gradients.layout import FlatLayout
from lightning_mics.core.gradients.reductions import Reduction


class DeferredReduction(Reduction):
    """Lets hop one end later: until then gradients of earlier microsteps are set aside.

    Args:
        group: The unit's parameters.
        reduce_scatter: The unit's collective.
    """

    may_run_on = True

    def __init__(self, group: UnitParamGroup, reduce_scatter: RingReduceScatter) -> None:
        self._group, self._collective = group, reduce_scatter
        self._waiting: list[tuple[UnitParam, Tensor | None]] = []

    @property
    def is_running(self) -> bool:
        """Whether the thread of communication still has it, or its result was not added up."""
        return self._collective.pending is not None

    def applies(self, layout: FlatLayout, *, deferring: bool) -> bool:
        """Returns whether nobody looks at reduced gradients, or adds to them, as soon as FSDP2 has made them."""
        return (
            len({param.grad_dtype for param in layout.params}) == 1
            and not self._group.has_reduce_hook
            and not any(param.has_unsharded_grad for param in self._group.params if not param.sharded.requires_grad)
        )

    def run(self, layout: FlatLayout, reduce_scatter: Callable[[], None]) -> None:
        """Starts the reduce-scatter into new gradients."""
        earlier = [param.sharded.grad for param in layout.params]
        for param in layout.params:
            param.sharded.grad = None
        try:
            with self._collective.deferring(layout.params[0].grad_dtype):
                reduce_scatter()
        except BaseException:
            for param, grad in zip(layout.params, earlier, strict=True):
                param.sharded.grad = grad
            raise
        self._waiting = list(zip(layout.params, earlier, strict=True))

    @torch.no_grad()
    def finish(self) -> None:
        """Waits for the reduce-scatter and adds what was set aside."""
        waiting, self._waiting = self._waiting, []
        self._collective.wait_pending()
        for param, earlier in waiting:
            if earlier is not None:
                grad = param.sharded.grad
                assert grad is not None
                local_tensor(earlier).add_(local_tensor(grad))
                param.sharded.grad = earlier
