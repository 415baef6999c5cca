"""The Trainer on data that differs between ranks: they end together, and resume at the sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from joined_tools import ENDS, LENGTHS, MODEL, Stream, make_optimizer, num_steps, stateful, train_alone
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback
from lightning_tools import make_trainer, where
from models import build, loss_of, microbatch
from torch import Tensor
from torch.utils.data import DistributedSampler
from works import works

from lightning_mics import MiCSStrategy, has_data
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences


class Model(pl.LightningModule):
    """Notes the rows that count."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build(MODEL)
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if has_data(self):
            self.seen.append(round(batch.sum().item(), 4))
        return loss_of(MODEL, self.net, batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", loss_of(MODEL, self.net, batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self)


def trainer_of(shard_size: int, how: str, *callbacks: Callback, **settings: Any) -> pl.Trainer:
    strategy = MiCSStrategy(shard_size=shard_size, node_size=2, uneven_inputs=how)
    return make_trainer(
        strategy=strategy,
        use_distributed_sampler=False,
        max_epochs=2,
        callbacks=[*callbacks],
        **settings,
    )


def check_parity(how: str, shard_size: int, *lengths: int) -> None:
    rank, model = dist.get_rank(), Model()
    loader = stateful(Stream(rank, lengths[rank]))
    validation = torch.utils.data.DataLoader(microbatch(MODEL, 0, rank + 1), batch_size=1)  # type: ignore[arg-type]
    trainer = trainer_of(shard_size, how, accumulate_grad_batches=3, val_check_interval=min(lengths) or None)
    trainer.fit(model, loader, validation)
    expected, _ = train_alone(lengths, how, accumulate=3, epochs=2)
    assert len(model.seen) == 2 * min(lengths[rank], num_steps(lengths, how))
    assert trainer.fit_loop.total_batch_idx + 1 == 2 * num_steps(lengths, how)
    assert trainer.global_step == 2 * -(-num_steps(lengths, how) // 3)
    assert max(weight_differences(full_state_dict(model.net), expected.state_dict()).values()) < 1e-5


@works("Training loops", "Trainer: streams of other lengths on each rank (`uneven_inputs`)")
@pytest.mark.parametrize(("how", "shard_size", "lengths"), ENDS)
def test_training_equals_one_process(pool: WorkerPool, how: str, shard_size: int, lengths: tuple[int, ...]) -> None:
    pool.run(check_parity, how, shard_size, *lengths, world_size=4)


class SavesAt(Callback):
    """Saves a checkpoint behind a microstep, and notes how many rows had counted until then."""

    def __init__(self, path: Path, epoch: int, index: int) -> None:
        self._path, self._at, self.num_seen = path, (epoch, index), -1

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self._at:
            trainer.save_checkpoint(self._path)
            self.num_seen = len(module.seen)


def make_loader(kind: str, num_workers: int) -> Any:
    rank = dist.get_rank()
    if kind == "stream of equal lengths":
        return stateful(Stream(rank, 4), num_workers=num_workers)
    if kind == "stream":
        return stateful(Stream(rank, LENGTHS[rank]), num_workers=num_workers)
    rows = microbatch(MODEL, 0, 40)
    if kind == "shuffled":
        sampler: Any = DistributedSampler(rows, shuffle=True)  # type: ignore[arg-type]
        return stateful(rows, sampler=sampler, num_workers=num_workers)  # type: ignore[arg-type]
    mine = rows[: LENGTHS[rank]] + rank
    return stateful(mine, num_workers=num_workers)  # type: ignore[arg-type]


def resume(folder: Path, kind: str, how: str, num_workers: int, places: list[tuple[int, int]]) -> None:
    for place in places:
        path = folder / f"{place[0]}-{place[1]}.ckpt"
        saves, whole = SavesAt(path, *place), Model()
        settings: dict[str, Any] = {"val_check_interval": 0.5} if kind == "unequal" else {}
        trainer_of(2, how, saves, accumulate_grad_batches=2, **settings).fit(whole, make_loader(kind, num_workers))
        assert 0 <= saves.num_seen < len(whole.seen) or LENGTHS[dist.get_rank()] == 3, (saves.num_seen, whole.seen)
        resumed = Model()
        trainer = trainer_of(2, how, accumulate_grad_batches=2, **settings)
        trainer.fit(resumed, make_loader(kind, num_workers), ckpt_path=path)
        assert resumed.seen == whole.seen[saves.num_seen :], (place, whole.seen, saves.num_seen, resumed.seen)
        assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))


@works("Savers", "Trainer: `StatefulDataLoader` resumes in mid-epoch, each rank at its own sample")
@pytest.mark.parametrize(
    ("kind", "how", "places", "num_workers"),
    [
        ("stream", "longest", [(0, 5), (1, 1)], 0),
        ("stream", "longest", [(0, 5)], 2),
        ("stream", "shortest", [(0, 1)], 0),
        ("stream of equal lengths", "error", [(0, 1)], 0),
        ("shuffled", "error", [(1, 1)], 0),
        ("unequal", "longest", [(0, 5)], 0),
        pytest.param("shuffled", "error", [(1, 1)], 2, marks=pytest.mark.campaign),
        pytest.param("unequal", "shortest", [(1, 1)], 2, marks=pytest.mark.campaign),
    ],
)
def test_resuming_goes_on_at_the_sample(
    pool: WorkerPool, tmp_path: Path, kind: str, how: str, places: list[tuple[int, int]], num_workers: int
) -> None:
    pool.run(resume, tmp_path, kind, how, num_workers, places, world_size=4, timeout=240)


def save_in_mid_epoch(folder: Path) -> None:
    trainer_of(2, "longest", SavesAt(folder / "run.ckpt", 0, 1)).fit(Model(), make_loader("stream", 0))


def resume_elsewhere(folder: Path) -> None:
    trainer_of(2, "longest").fit(Model(), make_loader("stream", 0), ckpt_path=folder / "run.ckpt")


def test_another_number_of_ranks_is_refused_in_mid_epoch(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(save_in_mid_epoch, tmp_path, world_size=4)
    for failure in pool.attempt(resume_elsewhere, tmp_path, world_size=2):
        assert failure.kind == "CheckpointError"
        assert "data loaders on 4 ranks, and here are 2" in failure.message


def resume_fabric(folder: Path) -> None:
    rank = dist.get_rank()
    fabric = Fabric(strategy=FabricStrategy(shard_size=2, node_size=2), **where())
    fabric.launch()
    model = fabric.setup(build(MODEL))
    loaders = [stateful(Stream(rank, 6)) for _ in range(2)]
    prepared = fabric.setup_dataloaders(loaders[0], use_distributed_sampler=False)
    batches = iter(prepared)
    seen = [next(batches) for _ in range(rank + 1)]
    fabric.save(folder / "run", {"model": model, "loader": prepared})
    fabric.load(folder / "run", {"model": model, "loader": loaders[1]})
    assert torch.equal(torch.cat([*seen, *loaders[1]]), torch.cat([*stateful(Stream(rank, 6))]))


@works("Savers", "Fabric: a `StatefulDataLoader` among the entries of `fabric.save`, each rank's own")
def test_fabric_resumes_each_rank_at_its_own_sample(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(resume_fabric, tmp_path, world_size=4)
