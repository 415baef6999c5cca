"""From Lightning's precision names to FSDP2's mixed precision policy, and loss scaling over shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lightning_mics.config import MiCSConfig
from lightning_mics.errors import MiCSConfigError

SUPPORTED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
_MIXED_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def check_precision(precision: str) -> None:
    """Checks that a precision is one that MiCS can shard.

    Raises:
        MiCSConfigError: If it is not.
    """
    if precision not in SUPPORTED_PRECISIONS:
        raise MiCSConfigError(
            f"precision={precision!r} is not supported by MiCS. Values that work: {', '.join(SUPPORTED_PRECISIONS)}."
        )


def apply_precision(config: MiCSConfig, precision: str) -> MiCSConfig:
    """Returns the config with the gather dtype that a precision asks for; an explicit ``param_dtype`` wins.

    With a mixed precision, parameters stay float32 in their shards and are gathered in 16 bits, half the bytes. The
    ``"-true"`` precisions change the module itself. Gradients are reduced in ``reduce_dtype`` either way.

    Raises:
        MiCSConfigError: If the precision is not supported.
    """
    check_precision(precision)
    dtype = _MIXED_DTYPES.get(precision)
    if dtype is None or config.param_dtype is not None:
        return config
    # Autocast looks after inputs of the root; casting a whole batch would round its targets, too.
    return config.replace(param_dtype=dtype, cast_forward_inputs="units" if config.cast_forward_inputs else False)


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
                    grad = param.grad._local_tensor if isinstance(param.grad, DTensor) else param.grad
                    by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
        overflow = found_inf.clone()
        for (device, _), grads in by_kind.items():
            found = torch.zeros_like(overflow, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inv_scale.to(device))
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
