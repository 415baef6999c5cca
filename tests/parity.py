"""Training the same thing twice: sharded over a world, and in one process on the global batch.

Losses, norms and weights must agree within a bound that only rounding stays below. AdamW divides gradients by their own
magnitude, so with its default ``eps`` of 1e-8 it makes whole steps out of gradients that are nothing but rounding, and
no step at all of a wrong scale. Here its ``eps`` is far above the rounding of gradients and near their magnitude: its
steps are then a smooth function of the gradients, and its weights are held to the same bound as those of SGD.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from models import build, loss_of, microbatch
from torch import Tensor, nn

from lightning_mics import (
    MiCSConfig,
    clip_grad_norm_,
    defer_replication_sync,
    mics_shard,
    sync_gradients,
)
from lightning_mics.testing import WorkerPool, full_state_dict, relative_difference, weight_differences, worker_device

ROWS_PER_RANK = 2
BOUND = 1e-5


@dataclass(frozen=True)
class Case:
    """One way to train one model.

    Attributes:
        model: A name in ``models.BUILDERS``.
        world: Number of ranks.
        shard: Ranks in a partition group.
        node: Ranks on a node.
        accumulate: Microsteps in a window.
        incomplete: Whether the last window ends one microstep early and is closed by hand.
        optimizer: ``"sgd"`` (momentum and weight decay) or ``"adamw"`` (weight decay, a large ``eps``).
        clip: Largest gradient norm.
        routes: For the routed model, by microstep and replica: the block that the rows go through.
        settings: Further settings of ``MiCSConfig``.
    """

    model: str
    world: int
    shard: int
    node: int
    accumulate: int = 1
    incomplete: bool = False
    optimizer: str = "sgd"
    clip: float | None = None
    routes: tuple[tuple[int, ...], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    steps: int = 5

    def __str__(self) -> str:
        parts = [f"{self.model}, world {self.world} = {self.world // self.node} x {self.node}, shard {self.shard}"]
        parts += [f"accumulate {self.accumulate}"] if self.accumulate > 1 else []
        parts += [f"{name}={value}" for name, value in self.settings]
        return ", ".join([*parts, self.optimizer, *(["incomplete"] if self.incomplete else [])])

    @property
    def reference(self) -> Case:
        """What remains of the case in one process."""
        return replace(self, shard=1, node=1, settings=(), routes=self.routes)


@dataclass(frozen=True)
class Outcome:
    """What training gave: losses by microstep, norms by step, weights at the end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    ungraded: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """How far the sharded run is from the single process."""

    case: Case
    loss: float
    norm: float
    weight: float
    worst: str
    same_ungraded: bool

    def check(self) -> None:
        assert self.loss <= BOUND, f"{self.case}: losses differ by {self.loss:.1e}"
        assert self.norm <= BOUND, f"{self.case}: gradient norms differ by {self.norm:.1e}"
        assert self.same_ungraded, f"{self.case}: other parameters are without gradient"
        assert self.weight <= BOUND, f"{self.case}: {self.worst} differs by {self.weight:.1e}"


def rows_of(case: Case, microstep: int) -> Tensor:
    """Returns the global batch of a microstep."""
    rows = microbatch(case.model, microstep, case.world * ROWS_PER_RANK)
    if case.model != "routed":
        return rows
    by_replica = torch.tensor(case.routes[microstep % len(case.routes)])
    route = by_replica.repeat_interleave(len(rows) // len(by_replica))
    # Single ranks of a partition may differ in the use of a parameter, though not of a unit.
    shifted = (torch.arange(len(rows)) // ROWS_PER_RANK + microstep) % 3 == 0
    return torch.cat([rows, route[:, None], shifted[:, None]], 1)


def make_optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01, eps=1e-3)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def num_microsteps(case: Case, step: int) -> int:
    return case.accumulate - (case.incomplete and step == case.steps - 1)


def ungraded(model: nn.Module) -> list[str]:
    return [name for name, param in model.named_parameters() if param.grad is None]


@functools.lru_cache(maxsize=4)
def train_alone(case: Case) -> Outcome:
    model = build(case.model)
    optimizer = make_optimizer(case, model)
    losses, norms, without = [], [], []
    for step in range(case.steps):
        for index in range(num_microsteps(case, step)):
            loss = loss_of(case.model, model, rows_of(case, step * case.accumulate + index))
            (loss / case.accumulate).backward()
            losses.append(loss.item())
        without += ungraded(model)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), case.clip or 1e9).item())
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Outcome(losses, norms, weights, without)


def train_sharded(case: Case) -> Outcome:
    rank = dist.get_rank()
    config = MiCSConfig(shard_size=case.shard, node_size=case.node, **dict(case.settings))
    # Only rank 0 starts from the weights of the reference: its values must win.
    device = worker_device()
    model = mics_shard(build(case.model, seed=rank), config, device_type=device.type)
    optimizer = make_optimizer(case, model)
    losses, norms, without = [], [], []
    for step in range(case.steps):
        for index in range(num_microsteps(case, step)):
            rows = rows_of(case, step * case.accumulate + index)[rank * ROWS_PER_RANK : (rank + 1) * ROWS_PER_RANK]
            rows = rows.to(device)
            with defer_replication_sync(model, enabled=index + 1 < case.accumulate):
                loss = loss_of(case.model, model, rows)
                (loss / case.accumulate).backward()
            losses.append(loss.item())
        sync_gradients(model)
        without += ungraded(model)
        norms.append(clip_grad_norm_(model, case.clip or 1e9).item())
        optimizer.step()
        optimizer.zero_grad()
    mean = torch.tensor(losses, dtype=torch.float64, device=device)
    dist.all_reduce(mean)
    return Outcome((mean / case.world).tolist(), norms, full_state_dict(model), without)


def comparison(case: Case, actual: Outcome, expected: Outcome) -> Comparison:
    differences = weight_differences(actual.weights, expected.weights)
    worst = max(differences, key=differences.__getitem__)
    return Comparison(
        case=case,
        loss=max(map(relative_difference, actual.losses, expected.losses)),
        norm=max(map(relative_difference, actual.norms, expected.norms)),
        weight=differences[worst],
        worst=worst,
        same_ungraded=actual.ungraded == expected.ungraded and actual.weights.keys() == expected.weights.keys(),
    )


def train_all(cases: list[Case]) -> list[Outcome]:
    return [train_sharded(case) for case in cases]


def check(
    pool: WorkerPool,
    cases: Iterable[Case],
    train: Callable[[list[Case]], list[Outcome]] = train_all,
    backend: str = "gloo",
) -> None:
    """Trains every case on the ranks of its world, and once in this process; checks each rank's outcome."""
    cases = list(cases)
    for outcomes in pool.run(train, cases, world_size=cases[0].world, timeout=120, backend=backend):
        for case, outcome in zip(cases, outcomes, strict=True):
            comparison(case, outcome, train_alone(case.reference)).check()


def layouts(world: int) -> list[tuple[int, int]]:
    """Returns ``(shard, node)`` for shard sizes 1, 2, 4, 8 on 1, 2 and 4 nodes, where they fit."""
    nodes = [world // n for n in (1, 2, 4) if world % n == 0]
    return [(p, node) for node in nodes for p in (1, 2, 4, 8) if p <= world and (node % p == 0 or p % node == 0)]
