"""Hop one of a unit: how a microstep's reduce-scatter ends up in ``.grad``, in three ways behind one interface.

The reduce-scatter itself is FSDP2's. It makes a buffer on the reduce stream and its shards views of it: a new ``.grad``
where there was none, otherwise it adds to the one there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_mics.core._torch import UnitParamGroup, local_tensor
from lightning_mics.core.gradients.layout import FlatLayout


class Reduction(ABC):
    """One way to run hop one. A unit's reductions take turns: at most one of them holds anything at a time.

    Attributes:
        may_run_on: Whether hop one may go on beside the backward pass, until :meth:`finish`.
    """

    may_run_on = False

    @property
    def is_running(self) -> bool:
        """Whether hop one goes on beside the backward pass."""
        return False

    def applies(self, layout: FlatLayout, *, deferring: bool) -> bool:
        """Returns whether this way is to be taken in a microstep.

        Args:
            layout: The unit's trainable parameters.
            deferring: Whether more microsteps of the window follow.
        """
        return True

    @abstractmethod
    def run(self, layout: FlatLayout, reduce_scatter: Callable[[], None]) -> None:
        """Runs FSDP2's reduce-scatter for the trainable parameters of a unit.

        Args:
            layout: These parameters.
            reduce_scatter: FSDP2's own step.
        """

    def finish(self) -> None:  # noqa: B027
        """Waits for what goes on beside the pass; ``.grad`` is whole afterwards."""

    def sums(self, layout: FlatLayout) -> Tensor | None:
        """Returns the window's sums, of shape ``[layout.numel]``; ``None`` if ``.grad`` holds them alone."""
        return None

    def take(self, layout: FlatLayout, sums: Tensor) -> None:
        """Makes other sums the window's: those of all replicas. It runs on the reduce stream."""
        layout.write_back(sums)

    def drop(self) -> None:  # noqa: B027
        """Forgets the window."""


def _can_reduce_into(group: UnitParamGroup, layout: FlatLayout, sums: Tensor) -> bool:
    # Frozen parameters that are left out may have gradients of a time before, which FSDP2 would reduce with the others.
    return len(layout.params) == len(group.params) and group.can_reduce_into(sums.dtype)


class PlainReduction(Reduction):
    """FSDP2 adds the reduced gradient to ``.grad``: to the whole unit's at once, where these lie in one buffer.

    Args:
        group: The unit's parameters.
    """

    def __init__(self, group: UnitParamGroup) -> None:
        self._group = group

    def run(self, layout: FlatLayout, reduce_scatter: Callable[[], None]) -> None:
        """Leaves everything to FSDP2."""
        sums = layout.common_buffer()
        if sums is not None and sums.device == self._group.device and _can_reduce_into(self._group, layout, sums):
            self._group.reduce_into(sums, reduce_scatter)
        else:
            reduce_scatter()

    def sums(self, layout: FlatLayout) -> Tensor:
        """Returns the gradients themselves, or a copy where they lie apart."""
        return layout.flatten()


class ExactReduction(Reduction):
    """Accumulates in ``reduce_dtype``: sums of low-precision gradients lose more with every microstep.

    Args:
        group: The unit's parameters.
        reduce_dtype: Dtype of the sums, wider than the gradients'.
    """

    def __init__(self, group: UnitParamGroup, reduce_dtype: torch.dtype) -> None:
        self._group, self._dtype = group, reduce_dtype
        self._layout: FlatLayout | None = None
        # Made, written and read on the reduce stream; the window drops it.
        self._sums: Tensor | None = None
        self._written: list[tuple[int, ...] | None] = []
        # What was written: while it lives, no gradient that replaces it can lie in its place.
        self._copies: list[Tensor] = []
        # Gradients of earlier microsteps may come from the compute stream's memory: they are read on the reduce stream,
        # and must not be freed before the compute stream has waited for that, as it has when the window is dropped.
        self._borrowed: list[Tensor] = []

    def applies(self, layout: FlatLayout, *, deferring: bool) -> bool:
        """Returns whether sums of several microsteps would be rounded; not where gradients lie in host memory."""
        param = layout.params[0]
        is_on_device = param.sharded.device.type == self._group.device.type
        is_lossy = self._dtype.itemsize > param.grad_dtype.itemsize and is_on_device
        return self._sums is not None or (deferring and is_lossy)

    def run(self, layout: FlatLayout, reduce_scatter: Callable[[], None]) -> None:
        """Reduces into new gradients, and adds these to the sums, of which ``.grad`` becomes a rounded copy."""
        sums = self.sums(layout)
        if sums is not None and _can_reduce_into(self._group, layout, sums):
            self._group.reduce_into(sums, reduce_scatter)
            with self._group.reduce_stream():
                self.take(layout, sums)
            return
        earlier = [] if sums is not None else [param.sharded.grad for param in layout.params]
        for param in layout.params:
            param.sharded.grad = None
        reduce_scatter()
        with self._group.reduce_stream():
            if sums is None:
                sums = layout.flatten().to(self._dtype, copy=True)
                for place, grad in zip(layout.places(sums), earlier, strict=True):
                    if grad is not None:
                        place += local_tensor(grad)
                        self._borrowed.append(grad)
            else:
                sums += layout.flatten()
            self.take(layout, sums)

    def sums(self, layout: FlatLayout) -> Tensor | None:
        """Returns the sums, unless ``.grad`` was cleared, written or replaced since."""
        is_known = self._layout is not None and layout.params == self._layout.params
        return self._sums if is_known and layout.grad_versions() == self._written else None

    def take(self, layout: FlatLayout, sums: Tensor) -> None:
        """Makes a buffer the window's sums, and ``.grad`` what it rounds to."""
        self._layout, self._sums = layout, sums
        layout.write_back(sums)
        self._written, self._copies = layout.grad_versions(), layout.grads()

    def drop(self) -> None:
        """Forgets the sums."""
        self._layout = self._sums = None
        self._copies = []
        self._borrowed.clear()
