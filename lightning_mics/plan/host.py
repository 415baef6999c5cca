"""What the host does for a step: it launches operations, and runs FSDP2's part of each pass of a unit.

An accelerator computes what was launched. Its host runs ahead where operations are long; where they are short, the
accelerator waits for Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_mics.plan.hardware import Host
from lightning_mics.plan.profile import Again, ModelProfile, Unit
from lightning_mics.plan.settings import Candidate
from lightning_mics.text import format_number

if TYPE_CHECKING:
    from lightning_mics.plan.evaluate import Plan

# In operations of a forward pass, for which modules run in Python: one that autograd launches by itself, and an
# optimizer's work for a parameter. Of compiled blocks, which fuse operations: the share of launches that is left.
BACKWARD, OPTIMIZER, COMPILED = 0.55, 1.8, 0.25
# A unit's reduction, in its gathers.
REDUCTION = 0.5
_BOUND = 0.05


def forward_seconds(host: Host, unit: Unit, candidate: Candidate, compiled: bool = False) -> float:
    """Returns what the host does for a forward pass of a unit."""
    return _own(candidate) * host.unit + _share(unit, compiled) * host.launch * unit.forward_launches


def backward_seconds(
    host: Host, unit: Unit, candidate: Candidate, again: Again = None, compiled: bool = False
) -> float:
    """Returns what the host does for a backward pass of a unit, with recomputation."""
    launches = BACKWARD * unit.backward_launches + (unit.forward_launches if again else 0)
    gathers = REDUCTION + candidate.reshard_after_forward
    return _own(candidate) * gathers * host.unit + _share(unit, compiled) * host.launch * launches


def optimizer_seconds(host: Host, profile: ModelProfile) -> float:
    """Returns what the host does for an optimizer step."""
    return OPTIMIZER * host.launch * sum(param.trainable for unit in profile.units for param in unit.params)


def _own(candidate: Candidate) -> float:
    return 0.0 if candidate.scheme == "ddp" else 1.0


def _share(unit: Unit, compiled: bool) -> float:
    return COMPILED if compiled and unit.can_checkpoint else 1.0  # blocks alone are compiled


def explain_host(plan: Plan, host: Host) -> str:
    """Says how much of a step its host takes, and what helps where the device waits for it; empty without a figure."""
    time = plan.time
    if not time.host:
        return ""
    figures = f"{format_number(host.launch * 1e6)} us an operation, {format_number(host.unit * 1e6)} us a gather"
    words = f"The host (of kind {host.name}: {figures}) works for {time.host / time.seconds:.0%} of the step"
    if time.idle < _BOUND * time.seconds:
        return f"{words}, ahead of the device."
    return (
        f"{words}, and the device waits {time.idle / time.seconds:.0%} of it for the host alone. Bound by the host: a "
        "larger micro-batch, compiled blocks or fewer, larger units."
    )
