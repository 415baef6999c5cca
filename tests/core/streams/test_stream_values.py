"""Real ranks, each with a stand-in device: right values, and no races, whatever users do to gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from models import nothing, replace, scale
from stream_clocks import Settings
from stream_world import pretended_device_of_many
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard, sync_gradients
from lightning_mics.core._torch import forget_dtensor_meshes
from lightning_mics.testing import WorkerPool

WIDTH, RANKS = 32, 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(3))

    def forward(self, inputs: Tensor, uses_second: bool = True) -> Tensor:
        inputs = self.first(inputs)
        return self.third(self.second(inputs) if uses_second else inputs)


def everywhere(rank: int) -> bool:
    return True


def on_first_rank(rank: int) -> bool:
    return rank == 0


CASES = [(nothing, everywhere), (scale, everywhere), (replace, everywhere), (nothing, on_first_rank)] + 3 * [
    (scale, everywhere)
]


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net().to("cuda")


def inputs(case: int, microstep: int, rank: int) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(100 * case + 10 * microstep + rank)).to("cuda")


def largest_error(model: nn.Module, reference: nn.Module) -> float:
    worst = 0.0
    for param, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert isinstance(param.grad, DTensor) and expected.grad is not None
        error = (param.grad.to_local() - expected.grad).abs().max() / expected.grad.abs().max()
        worst = max(worst, error.item())
    return worst


def run_window(
    model: nn.Module, case: int, edit: Callable[[nn.Module], None], uses_second: Callable[[int], bool]
) -> None:
    for microstep in range(2):
        with defer_replication_sync(model):
            rank = dist.get_rank()
            (model(inputs(case, microstep, rank), uses_second(rank)).square().mean() / 2).backward()
    edit(model)
    sync_gradients(model)


def expect(reference: nn.Module, case: int, edit: Callable[[nn.Module], None], uses: Callable[[int], bool]) -> None:
    for microstep in range(2):
        for rank in range(RANKS):
            loss = reference(inputs(case, microstep, rank), uses(rank)).square().mean()
            (loss / (2 * RANKS)).backward()
    edit(reference)


def train(left_out: frozenset[str] = frozenset()) -> tuple[list[float], list[str], list[str]]:
    """Returns the errors of some windows, the races, and the waits of the package."""
    with pretended_device_of_many(Settings(left_out=left_out)) as checker:
        model, reference = build(), build()
        config = MiCSConfig(shard_size=1, node_size=1, wrap=["Sequential"], verify=False)
        mics_shard(model, config, device_type="cuda")
        errors = []
        for case, (edit, uses_second) in enumerate(CASES):
            with checker:
                run_window(model, case, edit, uses_second)
            expect(reference, case, edit, uses_second)
            errors.append(largest_error(model, reference))
            model.zero_grad()
            reference.zero_grad()
    forget_dtensor_meshes()
    return errors, list(map(str, checker.races)), checker.timeline.waits.of_package


def train_without(part: str) -> tuple[list[str], list[str]]:
    """Returns what is found when the waits whose sites have a part are left out, and these."""
    sites = [site for site in train()[2] if part in site]
    return train(frozenset(sites))[1], sites


def test_edited_gradients_are_right_and_in_order(pool: WorkerPool) -> None:
    for errors, races, waits in pool.run(train, world_size=RANKS):
        assert max(errors) < 1e-5, errors
        assert not races, "\n".join(races)
        assert waits


@pytest.mark.parametrize("part", ["(launch)", "(wait) <"])
def test_without_the_waits_of_hop_two_they_are_not(pool: WorkerPool, part: str) -> None:
    for races, sites in pool.run(train_without, part, world_size=RANKS):
        assert sites
        assert races
