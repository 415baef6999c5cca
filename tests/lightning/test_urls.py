"""Checkpoints of Trainer and Fabric in object storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_tools import LanguageModel, PoolEnvironment, loader, make_trainer
from object_storage import keys
from torch import nn
from works import works

from lightning_mics import MiCSStrategy
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.testing import WorkerPool, full_state_dict

FOLDER = "objects://bucket/run"


class Steps(pl.Callback):
    """Remembers from which step training went on."""

    first: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first = trainer.global_step


def fit(folder: str, max_steps: int, sharded: bool, ckpt_path: str | None, **settings: Any) -> tuple[pl.Trainer, Any]:
    strategy = MiCSStrategy(shard_size="world", save_distributed_checkpoint=sharded, **settings)
    kept: dict[str, Any] = {"monitor": "loss", "save_top_k": 2, "every_n_train_steps": 1}
    steps = Steps()
    callbacks = [ModelCheckpoint(folder or None, save_last=True, **kept), steps]
    where = {} if folder else {"default_root_dir": FOLDER}
    trainer = make_trainer(
        strategy=strategy, max_epochs=-1, max_steps=max_steps, enable_checkpointing=True, callbacks=callbacks, **where
    )
    torch.manual_seed(0)
    trainer.fit(LanguageModel("adamw"), loader(2, 2), ckpt_path=ckpt_path)
    return trainer, steps.first


def keep_and_resume(root: str, folder: str, sharded: bool, is_async: bool) -> tuple[Any, ...]:
    os.environ["OBJECTS_ROOT"] = f"{root}/elsewhere"  # nothing can be found without the options
    options = {"root": root}
    _, first = fit(folder, 4, sharded, "last", async_checkpoint=is_async, storage_options=options)
    resumed, then = fit(folder, 6, sharded, "last", storage_options=options)
    best = [Path(path).name for path in resumed.checkpoint_callback.best_k_models]
    resumed.save_checkpoint(f"{FOLDER}/by-hand.ckpt", storage_options=options)
    os.environ["OBJECTS_ROOT"] = root
    loaded = LanguageModel.load_from_checkpoint(f"{FOLDER}/by-hand.ckpt", optimizer="adamw", weights_only=False)
    same = full_state_dict(resumed.lightning_module)
    assert all(torch.equal(same[name], value) for name, value in loaded.state_dict().items())
    return first, then, sorted(best)


@works("Savers", 'ModelCheckpoint in object storage, `ckpt_path="last"`')
@pytest.mark.parametrize(
    ("folder", "sharded", "is_async"), [(FOLDER, True, False), ("", True, True), (FOLDER, False, False)]
)
def test_model_checkpoint_lists_keeps_and_resumes(
    pool: WorkerPool, tmp_path: Path, folder: str, sharded: bool, is_async: bool
) -> None:
    results = pool.run(keep_and_resume, str(tmp_path), folder, sharded, is_async, world_size=2)
    first, then, best = results[0]
    assert (first, then) == (0, 4) and results[1] == results[0]
    found = {key.removeprefix("run/").removeprefix("checkpoints/") for key in keys(tmp_path)}
    assert {name.partition("/")[0] for name in found} == {*best, "last.ckpt", "by-hand.ckpt"}
    assert ("last.ckpt/mics.json" in found) == sharded


def fit_in_memory() -> tuple[int, list[str]]:
    _, first = fit("memory://fit", 3, True, None)
    assert first == 0
    trainer, first = fit("memory://fit", 5, True, "last")
    fs = trainer.checkpoint_callback._fs
    return int(first), sorted(Path(name).suffix for name in fs.ls("memory://fit", detail=False))


def test_memory(pool: WorkerPool) -> None:
    assert pool.run(fit_in_memory, world_size=1) == [(3, [".ckpt"] * 3)]


def fabric_round_trip(root: str, sharded: bool) -> None:
    strategy = FabricStrategy(shard_size=2, save_distributed_checkpoint=sharded, storage_options={"root": root})
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=PoolEnvironment())
    fabric.launch()
    model, optimizer = fabric.setup(net := nn.Linear(4, 4), torch.optim.AdamW(net.parameters()))
    fabric.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    fabric.save(f"{FOLDER}/last.ckpt", {"model": model, "optimizer": optimizer, "step": 3})
    before = {name: value.clone() for name, value in full_state_dict(net).items()}
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "step": 0}
    fabric.load(f"{FOLDER}/last.ckpt", state)
    assert state["step"] == 3
    assert all(torch.equal(value, before[name]) for name, value in full_state_dict(net).items())


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_fabric(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    pool.run(fabric_round_trip, str(tmp_path), sharded, world_size=2)
    assert ("run/last.ckpt/mics.json" in keys(tmp_path)) == sharded
