"""Where the shards of a unit lie in one flat buffer: FSDP2's own layout of a reduce-scatter output."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mics.core._torch import UnitParam, local_gradients, local_tensor

# For maps over the gradients of a unit, once a microstep: a loop of Python would take longer than the rest of it.
_OFFSET, _IS_CONTIGUOUS, _STORAGE = Tensor.storage_offset, Tensor.is_contiguous, Tensor.untyped_storage
_ADDRESS, _DTYPE = torch.UntypedStorage.data_ptr, operator.attrgetter("dtype")


class FlatLayout:
    """The shards of some parameters, one behind another, each padded.

    Ranks of a replication group hold the same shards, so their buffers have the same size whatever happened before.

    Args:
        params: Parameters of one unit, in its order.
    """

    def __init__(self, params: Sequence[UnitParam]) -> None:
        self.params = tuple(params)
        self._shapes = [param.local_shape for param in params]
        *offsets, self.numel = itertools.accumulate((param.padded_shard_numel for param in params), initial=0)
        self._offsets = tuple(offsets)

    def grads(self) -> list[Tensor]:
        """Returns this rank's shards of the gradients; every parameter must have one."""
        grads: list[Any] = [param.sharded.grad for param in self.params]
        return [local_tensor(grad) for grad in grads]

    def places(self, flat: Tensor) -> Iterator[Tensor]:
        """Yields the shards as views of a buffer of shape ``[numel]``."""
        for shape, offset in zip(self._shapes, self._offsets, strict=True):
            yield flat[offset : offset + shape.numel()].view(shape)

    def common_buffer(self) -> Tensor | None:
        """Returns the buffer of shape ``[numel]`` that FSDP2 made the gradients views of; ``None`` if they are not."""
        grads = local_gradients(self.params)
        if not grads or tuple(map(_OFFSET, grads)) != self._offsets or not all(map(_IS_CONTIGUOUS, grads)):
            return None
        first = grads[0]
        is_whole = first.untyped_storage().nbytes() >= self.numel * first.element_size()
        is_common = len(set(map(_ADDRESS, map(_STORAGE, grads)))) == len(set(map(_DTYPE, grads))) == 1
        return first.as_strided((self.numel,), (1,), 0) if is_whole and is_common else None

    def flatten(self) -> Tensor:
        """Returns the gradients as one buffer: the one that FSDP2 made them views of, or else a copy."""
        buffer = self.common_buffer()
        return self._copy(self.grads()) if buffer is None else buffer

    def _copy(self, grads: Sequence[Tensor]) -> Tensor:
        flat = grads[0].new_zeros(self.numel)
        for place, grad in zip(self.places(flat), grads, strict=True):
            place.copy_(grad)
        return flat

    def write_back(self, flat: Tensor) -> None:
        """Puts a buffer's values into the gradients that are no views of it."""
        buffer = self.common_buffer()
        if buffer is not None:
            if buffer.data_ptr() != flat.data_ptr():
                buffer.copy_(flat)
            return
        for grad, place in zip(self.grads(), self.places(flat), strict=True):
            if grad.data_ptr() != place.data_ptr():
                grad.copy_(place)

    def grad_versions(self) -> list[tuple[int, ...] | None]:
        """Returns what changes when anybody writes or replaces a gradient: its place and versions."""
        grads = [param.sharded.grad for param in self.params]
        return [None if grad is None else _version(grad) for grad in grads]


def _version(grad: Tensor) -> tuple[int, ...]:
    local = local_tensor(grad)
    return local.data_ptr(), grad._version, local._version
