"""PyTorch's own clipping of gradients, of which some are shards and some are whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad

from lightning_mics.core._needs import require

require(clip_grad, "_get_total_norm", "_group_tensors_by_device_and_dtype")

_Norm = Callable[[Sequence[Tensor], float], Tensor]


@functools.cache
def clip_mixed_gradients(total_norm: _Norm) -> None:
    """Lets ``torch.nn.utils`` clip gradients of both kinds together; what it does with those of one kind stays.

    Its operations over lists of tensors take DTensors or plain tensors, and not both.

    Args:
        total_norm: Returns the norm of gradients of both kinds.
    """
    norm_of_one_kind, group = clip_grad._get_total_norm, clip_grad._group_tensors_by_device_and_dtype

    def norm(tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: Any = None) -> Tensor:
        listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if not _is_mixed(listed):
            return norm_of_one_kind(listed, norm_type, error_if_nonfinite, foreach)
        total = total_norm(listed, float(norm_type))
        # Of a scalar that is plain PyTorch raises by itself, with its own words.
        return norm_of_one_kind([total], math.inf, True, foreach) if error_if_nonfinite else total

    def group_by_kind(lists: list[list[Any]], *args: Any, **kwargs: Any) -> dict[Any, Any]:
        if len(lists) != 1 or not _is_mixed(lists[0]):
            return group(lists, *args, **kwargs)
        found: dict[Any, Any] = {}
        for kind in (True, False):
            chosen = [tensor for tensor in lists[0] if isinstance(tensor, DTensor) == kind]
            if not chosen:
                continue
            for (device, dtype), members in group([chosen], *args, **kwargs).items():
                found[device, (dtype, kind)] = members
        return found

    patched: Any = clip_grad
    patched._get_total_norm, patched._group_tensors_by_device_and_dtype = norm, group_by_kind


def _is_mixed(tensors: Sequence[Tensor]) -> bool:
    """Returns whether tensors are of several kinds, or slices: DTensor knows no largest magnitude of an empty one."""
    kinds = {tensor.device_mesh.ndim if isinstance(tensor, DTensor) else 0 for tensor in tensors}
    return len(kinds) > 1 or 2 in kinds
