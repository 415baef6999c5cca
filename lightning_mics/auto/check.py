"""How a prediction compares with what training takes, said once."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from lightning_mics.auto.choice import AutoChoice
from lightning_mics.core.gradients.window import AccumulationWindow, WindowObserver
from lightning_mics.core.log import inform
from lightning_mics.core.resources import Usage
from lightning_mics.text import format_bytes

# Resident memory of a process also moves for reasons of its own: imports, buffers of libraries.
_NOISE = {"cpu": 2**28}
_MALLOC_VARIABLE = "MALLOC_MMAP_THRESHOLD_"
_MORE, _LESS, _TIGHT = 0.10, 0.25, 0.95


class MemoryCheck(WindowObserver):
    """Compares the prediction with what training takes, once, and says on rank 0 how they compare.

    Optimizers create their states in their first step, so the window after it is the first one that has them all.

    Args:
        choice: The decision.
        usage: What measures; made before the model is sharded.
    """

    def __init__(self, choice: AutoChoice, usage: Usage) -> None:
        self._choice, self._usage = choice, usage
        self._windows_left = 1 + choice.num_optimizers

    def begin(self) -> None:
        """Begins to watch; what sharding takes for a while does not count."""
        self._usage.restart_peak()

    def after_window(self, window: AccumulationWindow) -> bool:
        """Returns whether the comparison is done. Collective over the world when it is."""
        self._windows_left -= 1
        if self._windows_left > 0:
            self._usage.restart_peak()  # loading a checkpoint is not what training takes
            return False
        peak = self._usage.peak()
        most = torch.tensor(-1 if peak is None else peak, device=self._usage.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        text = compare(self._choice, int(most), self._usage.device.type) if int(most) >= 0 else ""
        if text:
            inform(text)
        return True


def compare(choice: AutoChoice, measured: int, device_type: str) -> str:
    """Says how a prediction compares with what was measured, and what to do where it was wrong.

    Args:
        choice: The decision.
        measured: Bytes of the rank that took most.
        device_type: Where.

    Returns:
        The message; empty where there is too little memory in it to tell.
    """
    # What the device's context and fragments take is not measured.
    predicted, noise = choice.memory.total - choice.memory.reserve, _NOISE.get(device_type, 0)
    if max(predicted, measured) < 2 * noise:
        return ""
    text = f"shard_size='auto' predicted {format_bytes(predicted)} a rank, measured {format_bytes(measured)}"
    is_tight = measured + choice.memory.reserve > _TIGHT * choice.memory_limit
    if not choice.knows_activations:
        text += ", which has activations in it"
        return f"{text}. {_when_more(choice, True, device_type)}" if is_tight else f"{text}."
    if measured - predicted > _MORE * predicted + noise:
        return f"{text}: more than expected. {_when_more(choice, is_tight, device_type)}"
    if predicted - measured > _LESS * predicted + noise:
        return f"{text}: less than expected. {_when_less(choice, measured / predicted)}"
    return f"{text}."


def _when_more(choice: AutoChoice, is_tight: bool, device_type: str) -> str:
    if device_type == "cpu" and _MALLOC_VARIABLE not in os.environ:
        return f"glibc keeps memory that tensors gave back; {_MALLOC_VARIABLE}=131072 in the environment prevents that."
    steps = ["Pass a sample as large as those that are trained with"]
    larger = [size for size in choice.totals if size > choice.shard_size]
    if is_tight:
        steps += [f"use shard_size={larger[0]}"] if larger else []
        return f"{', or '.join(steps)}: it hardly fits into {format_bytes(choice.memory_limit)}."
    return f"{steps[0]}; it fits into {format_bytes(choice.memory_limit)} all the same."


def _when_less(choice: AutoChoice, ratio: float) -> str:
    for size, total in choice.totals.items():
        if size < choice.shard_size and total * ratio <= choice.memory_limit:
            return f"shard_size={size} would probably fit, with {format_bytes(total * ratio)}, and communicate less."
    return "No smaller partition would fit either."
