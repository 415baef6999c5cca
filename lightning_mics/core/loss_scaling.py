"""Loss scaling over shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lightning_mics.core._torch import local_tensor, unscale_and_check


class MiCSGradScaler(torch.amp.GradScaler):
    """A gradient scaler whose decision to skip a step is that of all ranks.

    Each rank sees only its shards; an overflow in one shard must skip the step everywhere.
    """

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: torch.Tensor,
        found_inf: torch.Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, torch.Tensor]:
        by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    grad = local_tensor(param.grad)
                    by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
        overflow = found_inf.clone()
        for (device, _), grads in by_kind.items():
            found = torch.zeros_like(overflow, device=device)
            unscale_and_check(grads, found, inv_scale.to(device))
            torch.autograd.graph.increment_version(grads)  # the call above forgets to, and a window asks who wrote
            overflow = torch.maximum(overflow, found.to(overflow.device))
        dist.all_reduce(overflow, op=dist.ReduceOp.MAX)
        return {overflow.device: overflow}


def use_sharded_scaler(plugin: Any, device: Any = None) -> None:
    """Replaces the scaler of a precision plugin or an Accelerator, if it has one, by one that all ranks share.

    Args:
        plugin: What holds a ``scaler``.
        device: Where it scales; by default ``plugin.device``.
    """
    scaler = getattr(plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled() and not isinstance(scaler, MiCSGradScaler):
        plugin.scaler = MiCSGradScaler(
            device=torch.device(device or plugin.device).type,
            init_scale=scaler.get_scale(),
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            growth_interval=scaler.get_growth_interval(),
        )
