"""Checkpoints through the Trainer: other shard sizes, other worlds, other strategies, crashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from checkpoint_tools import slow_writing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_tools import BATCH, LanguageModel, Net, dataset, loader, make_trainer, mean_over_ranks
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from works import works

from lightning_mics import MiCSStrategy, consolidate
from lightning_mics.checkpoint import optimizer_state
from lightning_mics.testing import WorkerPool, full_state_dict, relative_difference

ROWS_PER_STEP = 8


def global_loader(num_steps: int) -> DataLoader:
    """Every world reads the same rows in each step."""
    rows = dataset(num_steps, ROWS_PER_STEP // BATCH)
    sampler = DistributedSampler(rows, shuffle=False)
    return DataLoader(rows, batch_size=ROWS_PER_STEP // dist.get_world_size(), sampler=sampler)


def whole(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().clone()
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return value


def states_of(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Whole weights, optimizer states and scheduler states."""
    optimizer = trainer.optimizers[0]
    return {
        "weights": full_state_dict(module),
        "optimizer": whole(optimizer_state(module, optimizer)),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
    }


def same(actual: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(actual, expected)
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(same(actual[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(actual) == len(expected) and all(same(a, b) for a, b in zip(actual, expected, strict=True))
    return bool(actual == expected)


class Remember(pl.Callback):
    """Keeps the states as they are when training starts."""

    states: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states = states_of(trainer, pl_module)


def train_and_save(folder: str, sharded: bool, optimizer: str) -> dict[str, Any]:
    """Trains an epoch and saves; returns the states at the save."""
    torch.manual_seed(3)
    module = LanguageModel(optimizer)
    strategy = MiCSStrategy(shard_size=2, node_size=2, save_distributed_checkpoint=sharded)
    trainer = make_trainer(strategy=strategy)
    trainer.fit(module, global_loader(3))
    trainer.save_checkpoint(Path(folder) / "saved.ckpt")
    return states_of(trainer, module)


def uninterrupted(optimizer: str) -> list[float]:
    """Returns the losses of the second of two epochs."""
    torch.manual_seed(3)
    module = LanguageModel(optimizer)
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2, node_size=2), max_epochs=2)
    trainer.fit(module, global_loader(3))
    return mean_over_ranks(module.losses)[3:]


def resume(path: str, strategy: dict[str, Any] | None, optimizer: str) -> tuple[dict[str, Any], list[float]]:
    """Trains the second epoch; returns the states at its start and its losses."""
    torch.manual_seed(99)
    module = LanguageModel(optimizer)
    remember = Remember()
    where: dict[str, Any] = {"strategy": MiCSStrategy(**strategy)} if strategy else {"devices": 1, "plugins": []}
    trainer = make_trainer(max_epochs=2, callbacks=[remember], **where)
    trainer.fit(module, global_loader(3), ckpt_path=path)
    assert remember.states is not None
    return remember.states, mean_over_ranks(module.losses)


SHAPES = [
    (4, {"shard_size": 4, "node_size": 2}),
    (4, {"shard_size": 1}),
    (2, {"shard_size": 1}),
    (2, {"shard_size": 2}),
    (1, {"shard_size": 1}),
]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_resume_on_other_shapes(pool: WorkerPool, tmp_path: Path, optimizer: str, sharded: bool) -> None:
    states, *_ = pool.run(train_and_save, str(tmp_path), sharded, optimizer, world_size=4)
    expected = pool.run(uninterrupted, optimizer, world_size=4)[0]
    path = tmp_path / "saved.ckpt"
    assert path.is_dir() == sharded
    for world_size, strategy in [*SHAPES, *([(1, None)] if not sharded else [])]:
        for loaded, losses in pool.run(resume, str(path), strategy, optimizer, world_size=world_size):
            assert same(loaded, states)
            assert len(losses) == len(expected)
            assert max(map(relative_difference, losses, expected)) < 1e-5


def test_one_device_resumes_a_consolidated_checkpoint(pool: WorkerPool, tmp_path: Path) -> None:
    states, *_ = pool.run(train_and_save, str(tmp_path), True, "adamw", world_size=4)
    expected = pool.run(uninterrupted, "adamw", world_size=4)[0]
    consolidate(tmp_path / "saved.ckpt", tmp_path / "whole.ckpt")
    loaded, losses = pool.run(resume, str(tmp_path / "whole.ckpt"), None, "adamw", world_size=1)[0]
    assert same(loaded, states)
    assert max(map(relative_difference, losses, expected)) < 1e-5
    plain = torch.load(tmp_path / "whole.ckpt", weights_only=False)
    net = Net()
    net.load_state_dict({name.removeprefix("net."): value for name, value in plain["state_dict"].items()})
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.load_state_dict(plain["optimizer_states"][0])
    assert torch.equal(net.embedding.weight, states["weights"]["net.embedding.weight"])


class ShardedByUser(LanguageModel):
    """What a user of Lightning's ModelParallelStrategy writes."""

    def configure_model(self) -> None:
        if not any(isinstance(param, DTensor) for param in self.parameters()):
            for block in self.net.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def model_parallel(path: str, load: bool) -> dict[str, Any]:
    torch.manual_seed(5)
    module = ShardedByUser("adamw")
    remember = Remember()
    strategy = ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    settings = {"strategy": strategy, "callbacks": [remember]}
    if load:
        trainer = make_trainer(max_epochs=2, **settings)
        trainer.fit(module, global_loader(3), ckpt_path=path)
        assert remember.states is not None
        return remember.states
    trainer = make_trainer(**settings)
    trainer.fit(module, global_loader(3))
    trainer.save_checkpoint(path)
    return states_of(trainer, module)


def test_lightnings_model_parallel_strategy_reads_ours_and_we_read_its(pool: WorkerPool, tmp_path: Path) -> None:
    states, *_ = pool.run(train_and_save, str(tmp_path), True, "adamw", world_size=4)
    for loaded in pool.run(model_parallel, str(tmp_path / "saved.ckpt"), True, world_size=2):
        assert same(loaded, states)
    states = pool.run(model_parallel, str(tmp_path / "theirs.ckpt"), False, world_size=2)[0]
    for loaded, _ in pool.run(resume, str(tmp_path / "theirs.ckpt"), {"shard_size": 2}, "adamw", world_size=4):
        assert same(loaded, states)


class Looker(pl.Callback):
    """Looks, after each batch, whether all that has a name is whole."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        names = [entry for entry in Path(trainer.checkpoint_callback.dirpath).glob("[a-z]*.ckpt")]
        assert all((entry / "mics.json").is_file() for entry in names), names
        assert names or trainer.global_step < 3


def keep_best(folder: str, save_last: Any, is_async: bool) -> list[str]:
    module = LanguageModel("adamw")
    settings: dict[str, Any] = {"monitor": "loss", "save_top_k": 2, "every_n_train_steps": 1}
    checkpoint = ModelCheckpoint(folder, save_last=save_last, **settings)
    strategy = MiCSStrategy(shard_size=2, node_size=2, async_checkpoint=is_async)
    callbacks = [checkpoint, *([Looker()] if dist.get_rank() == 0 and is_async else [])]
    with slow_writing():
        trainer = make_trainer(strategy=strategy, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, global_loader(5))
    # What ModelCheckpoint remembers must be what lies on the disk.
    return sorted(Path(path).name for path in checkpoint.best_k_models)


@works("Savers", "ModelCheckpoint")
@pytest.mark.parametrize(("save_last", "is_async"), [(True, False), (True, True), ("link", True)])
def test_model_checkpoint_keeps_the_best_and_leaves_nothing_else(
    pool: WorkerPool, tmp_path: Path, save_last: Any, is_async: bool
) -> None:
    best = pool.run(keep_best, str(tmp_path), save_last, is_async, world_size=4)[0]
    assert len(best) == 2
    last = tmp_path / "last.ckpt"
    assert last.is_symlink() == (save_last == "link") and (last / "mics.json").is_file()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*best, "last.ckpt"])


def save_under_one_name(folder: str) -> bool:
    settings: dict[str, Any] = {"monitor": "step", "mode": "max", "save_top_k": -1, "every_n_train_steps": 1}
    callbacks = [ModelCheckpoint(folder, filename="one-name", **settings)]
    strategy = MiCSStrategy(shard_size=2, node_size=2, async_checkpoint=True)
    with slow_writing():
        trainer = make_trainer(strategy=strategy, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(LanguageModel("adamw"), global_loader(2))
        # Lightning ends the job when it has saved this one.
        trainer.save_checkpoint(f"{folder}/hpc_ckpt_1.ckpt")
        return Path(f"{folder}/hpc_ckpt_1.ckpt").exists()


def test_the_name_of_a_checkpoint_that_is_not_there_yet_is_taken(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(save_under_one_name, str(tmp_path), world_size=2) == [True, True]
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["hpc_ckpt_1.ckpt", "one-name-v1.ckpt", "one-name.ckpt"]


def full_file_for_transformers(path: str) -> Tensor:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Wrapped(LanguageModel):
        def __init__(self) -> None:
            super().__init__("adamw")
            torch.manual_seed(1)
            config = GPT2Config(vocab_size=19, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0)
            config.eos_token_id = 0
            self.net = GPT2LMHeadModel(config)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.net(tokens).logits

    module = Wrapped().eval()
    for sharded in (True, False):
        strategy = MiCSStrategy(shard_size=2, node_size=2, save_distributed_checkpoint=sharded)
        trainer = make_trainer(strategy=strategy)
        trainer.validate(module, global_loader(1), verbose=False)
        trainer.save_checkpoint(f"{path}/{'sharded' if sharded else 'full'}.ckpt", weights_only=True)
    with torch.no_grad():
        return module(torch.arange(5)[None])


@works("Savers", "mics consolidate, read by from_pretrained")
def test_from_pretrained_reads_what_consolidate_writes(pool: WorkerPool, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    logits = pool.run(full_file_for_transformers, str(tmp_path), world_size=4)[0]
    for name in ("sharded", "full"):
        consolidate(tmp_path / f"{name}.ckpt", tmp_path / f"{name}-hf")
        model = GPT2LMHeadModel.from_pretrained(tmp_path / f"{name}-hf").eval()
        with torch.no_grad():
            assert torch.allclose(model(torch.arange(5)[None]).logits, logits, atol=1e-6)


class Described(LanguageModel):
    """Keeps an object among its hyperparameters, and looks at the weights when it is loaded."""

    def __init__(self, description: Case) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen: list[str] = []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = list(checkpoint["state_dict"])


@dataclass(frozen=True)
class Case:
    name: str


def resume_described(folder: str, full: bool, weights_only: bool | None) -> tuple[str, bool]:
    def trainer(steps: int) -> pl.Trainer:
        strategy = MiCSStrategy(shard_size=2, save_distributed_checkpoint=not full)
        return make_trainer(strategy=strategy, max_epochs=-1, max_steps=steps)

    first = trainer(1)
    first.fit(Described(Case("first")), loader(2, 2))
    first.save_checkpoint(f"{folder}/described.ckpt")
    ours = Described(Case("second"))
    trainer(2).fit(ours, loader(2, 2), ckpt_path=f"{folder}/described.ckpt", weights_only=weights_only)
    return ours.hparams.description.name, "net.blocks.0.up.weight" in ours.seen


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_objects_among_hyperparameters_load_when_trusted(pool: WorkerPool, tmp_path: Path, full: bool) -> None:
    assert pool.run(resume_described, str(tmp_path), full, False, world_size=2) == [("second", True)] * 2
    for failure in pool.attempt(resume_described, str(tmp_path), full, None, world_size=2):
        assert failure.kind == "CheckpointError" and "weights_only=False" in failure.message
