"""Measuring one contender from inside its processes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_mics.core._torch import held_gradients, local_tensor
from lightning_mics.core.gradients.window import put_rows
from lightning_mics.metrics import CommLedger

_COUNTER = Path("/sys/class/net/eth0/statistics/tx_bytes")


def sent_bytes() -> int:
    """Returns the bytes that left this node so far, by the kernel's counter; 0 on a node without a network."""
    return int(_COUNTER.read_text()) if _COUNTER.exists() else 0


class StepClock:
    """Times optimizer steps and counts what they send.

    A loop tells it when a window of microsteps begins and when the last one has ended. Windows before ``warmup`` are
    not measured. What is sent is counted from the second window on, as the first one may send what no other does; rows
    that are under way beside a step have arrived where counting begins and ends. With one window of warm-up this is
    where timing begins, too, and takes time.

    Args:
        warmup: Windows to leave out.
        steps: Windows to measure.
        synchronize: Waits until the device has done what it was told to.
    """

    def __init__(self, warmup: int, steps: int, synchronize: Callable[[], None] = lambda: None) -> None:
        self.warmup, self.steps = warmup, steps
        self._synchronize = synchronize
        self.times: list[float] = []
        self.losses: list[Tensor] = []
        self.gradient_bytes = 0
        self.state_bytes = 0
        self.ledger: CommLedger | None = None
        self.hops: defaultdict[str, float] = defaultdict(float)
        self._window = 0
        self._sent = [0, 0]
        self._counted_from = min(1, warmup)

    @property
    def num_windows(self) -> int:
        """Windows that the loop has to run."""
        return self.warmup + self.steps

    @property
    def is_measuring(self) -> bool:
        """Whether the window in progress counts."""
        return self.warmup < self._window <= self.num_windows

    def window_begins(self) -> None:
        """Notes the beginning of a window, which is the end of the one before."""
        if self._window == self.warmup:
            self.hops.clear()
            dist.barrier()
        if self._window >= self.warmup:
            self._note_time()
        if self._window == self._counted_from:
            if self.ledger is not None:
                self.ledger.reset()
            self._sent[0] = _sent_so_far()
        self._window += 1

    def ends(self) -> None:
        """Notes the end of the last window."""
        dist.barrier()
        self._note_time()
        self._window += 1
        self._sent[1] = _sent_so_far()

    def _note_time(self) -> None:
        self._synchronize()
        self.times.append(time.perf_counter())

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of each measured step."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def sent_a_step(self) -> float:
        """Bytes that left this node in a step."""
        return (self._sent[1] - self._sent[0]) / self.counted_windows

    @property
    def counted_windows(self) -> int:
        """Windows whose bytes and collectives are counted."""
        return self.num_windows - self._counted_from

    def note(self, hop: str, seconds: float) -> None:
        """Adds time for which this rank's main thread waited."""
        if self.is_measuring:
            self.hops[hop] += seconds

    def hop_seconds(self) -> dict[str, float]:
        """Returns where the time of a step went."""
        spent = {hop: seconds / self.steps for hop, seconds in self.hops.items()}
        mean = sum(self.step_seconds) / self.steps
        return {**spent, "other": max(0.0, mean - sum(spent.values()))}


def _sent_so_far() -> int:
    put_rows()
    dist.barrier()
    return sent_bytes()


def gradient_bytes(model: nn.Module) -> int:
    """Returns the memory of all gradients that a rank holds, sharded, whole and partial ones."""
    tensors = [param.grad for param in model.parameters() if param.grad is not None]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            tensors += held_gradients(module)
    return sum({local.data_ptr(): local.nbytes for local in map(local_tensor, tensors)}.values())


def state_bytes(model: nn.Module, optimizers: Iterable[Optimizer]) -> int:
    """Returns the memory of the parameters and optimizer states that a rank holds."""
    tensors: list[Any] = list(model.parameters())
    for optimizer in optimizers:
        own = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's, of this rank's parameters
        tensors += [value for states in own.state.values() for value in states.values() if isinstance(value, Tensor)]
    return sum({local.data_ptr(): local.nbytes for local in map(local_tensor, tensors) if local.numel()}.values())
