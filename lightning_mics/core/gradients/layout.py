"""Where the shards of a unit lie in one flat buffer: FSDP2's own layout of a reduce-scatter output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lightning_mics.core._torch import UnitParam, local_tensor


class FlatLayout:
    """The shards of some parameters, one behind another, each padded.

    Ranks of a replication group hold the same shards, so their buffers have the same size whatever happened before.

    Args:
        params: Parameters of one unit, in its order.
    """

    def __init__(self, params: Sequence[UnitParam]) -> None:
        self.params = tuple(params)
        self._shapes = [param.local_shape for param in params]
        self._offsets: list[int] = []
        self.numel = 0
        for param in params:
            self._offsets.append(self.numel)
            self.numel += param.padded_shard_numel

    def grads(self) -> list[Tensor]:
        """Returns this rank's shards of the gradients; every parameter must have one."""
        grads: list[Any] = [param.sharded.grad for param in self.params]
        return [local_tensor(grad) for grad in grads]

    def places(self, flat: Tensor) -> Iterator[Tensor]:
        """Yields the shards as views of a buffer of shape ``[numel]``."""
        for shape, offset in zip(self._shapes, self._offsets, strict=True):
            yield flat[offset : offset + shape.numel()].view(shape)

    def flatten(self) -> Tensor:
        """Returns the gradients as one buffer: the one that FSDP2 made them views of, or else a copy."""
        grads = self.grads()
        return self._common_buffer(grads) if self._is_common_buffer(grads) else self._copy(grads)

    def _is_common_buffer(self, grads: Sequence[Tensor]) -> bool:
        first = grads[0]
        storage, start = first.untyped_storage(), first.storage_offset()
        return storage.nbytes() >= (start + self.numel) * first.element_size() and all(
            grad.untyped_storage().data_ptr() == storage.data_ptr()
            and grad.dtype == first.dtype
            and grad.storage_offset() == start + offset
            and grad.is_contiguous()
            for grad, offset in zip(grads, self._offsets, strict=True)
        )

    def _common_buffer(self, grads: Sequence[Tensor]) -> Tensor:
        return grads[0].as_strided((self.numel,), (1,), grads[0].storage_offset())

    def _copy(self, grads: Sequence[Tensor]) -> Tensor:
        flat = grads[0].new_zeros(self.numel)
        for place, grad in zip(self.places(flat), grads, strict=True):
            place.copy_(grad)
        return flat

    def write_back(self, flat: Tensor) -> None:
        """Puts a buffer's values into the gradients that are no views of it."""
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
