"""The planner: which partition size, how much memory, what crosses which link, how it scales; without a cluster.

Nothing here needs PyTorch. :func:`plan` is the way in; its answer is made of plain dataclasses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_mics._moved import open_door
from lightning_mics.plan.evaluate import Plan, evaluate
from lightning_mics.plan.hardware import Accelerator, Cluster, Link, Node, find_instance, load_cluster
from lightning_mics.plan.memory import MemoryBreakdown, predict_memory
from lightning_mics.plan.profile import Amount, ModelProfile, Param, Unit
from lightning_mics.plan.search import Choices, Misfit, Planning, search
from lightning_mics.plan.settings import Candidate, Training, Variant
from lightning_mics.plan.simulate import Event, StepTime

if TYPE_CHECKING:
    from lightning_mics.trace.planning import plan

__all__ = [
    "Accelerator",
    "Amount",
    "Candidate",
    "Choices",
    "Cluster",
    "Event",
    "Link",
    "MemoryBreakdown",
    "Misfit",
    "ModelProfile",
    "Node",
    "Param",
    "Plan",
    "Planning",
    "StepTime",
    "Training",
    "Unit",
    "Variant",
    "evaluate",
    "find_instance",
    "load_cluster",
    "plan",
    "predict_memory",
    "search",
]


def __getattr__(name: str) -> Any:
    if name != "plan":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return open_door("plan.plan")  # it traces models, with PyTorch


def __dir__() -> list[str]:
    return __all__
