"""Optimizer states at their own scale, beside one process: every layout, with what loops do around a step."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard, sync_gradients
from lightning_mics.config import as_dtype
from lightning_mics.core.loss_scaling import MiCSGradScaler
from lightning_mics.core.runtime import runtime_of
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

BOUND = 1e-5
EPS = 1e-3  # see parity.py
STEPS = 4


class Net(nn.Module):
    """Uneven matrices, some of fewer rows than slices; one element, a scalar; tied, frozen, unused, used at times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 9)
        self.tied, self.norm, self.head, self.unused = (
            nn.Linear(5, 3),
            nn.LayerNorm(9),
            nn.Linear(9, 1),
            nn.Linear(2, 2),
        )
        self.tied.weight = self.second.weight
        self.scale, self.at_times = nn.Parameter(torch.tensor(1.2)), nn.Parameter(torch.ones(1))
        self.norm.bias.requires_grad_(False)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        z = self.head(self.norm(self.third(torch.tanh(self.second(y))))) * self.scale
        z = z + self.tied(y).sum(1, keepdim=True)
        return z + self.at_times * chosen if chosen.any() else z

    def matrices(self) -> list[nn.Parameter]:
        return [self.first.weight, self.third.weight]

    def rest(self) -> list[nn.Parameter]:
        matrices = set(self.matrices())
        return [param for param in self.parameters() if param not in matrices]


def batch(ranks: Sequence[int], microstep: int) -> tuple[Tensor, Tensor]:
    """Returns rows, and which of them use what is used at times: none of the third microstep's."""
    xs = [torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * microstep + rank)) for rank in ranks]
    chosen = [torch.full((4, 1), float((rank + microstep) % 3 == 0 and microstep % 4 != 2)) for rank in ranks]
    return torch.cat(xs), torch.cat(chosen)


@dataclass(frozen=True)
class Layout:
    """Who holds what, and how many microsteps a window has."""

    world: int
    p: int
    q: int
    hierarchical: bool
    accumulate: int

    def microsteps(self, step: int) -> range:
        """Returns those of a window; the last one is incomplete."""
        start = step * self.accumulate
        return range(start, start + self.accumulate - (self.accumulate > 1 and step == STEPS - 1))


class Loop:
    """A loop over the rows of some ranks.

    Args:
        model: A model, sharded or not.
        layout: How.
        ranks: Whose rows it trains on.
    """

    def __init__(self, model: Any, layout: Layout, ranks: Sequence[int]) -> None:
        self.model, self.layout, self.ranks = model, layout, ranks
        self.is_sharded = len(ranks) == 1

    def window(self, step: int, factor: float = 1.0) -> None:
        microsteps = self.layout.microsteps(step)
        for number in microsteps:
            is_last = number + 1 == (step + 1) * self.layout.accumulate
            if self.is_sharded and not is_last:
                with defer_replication_sync(self.model):
                    self.backward(number, factor)
            else:
                self.backward(number, factor)
        if self.is_sharded:
            sync_gradients(self.model)

    def backward(self, number: int, factor: float) -> None:
        loss = self.model(*batch(self.ranks, number)).square().mean() / self.layout.accumulate
        (loss * factor).backward()

    def clip(self, norm_type: float = 2.0) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5, norm_type)


def with_groups(loop: Loop) -> None:
    """AdamW with groups of different rates, of which one joins later, and clipping."""
    model = loop.model
    optimizer = torch.optim.AdamW(model.rest(), lr=0.02, eps=EPS)
    optimizer.add_param_group({"params": model.matrices(), "lr": 0.005, "weight_decay": 0.1})
    for step in range(STEPS):
        loop.window(step)
        loop.clip()
        optimizer.step()
        optimizer.zero_grad()


def with_two_optimizers(loop: Loop) -> None:
    """Two optimizers, one of which waits a window and keeps its gradients; clipping by the largest magnitude."""
    model = loop.model
    first = torch.optim.SGD(model.matrices(), lr=0.05, momentum=0.9, nesterov=True)
    second = torch.optim.AdamW(model.rest(), lr=0.02, eps=EPS)
    for step in range(STEPS):
        loop.window(step)
        loop.clip(float("inf"))
        second.step()
        second.zero_grad()
        if step % 2:
            first.step()
            model.zero_grad()


def with_a_scaler(loop: Loop) -> None:
    """A scaled loss, which overflows in the second window, on the last rank alone."""
    scale = {"device": "cpu", "init_scale": 64.0, "growth_interval": 2}
    scaler = MiCSGradScaler(**scale) if loop.is_sharded else torch.amp.GradScaler(**scale)
    optimizer = torch.optim.AdamW(loop.model.parameters(), lr=0.02, eps=EPS)
    scaler.scale(torch.ones(()))  # it begins with the first
    for step in range(STEPS):
        overflows = step == 1 and loop.layout.world - 1 in loop.ranks
        loop.window(step, float("inf") if overflows else scaler.get_scale())
        scaler.unscale_(optimizer)
        loop.clip()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 64.0


def with_closures(loop: Loop) -> None:
    """Closures, evaluated inside of the step."""
    optimizer = torch.optim.Adagrad(loop.model.parameters(), lr=0.02, initial_accumulator_value=0.1)
    for step in range(STEPS):

        def closure(step: int = step) -> None:
            optimizer.zero_grad()
            loop.window(step)
            loop.clip()

        optimizer.step(closure)


def with_muon(loop: Loop) -> None:
    """Muon over matrices, Adafactor over the rest."""
    first = torch.optim.Muon(loop.model.matrices(), lr=0.02)
    second = torch.optim.Adafactor(loop.model.rest(), lr=0.02)
    for step in range(STEPS):
        loop.window(step)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()


MODES: dict[str, Callable[[Loop], None]] = {
    "groups": with_groups,
    "two optimizers": with_two_optimizers,
    "scaler": with_a_scaler,
    "closures": with_closures,
    "muon": with_muon,
    "offload": with_groups,
}


def train(mode: str, layout: Layout) -> tuple[float, str]:
    """Returns how far weights are from those of one process, and a sum over the bits of all of them."""
    torch.manual_seed(0)
    alone = Net()
    config = MiCSConfig(
        shard_size=layout.p,
        node_size=2,
        optimizer_shard_size=layout.q,
        hierarchical=layout.hierarchical,
        cpu_offload=mode == "offload",
        wrap=nn.Linear,
    )
    model = mics_shard(copy.deepcopy(alone), config)
    MODES[mode](Loop(model, layout, [dist.get_rank()]))
    MODES[mode](Loop(alone, layout, range(layout.world)))
    whole = full_state_dict(model)
    bits = b"".join(value.numpy().tobytes() for value in whole.values())
    return max(weight_differences(whole, alone.state_dict()).values()), hashlib.sha256(bits).hexdigest()


def train_with_masters(cases: list[tuple[str, Layout]], settings: dict[str, Any]) -> list[list[str]]:
    """Returns by case the bits of all float32 weights, with them in shards and with their owners."""
    outcomes = []
    for mode, layout in cases:
        kinds = []
        for place in ("partition", "owners"):
            torch.manual_seed(0)
            config = MiCSConfig(
                shard_size=layout.p,
                node_size=2,
                optimizer_shard_size=layout.q if layout.q > layout.p else "world",
                hierarchical=layout.hierarchical,
                wrap=nn.Linear,
                master_weights=place,
            )
            model = mics_shard(Net(), config.replace(**{"param_dtype": "bfloat16", **settings}))
            MODES[mode](Loop(model, layout, [dist.get_rank()]))
            held = {param.dtype for name, param in model.named_parameters() if param.dim() and "norm" not in name}
            assert held == {torch.float32 if place == "partition" or layout.p == layout.world else model_dtype(model)}
            bits = b"".join(value.numpy().tobytes() for value in full_state_dict(model).values())
            kinds.append(hashlib.sha256(bits).hexdigest())
        outcomes.append(kinds)
    return outcomes


def model_dtype(model: nn.Module) -> torch.dtype | None:
    return as_dtype(runtime_of(model).config.param_dtype)


def train_all(cases: list[tuple[str, Layout]]) -> list[tuple[float, str] | str]:
    outcomes: list[tuple[float, str] | str] = []
    for case in cases:
        try:
            outcomes.append(train(*case))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


def layouts(world: int) -> Iterator[Layout]:
    """Yields every p and q, flat and hierarchical, with and without accumulation."""
    for p in {1, 2, 4, world}:
        for q in range(p, world + 1, p):
            if world % p == 0 and world % q == 0:
                for hierarchical in {False, p > 2}:
                    yield from (Layout(world, p, q, hierarchical, accumulate) for accumulate in (1, 4))


def check(pool: WorkerPool, cases: list[tuple[str, Layout]]) -> float:
    """Trains every case; returns the largest difference."""
    everyones = pool.run(train_all, cases, world_size=cases[0][1].world, timeout=900)
    wrong = {}
    largest = 0.0
    for case, outcomes in zip(cases, zip(*everyones, strict=True), strict=True):
        if not all(isinstance(outcome, tuple) for outcome in outcomes):
            wrong[case] = next(outcome for outcome in outcomes if isinstance(outcome, str))
            continue
        worst, bits = max(outcome[0] for outcome in outcomes), {outcome[1] for outcome in outcomes}
        largest = max(largest, worst)
        if not worst <= BOUND or len(bits) > 1:
            wrong[case] = f"differs by {worst:.1e}, and ranks have {len(bits)} kinds of weights"
    assert not wrong, "\n".join(f"{case}: {what}" for case, what in wrong.items())
    return largest


def test_layouts_train_like_one_process(pool: WorkerPool) -> None:
    check(pool, [(mode, Layout(4, 2, 4, False, 4)) for mode in MODES if mode != "closures"])


def test_masters_with_their_owners_change_no_bit(pool: WorkerPool) -> None:
    layout, narrow = Layout(4, 2, 4, False, 2), {"param_dtype": "float16", "reduce_dtype": None}
    check_masters(pool, [(mode, layout) for mode in ("groups", "two optimizers", "closures", "muon")], {})
    check_masters(pool, [("scaler", layout)], {**narrow, "replication_reduce_dtype": "float16"})


@pytest.mark.campaign
@pytest.mark.parametrize("world", [4, 6, 8])
def test_masters_of_every_layout_change_no_bit(
    pool: WorkerPool, world: int, record_property: Callable[[str, object], None]
) -> None:
    modes = [mode for mode in MODES if mode != "offload"]
    cases = [(mode, layout) for mode in modes for layout in layouts(world) if layout.q > layout.p]
    check_masters(pool, cases, {})
    record_property("figures", f"{len(cases)} runs; weights are bitwise those of float32 shards")


def check_masters(pool: WorkerPool, cases: list[tuple[str, Layout]], settings: dict[str, Any]) -> None:
    everyones = pool.run(train_with_masters, cases, settings, world_size=cases[0][1].world, timeout=900)
    for case, outcomes in zip(cases, zip(*everyones, strict=True), strict=True):
        assert len({bits for kinds in outcomes for bits in kinds}) == 1, case


@pytest.mark.campaign
@pytest.mark.parametrize("world", [4, 6, 8])
def test_every_layout_trains_like_one_process(
    pool: WorkerPool, world: int, record_property: Callable[[str, object], None]
) -> None:
    cases = [(mode, layout) for mode in MODES for layout in layouts(world)]
    largest = check(pool, cases)
    record_property("figures", f"{len(cases)} runs; weights differ from one process by at most {largest:.1e}")
