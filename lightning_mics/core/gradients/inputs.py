"""Gradients of parameters that are named: ``torch.autograd.grad(loss, params)`` and ``loss.backward(inputs=params)``.

Parameters are shards between passes, and the graph of a pass ends in what it gathered. So autograd is asked for that,
too; and what ``torch.autograd.grad`` returns is the mean over all ranks, as one process would have it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from lightning_mics.core._torch import (
    gradient_dtype,
    in_function_transform,
    local_tensor,
    placed_like,
    run_backward_passes_by,
)
from lightning_mics.core.gradients.window import AccumulationWindow
from lightning_mics.core.mesh import communication_device
from lightning_mics.errors import MiCSError

Windows = Callable[[], Sequence[AccumulationWindow]]


def answer_for_shards(windows: Windows) -> None:
    """Lets autograd's functions take shards of models, and parameters that every rank holds whole, as inputs.

    Args:
        windows: Returns the windows of all models, in an order that all ranks share.
    """
    run_backward_passes_by(functools.partial(_run, windows))


def _run(
    windows: Windows,
    run: Callable[..., Any],
    outputs: Any,
    grads: Any,
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> Any:
    begin = functools.partial(run, outputs, grads, retain_graph, create_graph)
    asked = [(window, found) for window in (windows() if inputs else ()) if (found := _asked(window, inputs))]
    if not asked:
        return begin(inputs, allow_unreachable, accumulate_grad=accumulate_grad)
    gathered = {id(shard): whole for window, _ in asked for whole, shard in window.gathered()}
    places = {place: gathered[id(item)] for place, item in enumerate(inputs) if id(item) in gathered}
    if accumulate_grad:
        return begin((*inputs, *places.values()), allow_unreachable, accumulate_grad=True)
    if create_graph or in_function_transform():
        raise MiCSError(
            "torch.autograd.grad was asked for a graph of gradients (create_graph=True, is_grads_batched=True) of "
            "parameters of a sharded model, whose means over ranks have none. Gradients of inputs and activations may "
            "have a graph."
        )
    grads = begin((*inputs, *places.values()), True, accumulate_grad=False)
    own, of_whole = list(grads[: len(inputs)]), dict(zip(places, grads[len(inputs) :], strict=True))
    for window, indices in asked:
        _average(window, inputs, indices, own, of_whole)
    if not allow_unreachable and any(grad is None for grad in own):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True if "
            "this is the desired behavior."
        )
    return tuple(own)


def _asked(window: AccumulationWindow, inputs: Sequence[Any]) -> list[int]:
    """Returns which inputs are parameters of a model."""
    owned = {id(param.sharded) for unit in window.units for param in unit.group.params}
    if window.whole.is_needed:
        owned.update(map(id, window.whole.params.values()))
    return [index for index, item in enumerate(inputs) if id(item) in owned]


@torch.no_grad()
def _average(
    window: AccumulationWindow,
    inputs: Sequence[Tensor],
    indices: Sequence[int],
    own: list[Any],
    of_whole: dict[int, Tensor | None],
) -> None:
    """Puts means over all ranks into ``own``; what no rank used stays ``None``. Collective over the world."""
    mesh = window.mesh
    groups = [group for group in (mesh.partition_group, mesh.replication_group) if group.size() > 1]
    weight = window.weight
    here = [weight > 0 and (own[index] is not None or of_whole.get(index) is not None) for index in indices]
    used = torch.tensor(here, dtype=torch.uint8, device=communication_device(mesh.device_mesh.device_type))
    for group in groups:
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    for index, is_used in zip(indices, used.tolist(), strict=True):
        param = inputs[index]
        if not is_used:
            continue
        if isinstance(param, DTensor):
            whole = of_whole.get(index)
            own[index] = _as_shard(param, own[index], None if whole is None or weight == 0 else whole * weight)
            averaging = groups[mesh.partition_group.size() > 1 :]
        else:
            is_zero = own[index] is None or weight == 0
            own[index] = torch.zeros_like(param) if is_zero else own[index] * weight
            averaging = groups
        mine = local_tensor(own[index])
        for group in averaging:
            dist.all_reduce(torch.view_as_real(mine) if mine.is_complex() else mine, op=dist.ReduceOp.AVG, group=group)


def _as_shard(param: DTensor, own: Tensor | None, of_whole: Tensor | None) -> Tensor:
    """Returns the mean over the partition of whole gradients, and what came to the shard by itself."""
    device = communication_device(param.device_mesh.device_type)
    whole = torch.zeros(param.shape, device=device) if of_whole is None else of_whole
    mean = DTensor.from_local(whole.to(gradient_dtype(param)), param.device_mesh, [Partial("avg")], run_check=False)
    total = placed_like(mean, param)
    if own is not None:
        local_tensor(total).add_(local_tensor(placed_like(own, param)))
    return total
