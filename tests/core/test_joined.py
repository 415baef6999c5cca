"""Ranks with different numbers of training batches end together, in a loop of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from joined_tools import LENGTHS, MODEL, Stream, make_optimizer, mean_of_present, num_steps, stateful, train_alone
from models import build, loss_of
from torch import nn
from works import works

from lightning_mics import (
    JoinedLoader,
    MiCSConfig,
    MiCSError,
    defer_replication_sync,
    has_data,
    load_checkpoint,
    mics_shard,
    save_checkpoint,
)
from lightning_mics.core.joined import attendance_of
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences


def train(model: nn.Module, batches: JoinedLoader, accumulate: int, epochs: int = 1) -> tuple[list[float], list[bool]]:
    optimizer, losses, counts = make_optimizer(model), [], []
    for _ in range(epochs):
        for index, batch in enumerate(batches):
            is_boundary = (index + 1) % accumulate == 0 or batches.is_last
            with defer_replication_sync(model, enabled=not is_boundary):
                loss = loss_of(MODEL, model, batch)
                (loss / accumulate).backward()
            losses.append(loss.item())
            counts.append(has_data(model))
            if is_boundary:
                optimizer.step()
                optimizer.zero_grad()
    return losses, counts


def check_parity(
    lengths: tuple[int, ...], how: Any, shard_size: int, settings: dict[str, Any], accumulate: int = 3
) -> None:
    rank, epochs = dist.get_rank(), 2
    model = mics_shard(build(MODEL), MiCSConfig(shard_size=shard_size, node_size=2, uneven_inputs=how, **settings))
    loader = stateful(Stream(rank, lengths[rank]))
    losses, counts = train(model, JoinedLoader(loader, model), accumulate, epochs)
    expected, alone = train_alone(lengths, how, accumulate, epochs)
    assert sum(counts) == epochs * min(lengths[rank], num_steps(lengths, how))
    torch.testing.assert_close(mean_of_present(losses, counts), alone, rtol=1e-5, atol=1e-6)
    assert max(weight_differences(full_state_dict(model), expected.state_dict()).values()) < 1e-5
    assert has_data(model)


@works("Training loops", "Training streams of other lengths on each rank, in a loop of one's own (`JoinedLoader`)")
@pytest.mark.parametrize("shard_size", [2, 4])
@pytest.mark.parametrize("how", ["shortest", "longest"])
@pytest.mark.parametrize("lengths", [LENGTHS, (0, 4, 2, 0)], ids=str)
def test_training_equals_one_process(pool: WorkerPool, lengths: tuple[int, ...], how: str, shard_size: int) -> None:
    pool.run(check_parity, lengths, how, shard_size, {}, world_size=4)


SETTINGS: list[dict[str, Any]] = [
    {"optimizer_shard_size": "world"},
    {"ignore": ["narrow.*", "*.bias"]},
    {"reshard_after_forward": False, "replication_reduce_dtype": None, "reduce_dtype": "float64"},
]


def check_settings(cases: list[dict[str, Any]]) -> None:
    for settings in cases:
        check_parity(LENGTHS, "longest", 2, settings, accumulate=2)


def test_it_does_under_other_settings(pool: WorkerPool) -> None:
    pool.run(check_settings, SETTINGS, world_size=4)


def stand_in_badly(ignore: tuple[str, ...]) -> None:
    """Rank 1 runs out at once; what stands in takes ways that nobody else takes, to infinity."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = build("routed")
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    mics_shard(model, MiCSConfig(shard_size=2, uneven_inputs="longest", ignore=ignore))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    rows = [torch.cat([torch.full((1, 5), float(index)), torch.tensor([[-1.0, 0.0]])], 1) for index in range(3)]
    num_standing_in = 0
    for batch in JoinedLoader(rows if rank != 1 else [], model):
        if not has_data(model):
            num_standing_in += 1
            batch[0, 6] = 1  # rows are shifted by a parameter that other ranks do not use
        loss = loss_of("routed", model, batch)
        (loss if has_data(model) else loss * float("inf")).backward()
        assert model.shift[0].grad is None, "what only a stand-in used has a gradient"
        assert torch.isfinite(model.first.weight.grad.full_tensor()).all()
        optimizer.step()
        optimizer.zero_grad()
    assert num_standing_in == 3 * (rank == 1)
    weights = full_state_dict(model)
    torch.testing.assert_close(weights["shift.0"], start["shift.0"])
    assert not torch.equal(weights["first.weight"], start["first.weight"])


@pytest.mark.parametrize("ignore", [(), ("shift.*",)], ids=["sharded", "whole"])
def test_a_stand_in_counts_nothing(pool: WorkerPool, ignore: tuple[str, ...]) -> None:
    pool.run(stand_in_badly, ignore, world_size=4)


def run_out() -> None:
    model = mics_shard(build(MODEL), MiCSConfig(shard_size=2))
    train(model, JoinedLoader(stateful(Stream(dist.get_rank(), LENGTHS[dist.get_rank()])), model), 1)


def test_an_error_names_who_ran_out(pool: WorkerPool) -> None:
    for failure in pool.attempt(run_out, world_size=4):
        assert failure.kind == MiCSError.__name__
        assert "1 of 4 ranks (the first is rank 3) ran out of batches after 3" in failure.message
        assert "uneven_inputs='shortest' or 'longest'" in failure.message


def count_messages() -> None:
    rank = dist.get_rank()
    model = mics_shard(build(MODEL), MiCSConfig(shard_size=2, uneven_inputs="shortest"))
    attendance = attendance_of(model)
    for loader, expected in ((list(range(5)), 0), (list(range(5 + rank)), 6), (Stream(rank, 5), 6)):
        before = attendance._call.begun
        joined = JoinedLoader(loader, model)
        assert len([*joined]) == 5
        assert attendance._call.begun - before == expected
    assert len(JoinedLoader(list(range(5 + rank)), model)) == 5


def test_a_microstep_costs_one_message_and_equal_lengths_none(pool: WorkerPool) -> None:
    pool.run(count_messages, world_size=4)


def save_places(folder: Path) -> None:
    rank = dist.get_rank()
    model = mics_shard(build(MODEL), MiCSConfig(shard_size=2))
    loader = stateful(Stream(rank, 5 + rank))
    batches = iter(loader)
    seen = [next(batches) for _ in range(rank + 1)]
    save_checkpoint(folder / "run", model, dataloaders=loader)
    resumed = stateful(Stream(rank, 5 + rank))
    load_checkpoint(folder / "run", model, dataloaders=resumed)
    assert torch.equal(torch.cat([*seen, *resumed]), torch.cat([*stateful(Stream(rank, 5 + rank))]))
    load_checkpoint(folder / "run", model)


def load_places(folder: Path, num_loaders: int) -> None:
    model = mics_shard(build(MODEL), MiCSConfig(shard_size=2))
    loaders = [stateful(Stream(dist.get_rank(), 5)) for _ in range(num_loaders)]
    load_checkpoint(folder / "run", model, dataloaders=loaders)


def test_places_of_another_number_of_ranks_or_loaders_are_refused(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(save_places, tmp_path, world_size=4)
    for failure in pool.attempt(load_places, tmp_path, 1, world_size=2):
        assert failure.kind == "CheckpointError"
        assert "data loaders on 4 ranks, and here are 2" in failure.message
    for failure in pool.attempt(load_places, tmp_path, 2, world_size=4):
        assert failure.kind == "CheckpointError"
        assert "the places of 1 data loader(s), and 2 are to be taken" in failure.message
