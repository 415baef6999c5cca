"""The decision: ranks exchange what they predict, and decide alike."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_mics.auto.forecast import Forecast
from lightning_mics.auto.sample import Sample
from lightning_mics.config import MiCSConfig
from lightning_mics.core.mesh import communication_device
from lightning_mics.core.replicas import require_agreement
from lightning_mics.core.resources import bytes_on, device_memory, free_host_memory
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.memory import MemoryBreakdown
from lightning_mics.plan.search import usable_memory
from lightning_mics.text import format_bytes
from lightning_mics.topology import ClusterTopology


@dataclass(frozen=True, kw_only=True)
class AutoChoice:
    """What was decided, and why.

    Attributes:
        shard_size: The partition size.
        memory: What a rank is predicted to need, by part.
        memory_limit: What it has, in bytes.
        totals: The predicted bytes of all partition sizes that work on the cluster.
        notes: What was assumed.
        knows_activations: Whether activations are part of the prediction.
        num_optimizers: Number of optimizers.
    """

    shard_size: int
    memory: MemoryBreakdown
    memory_limit: int
    totals: Mapping[int, float]
    notes: Sequence[str] = ()
    knows_activations: bool = True
    num_optimizers: int = 1

    def __str__(self) -> str:
        needed, limit = format_bytes(self.memory.total), format_bytes(self.memory_limit)
        text = f"shard_size='auto' chose {self.shard_size}: a rank needs {needed} of {limit} ({_parts(self.memory)})"
        smaller = [size for size in self.totals if size < self.shard_size]
        if smaller:
            text += f"; shard_size={smaller[-1]} would need {format_bytes(self.totals[smaller[-1]])}"
        return " ".join([text + ".", *self.notes])


def _parts(memory: MemoryBreakdown) -> str:
    parts = {name.replace("_", " "): size for name, size in memory.parts().items() if size >= memory.total / 100}
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())


def choose_shard_size(
    model: nn.Module,
    config: MiCSConfig,
    topology: ClusterTopology,
    *,
    device_type: str,
    optimizers: Sequence[Optimizer | type[Optimizer] | str] = (),
    sample: Any = None,
) -> AutoChoice:
    """Returns the smallest partition size that fits. Collective over the world; the answer is the same on every rank.

    Args:
        model: The model, not sharded; its parameters may be on the meta device.
        config: The settings, with ``shard_size="auto"``, the same on every rank but for ``memory_limit``.
        topology: The cluster.
        device_type: ``"cuda"`` or ``"cpu"``.
        optimizers: Its optimizers, or the class or name of one; AdamW is assumed if none is known.
        sample: A micro-batch, or a :class:`Sample`.

    Raises:
        MiCSConfigError: On every rank, if no size fits: with the closest one and what would make it fit.
    """
    forecast: Forecast | None = None
    try:
        view = _look(model, config, device_type)
        taken = sample if sample is None or isinstance(sample, Sample) else Sample.of(sample)
        forecast = Forecast(model, config, topology, device_type, optimizers, taken)
        view = replace(view, needs=forecast.needs(), knows_activations=forecast.knows_activations)
    except Exception as error:  # the others wait for this rank
        view = _View(problem=f"{type(error).__name__}: {error}")
    views = _exchange(view)
    assert forecast is not None  # where there is none, the exchange has told everybody why
    limit = _least_memory(views)
    needs = {size: max((view.needs[size] for view in views), key=lambda m: m.total) for size in views[0].needs}
    knows_activations = all(view.knows_activations for view in views)
    usable = int(usable_memory(limit, knows_activations=knows_activations))
    fitting = [size for size, memory in needs.items() if memory.total <= usable]
    require_agreement({"what shard_size='auto' decides": (fitting[:1], limit)}, communication_device(device_type))
    if not fitting:
        raise MiCSConfigError(forecast.explain(needs, usable))
    advice = forecast.advice(fitting[0], usable)
    return AutoChoice(
        shard_size=fitting[0],
        memory=needs[fitting[0]],
        memory_limit=limit,
        totals={size: memory.total for size, memory in needs.items()},
        notes=(*forecast.notes, *([] if advice is None else [advice])),
        knows_activations=knows_activations,
        num_optimizers=max(1, len(optimizers)),
    )


@dataclass(frozen=True, kw_only=True)
class _View:
    """What one rank knows.

    The ranks of a machine divide ``memory`` where it is shared; ``own`` is what the rank's model takes of it already.
    ``problem`` says why it knows nothing.
    """

    host: str = field(default_factory=socket.gethostname)
    memory: int = 0
    is_shared: bool = False
    own: int = 0
    needs: Mapping[int, MemoryBreakdown] = field(default_factory=dict)
    knows_activations: bool = False
    problem: str = ""


def _look(model: nn.Module, config: MiCSConfig, device_type: str) -> _View:
    """Looks how much memory there is."""
    own, others = bytes_on(model, device_type), 0
    if device_type != "cpu":
        allocated = torch.get_device_module(device_type).memory_allocated()
        others = max(0, allocated - own)  # other models of this process, for example
    is_shared = config.memory_limit is None and device_type == "cpu"
    if config.memory_limit is not None:
        memory = int(config.memory_limit)
    else:
        memory = free_host_memory() if is_shared else device_memory(communication_device(device_type))
    return _View(memory=memory - others, is_shared=is_shared, own=own)


def _exchange(view: _View) -> list[_View]:
    views: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(views, view)
    for other in views:
        if other.problem:
            raise MiCSConfigError(f"shard_size='auto' cannot plan this model: {other.problem} Give a number instead.")
    return views


def _least_memory(views: Sequence[_View]) -> int:
    ranks_on = Counter(view.host for view in views)
    return min(view.memory // ranks_on[view.host] + view.own if view.is_shared else view.memory for view in views)
