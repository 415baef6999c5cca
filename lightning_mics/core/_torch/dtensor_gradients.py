"""Gradients of DTensors: of the whole parameter that is made of shards, and in the place of a shard."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_mics.core._needs import gone, require
from lightning_mics.core._torch.modules import with_local

try:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._api import _ToTorchTensor
    from torch.distributed.tensor.experimental import implicit_replication as implicit_replication
except ImportError as error:
    raise gone(error) from error

require(_ToTorchTensor, "forward", "backward")
require(DTensor, "_spec")

_AVERAGED: set[DeviceMesh] = set()


def average_gradients_over(mesh: DeviceMesh) -> None:
    """Makes a gradient that reaches DTensors of a mesh from plain tensors the mean over its ranks.

    PyTorch takes the gradient of ``full_tensor()`` for the same on all ranks, and each rank keeps a part of its own. A
    loss of this rank's data has another gradient than its peers', whose mean is what one process would see.

    Args:
        mesh: A one-dimensional mesh; DTensors on equal ones are meant as well.
    """
    if mesh.size() > 1:
        _AVERAGED.add(mesh)
        _install()


@functools.cache
def _install() -> None:
    whole: Any = DTensor.full_tensor
    forward, backward = _ToTorchTensor.forward, _ToTorchTensor.backward

    @functools.wraps(whole)
    def full_tensor(self: Any, *, grad_placements: Sequence[Any] | None = None) -> Tensor:
        # Of shards, it is one reduce-scatter.
        is_asked = grad_placements is None and self.requires_grad and self._spec.mesh in _AVERAGED
        if is_asked and all(type(placement) is Shard for placement in self._spec.placements):
            grad_placements = [Partial("avg")]
        return whole(self, grad_placements=grad_placements)

    def told_forward(ctx: Any, tensor: Any, grad_placements: Any) -> Tensor:
        spec = tensor._spec
        ctx.averages = grad_placements is None and spec.mesh in _AVERAGED and spec.placements == (Replicate(),)
        return forward(ctx, tensor, grad_placements)

    def averaging_backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None and ctx.averages:
            mesh = ctx.dtensor_spec.mesh
            partial = DTensor.from_local(grad, mesh, [Partial("avg")])
            return partial.redistribute(placements=[Replicate()]), None
        return backward(ctx, grad)

    DTensor.full_tensor = full_tensor  # type: ignore[method-assign]
    _ToTorchTensor.forward = staticmethod(told_forward)  # type: ignore[method-assign, assignment]
    _ToTorchTensor.backward = staticmethod(averaging_backward)  # type: ignore[method-assign, assignment]


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a gradient as a shard of memory of its own, placed and typed as ``like``; that may be itself.

    Args:
        tensor: A DTensor of any placement, or a plain tensor that is the same whole one on all ranks.
        like: A DTensor.
    """
    assert isinstance(like, DTensor)
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
    if tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    local = tensor._local_tensor
    if local.is_contiguous() and local.dtype == like.dtype and local.device == like.device:
        return tensor
    return with_local(like, local.to(like.device, like.dtype).contiguous())
