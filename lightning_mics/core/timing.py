"""Timing what all ranks do together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist


def timed(call: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Returns the seconds of one of ``count`` calls back to back, begun by all ranks at the same time."""
    synchronize = torch.get_device_module(device.type).synchronize
    dist.barrier()
    synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - begin) / count


def across_ranks(
    values: Sequence[float], device: torch.device, op: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX
) -> list[float]:
    """Returns each of the values as the rank has it whose is the largest, or what else ``op`` makes of them.

    To the last bit the same on all ranks, which can so go on alike.
    """
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=op)
    return tensor.tolist()
