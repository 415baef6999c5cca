"""Plain FSDP2 in training, as the measure of the checker: it has no races."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from stream_checker import StreamChecker
from stream_clocks import Settings
from stream_windows import Net
from stream_world import pretended_device
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

_MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
_BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)


@dataclass(frozen=True)
class Plain:
    """A configuration of FSDP2.

    Attributes:
        shape: The mesh's: shards, or replicas and shards.
        policy: Dtypes.
        microsteps: How many make a step.
        reshard: Whether parameters are freed after the forward pass.
        set_to_none: Whether gradients are cleared or zeroed.
        clips: Whether gradients are clipped.
        offloads: Whether shards are in host memory.
    """

    shape: tuple[int, ...]
    policy: MixedPrecisionPolicy | None = None
    microsteps: int = 1
    reshard: bool = True
    set_to_none: bool = True
    clips: bool = False
    offloads: bool = False

    def run(self, settings: Settings | None = None) -> StreamChecker:
        """Takes three steps; returns the checker with what it found."""
        with pretended_device(settings=settings) as checker:
            model, optimizer = self._shard()
            with checker:
                for _ in range(3):
                    self._step(model, optimizer)
            return checker

    def _shard(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Net()
        mesh = init_device_mesh("cuda", self.shape, mesh_dim_names=("replicate", "shard")[-len(self.shape) :])
        policies: dict[str, Any] = {} if self.policy is None else {"mp_policy": self.policy}
        if self.offloads:
            policies["offload_policy"] = CPUOffloadPolicy()
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard, **policies)
        return model, torch.optim.AdamW(model.parameters(), foreach=True)

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for index in range(self.microsteps):
            if len(self.shape) == 2:
                model.set_requires_all_reduce(index + 1 == self.microsteps)
            model(torch.randn(4, 16, device="cuda")).square().mean().backward()
        if self.clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=self.set_to_none)


PLAIN = {
    "1-D": Plain((4,)),
    "2-D": Plain((2, 2)),
    "1-D, mixed": Plain((4,), _MIXED),
    "2-D, mixed": Plain((2, 2), _MIXED),
    "2-D, bf16": Plain((2, 2), _BFLOAT16),
    "1-D, accumulation": Plain((4,), microsteps=2),
    "2-D, accumulation": Plain((2, 2), microsteps=2),
    "1-D, not resharded": Plain((4,), reshard=False),
    "1-D, zeroed gradients": Plain((4,), set_to_none=False),
    "1-D, clipped": Plain((4,), clips=True),
    "2-D, clipped": Plain((2, 2), clips=True),
    "one rank a shard": Plain((4, 1)),
    "1-D, offloaded": Plain((4,), offloads=True),
    "1-D, offloaded, accumulation": Plain((4,), microsteps=2, offloads=True),
}
