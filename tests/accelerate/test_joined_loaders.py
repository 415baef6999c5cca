"""Accelerate on data that differs between ranks: they end together, and resume at the sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import DataLoaderConfiguration
from accelerate_tools import make_accelerator
from joined_tools import ENDS, LENGTHS, MODEL, Stream, make_optimizer, mean_of_present, num_steps, stateful, train_alone
from models import build, loss_of, microbatch
from torch.utils.data import DataLoader
from works import works

from lightning_mics import JoinedLoader, has_data
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

ACCUMULATE = 3


class Run:
    """A training of streams of this rank, or of shared rows of which ranks have different numbers of batches."""

    def __init__(self, how: str, shard_size: int, lengths: tuple[int, ...] = LENGTHS, num_workers: int = 0) -> None:
        config = DataLoaderConfiguration(use_stateful_dataloader=True, even_batches=False)
        settings = {"shard_size": shard_size, "node_size": 2, "uneven_inputs": how}
        self.accelerator = make_accelerator(ACCUMULATE, settings, dataloader_config=config)
        model = build(MODEL)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model))
        rank = dist.get_rank()
        stream = stateful(Stream(rank, lengths[rank]), num_workers=num_workers)
        self.loader = self.accelerator.prepare(JoinedLoader(stream, self.model))
        self.losses: list[float] = []
        self.counts: list[bool] = []
        self.seen: list[float] = []
        self.num_steps = 0

    def train(self, epochs: int, save: tuple[int, int, Path] | None = None) -> int:
        """Trains, and saves behind a microstep; returns how many rows had counted until then."""
        num_seen = -1
        for epoch in range(epochs):
            for index, batch in enumerate(self.loader):
                with self.accelerator.accumulate(self.model):
                    loss = loss_of(MODEL, self.model, batch)
                    self.accelerator.backward(loss)
                    self.num_steps += self.accelerator.sync_gradients
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.losses.append(loss.item())
                self.counts.append(has_data(self.model))
                self.seen += [round(batch.sum().item(), 4)] * self.counts[-1]
                if save is not None and (epoch, index) == save[:2]:
                    self.accelerator.save_state(save[2])
                    num_seen = len(self.seen)
        return num_seen


def check_parity(how: str, shard_size: int, *lengths: int) -> None:
    run, total = Run(how, shard_size, lengths), num_steps(lengths, how)
    run.train(2)
    expected, alone = train_alone(lengths, how, ACCUMULATE, epochs=2)
    assert run.num_steps == 2 * -(-total // ACCUMULATE)
    torch.testing.assert_close(mean_of_present(run.losses, run.counts), alone, rtol=1e-5, atol=1e-6)
    assert max(weight_differences(full_state_dict(run.model), expected.state_dict()).values()) < 1e-5


@works("Training loops", "Accelerate: streams of other lengths on each rank (`uneven_inputs`, `JoinedLoader`)")
@pytest.mark.parametrize(("how", "shard_size", "lengths"), ENDS)
def test_training_equals_one_process(pool: WorkerPool, how: str, shard_size: int, lengths: tuple[int, ...]) -> None:
    pool.run(check_parity, how, shard_size, *lengths, world_size=4)


def train_shared_rows(how: str) -> None:
    """Ten batches of shared rows: two ranks have three, and two have two."""
    settings = {"shard_size": 2, "uneven_inputs": how}
    accelerator = make_accelerator(settings=settings, dataloader_config=DataLoaderConfiguration(even_batches=False))
    rows, model, alone = microbatch(MODEL, 0, 10), build(MODEL), build(MODEL)
    model, optimizer, batches = accelerator.prepare(model, make_optimizer(model), DataLoader(rows, batch_size=1))  # type: ignore[arg-type]
    assert len(batches) == (2 if how == "shortest" else 3)
    with accelerator.join_uneven_inputs([model]):
        for batch in accelerator.skip_first_batches(batches, 1):
            accelerator.backward(loss_of(MODEL, model, batch))
            optimizer.step()
            optimizer.zero_grad()
    single = make_optimizer(alone)
    for part in [rows[4:8], rows[8:]][: 1 if how == "shortest" else 2]:
        loss_of(MODEL, alone, part).backward()
        single.step()
        single.zero_grad()
    assert max(weight_differences(full_state_dict(model), alone.state_dict()).values()) < 1e-5
    model.eval()
    with accelerator.join_uneven_inputs([model]), torch.no_grad():
        mine = [loss_of(MODEL, model, batch) for batch in batches]
    assert len(mine) == len(range(dist.get_rank(), 10, 4))


@works("Training loops", "`accelerator.join_uneven_inputs` in training, with `uneven_inputs`")
@pytest.mark.parametrize("how", ["shortest", "longest"])
def test_uneven_batches_of_shared_rows(pool: WorkerPool, how: str) -> None:
    pool.run(train_shared_rows, how, world_size=4)


def resume(folder: Path, how: str, num_workers: int, places: list[tuple[int, int]]) -> None:
    for epoch, index in places:
        path = folder / f"{epoch}-{index}"
        whole = Run(how, 2, num_workers=num_workers)
        num_seen = whole.train(2, (epoch, index, path))
        resumed = Run(how, 2, num_workers=num_workers)
        resumed.accelerator.load_state(path)
        resumed.train(2 - epoch)
        assert resumed.seen == whole.seen[num_seen:], (epoch, index, whole.seen, num_seen, resumed.seen)
        if how == "shortest":  # it ended a window early, and gradients of a window are not saved
            continue
        pairs = zip(full_state_dict(whole.model).values(), full_state_dict(resumed.model).values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


@works("Savers", "Accelerate: `use_stateful_dataloader` resumes in mid-epoch, each rank at its own sample")
@pytest.mark.parametrize(
    ("how", "places", "num_workers"),
    [
        ("longest", [(0, 5), (1, 2)], 0),
        ("longest", [(0, 5)], 2),
        ("shortest", [(0, 1)], 0),
        pytest.param("shortest", [(0, 1)], 2, marks=pytest.mark.campaign),
    ],
)
def test_resuming_goes_on_at_the_sample(
    pool: WorkerPool, tmp_path: Path, how: str, places: Any, num_workers: int
) -> None:
    pool.run(resume, tmp_path, how, num_workers, places, world_size=4, timeout=240)
