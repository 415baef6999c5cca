"""``shard_size="auto"`` takes the smallest partition that is predicted to fit, through every way in."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import warnings
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate_tools import forget_accelerate, make_accelerator
from lightning.fabric import Fabric
from lightning_tools import (
    BATCH,
    SEQUENCE,
    LanguageModel,
    Net,
    PoolEnvironment,
    cross_entropy,
    dataset,
    loader,
    make_trainer,
)
from models import SEQUENCE as GPT2_SEQUENCE
from models import tiny_gpt2
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_mics import MiCSConfig, MiCSError, MiCSStrategy, mics_shard
from lightning_mics.accelerate import MiCSPlugin
from lightning_mics.auto import random_states_kept, sample_of
from lightning_mics.core.resources import Usage
from lightning_mics.core.runtime import is_sharded, runtime_of
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.plan import Accelerator, Candidate, Training, predict_memory
from lightning_mics.testing import Failure, WorkerPool, full_state_dict, weight_differences
from lightning_mics.trace import profile_model

WORLD = 4
SIZES = (1, 2, 4)
CPU = Accelerator(
    name="cpu",
    memory=1,
    peak_flops={"float32": 1.0},
    memory_bandwidth=1.0,
    compute_efficiency=1.0,
    device_type="cpu",
)
TOKENS = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters())


@cache
def total(shard_size: int, optimizer: str, activation_checkpointing: bool = False) -> float:
    """Returns what a rank is predicted to need for ``Net``, without ``shard_size="auto"``."""
    profile = profile_model(Net(), TOKENS, device_type="cpu")
    candidate = Candidate(shard_size=shard_size, micro_batch=BATCH, activation_checkpointing=activation_checkpointing)
    training = Training(param_dtype="float32", optimizer=optimizer)
    return predict_memory(profile, candidate, training, CPU).total


def limit_for(shard_size: int, optimizer: str = "AdamW") -> int:
    """Returns a limit into which ``shard_size`` fits, and half of it does not."""
    needed = total(shard_size, optimizer)
    return int((needed + (total(shard_size // 2, optimizer) if shard_size > 1 else 2 * needed)) / 2)


class Said(io.StringIO):
    """What lightning-mics wrote to stderr inside the context."""

    def __enter__(self) -> Said:
        self._redirect = contextlib.redirect_stderr(self)
        self._redirect.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._redirect.__exit__(*exc)

    @property
    def lines(self) -> list[str]:
        return [line for line in self.getvalue().splitlines() if line.startswith("lightning-mics: shard_size='auto'")]


# --- A bare loop ------------------------------------------------------------------------------------------------------


def shard_bare(limit: Any, optimizer: str = "AdamW", **settings: Any) -> tuple[int, list[str]]:
    limit = limit[dist.get_rank()] if isinstance(limit, list) else limit
    net = Net()
    inner = getattr(torch.optim, optimizer)(net.parameters())
    with Said() as said:
        mics_shard(net, MiCSConfig(shard_size="auto", memory_limit=limit, **settings), optimizer=inner, sample=TOKENS)
    assert {id(p) for group in inner.param_groups for p in group["params"]} == {id(p) for p in net.parameters()}
    runtime = runtime_of(net)
    assert runtime.config.shard_size == runtime.mesh.layout.shard_size == runtime.choice.shard_size
    return runtime.config.shard_size, said.lines


@pytest.mark.parametrize("shard_size", SIZES)
def test_the_smallest_size_that_fits_is_taken(pool: WorkerPool, shard_size: int) -> None:
    results = pool.run(shard_bare, limit_for(shard_size), world_size=WORLD)
    assert [size for size, _ in results] == [shard_size] * WORLD
    assert [len(lines) for _, lines in results] == [1, 0, 0, 0]
    line = results[0][1][0]
    assert f"chose {shard_size}: a rank needs" in line and "optimizer" in line and "activations" in line
    assert ("would need" in line) == (shard_size > 1)
    assert "AdamW is assumed" not in line


def test_unequal_limits_give_one_answer_that_of_the_smallest(pool: WorkerPool) -> None:
    limits = [limit_for(1), limit_for(2), limit_for(4), 2**40]
    assert [size for size, _ in pool.run(shard_bare, limits, world_size=WORLD)] == [4] * WORLD


def test_the_optimizer_counts(pool: WorkerPool) -> None:
    limit = int((total(1, "SGD") + total(1, "AdamW")) / 2)
    assert total(2, "AdamW") < limit
    assert [size for size, _ in pool.run(shard_bare, limit, "SGD", world_size=WORLD)] == [1] * WORLD
    assert [size for size, _ in pool.run(shard_bare, limit, "AdamW", world_size=WORLD)] == [2] * WORLD


def test_two_stages_that_were_asked_for_need_a_partition_over_nodes(pool: WorkerPool) -> None:
    settings = {"node_size": 2, "hierarchical": True}
    assert [size for size, _ in pool.run(shard_bare, 2**40, **settings, world_size=WORLD)] == [4] * WORLD
    for failure in pool.attempt(shard_bare, 2**40, node_size=4, hierarchical=True, world_size=WORLD):
        assert failure.kind == "MiCSConfigError" and "hierarchical=True" in failure.message


def shard_without_a_fit(limit: int, activation_checkpointing: bool | str) -> str:
    net = Net()
    config = MiCSConfig(shard_size="auto", memory_limit=limit, activation_checkpointing=activation_checkpointing)
    with pytest.raises(MiCSError) as caught:
        mics_shard(net, config, optimizer="adamw", sample=TOKENS)
    assert not is_sharded(net) and not any(isinstance(param, DTensor) for param in net.parameters())
    return str(caught.value)


def test_where_nothing_fits_every_rank_says_what_would(pool: WorkerPool) -> None:
    needed, recomputed = total(4, "AdamW"), total(4, "AdamW", activation_checkpointing=True)
    assert recomputed < needed
    for message in pool.run(shard_without_a_fit, int((needed + recomputed) / 2), False, world_size=WORLD):
        assert "p=4 with micro-batches of 2" in message and "activations" in message
        assert "activation_checkpointing=True" in message and "nodes, shard_size=" in message
    for message in pool.run(shard_without_a_fit, int(recomputed / 2), True, world_size=WORLD):
        assert "activation_checkpointing=True" not in message
    for message in pool.run(shard_without_a_fit, int(recomputed / 2), "LayerNorm", world_size=WORLD):
        assert "Nothing is taken to be recomputed" in message


def shard_differently(different: dict[str, Any]) -> None:
    settings = different if dist.get_rank() == 1 else {}
    mics_shard(Net(), MiCSConfig(**{"shard_size": "auto", "memory_limit": 2**30, **settings}), sample=TOKENS)


def test_ranks_that_differ_in_settings_are_told_before_anything_is_planned(pool: WorkerPool) -> None:
    for failure in pool.attempt(shard_differently, {"shard_size": 2}, world_size=2):
        assert failure.kind == "MiCSConfigError" and "Ranks differ in settings" in failure.message


def shard_with_what_is_known(limit: int | None) -> tuple[int, list[str]]:
    """Neither sample nor optimizer, from the meta device, with the machine's own memory unless there is a limit."""
    with torch.device("meta"):
        net = Net()
    with Said() as said:
        mics_shard(net, MiCSConfig(shard_size="auto", memory_limit=limit))
    return runtime_of(net).config.shard_size, said.lines


def test_what_is_not_known_is_assumed_and_said(pool: WorkerPool) -> None:
    results = pool.run(shard_with_what_is_known, None, world_size=2)
    assert [size for size, _ in results] == [1, 1]
    line = results[0][1][0]
    assert "AdamW is assumed" in line and "20% of the memory is kept free" in line
    states = 4 * 4 * sum(param.numel() for param in Net().parameters())
    # Too little for a rank with all states and the fifth that is kept free.
    assert [size for size, _ in pool.run(shard_with_what_is_known, int(1.15 * states), world_size=2)] == [2, 2]


def shard_a_gpt2() -> list[str]:
    model = tiny_gpt2()
    with Said() as said:
        mics_shard(model, MiCSConfig(shard_size="auto", memory_limit="1GiB"), optimizer=torch.optim.SGD)
    return said.lines


def test_models_of_hugging_face_have_a_formula(pool: WorkerPool) -> None:
    line = pool.run(shard_a_gpt2, world_size=2)[0][0]
    assert f"formula, for micro-batches of 1 with {GPT2_SEQUENCE} tokens" in line and "assumed" not in line


# --- Adapters ---------------------------------------------------------------------------------------------------------


class Model(LanguageModel):
    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        self.asked = 0

    def configure_optimizers(self) -> object:
        self.asked += 1
        torch.rand(3)
        return super().configure_optimizers()


def strategy_settings(limit: int) -> dict[str, Any]:
    return {"shard_size": "auto", "memory_limit": limit}


def fit(limit: int, by_example: bool = False) -> tuple[int, list[str]]:
    module, strategy = Model(), MiCSStrategy(**strategy_settings(limit))
    if by_example:
        module.example_input_array = TOKENS[:1]
    trainer = make_trainer(strategy=strategy, accumulate_grad_batches=2)
    with pytest.raises(MiCSError, match="decided when the module is set up"):
        _ = strategy.layout
    with Said() as said:
        trainer.fit(module, loader(4, trainer.world_size))
    assert module.asked == 1
    assert strategy.layout == runtime_of(module).mesh.layout == strategy.ledger.layout
    return strategy.layout.shard_size, said.lines


def set_up_fabric(limit: int) -> tuple[int, list[str]]:
    strategy = FabricStrategy(**strategy_settings(limit))
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, plugins=[PoolEnvironment()])
    fabric.launch()
    with pytest.raises(MiCSError, match="decided when the module is set up"):
        _ = strategy.layout
    batches = fabric.setup_dataloaders(DataLoader(dataset(2, fabric.world_size), batch_size=BATCH))
    net = Net()
    with Said() as said:
        model, optimizer = fabric.setup(net, adamw(net))
    for inputs, targets in batches:
        fabric.backward(cross_entropy(model(inputs), targets))
        optimizer.step()
    return strategy.layout.shard_size, said.lines


def prepare(limit: int | None, loader_first: bool = False) -> tuple[int, list[str]]:
    settings = {} if limit is None else strategy_settings(limit)
    accelerator = make_accelerator(settings=settings)
    assert accelerator.layout is None and accelerator.topology is not None
    net = Net()
    batches = DataLoader(dataset(2, accelerator.num_processes), batch_size=BATCH)
    with Said() as said:
        if loader_first:
            batches = accelerator.prepare(batches)
            model, optimizer = accelerator.prepare(net, adamw(net))
        else:
            model, optimizer, batches = accelerator.prepare(net, adamw(net), batches)
    for inputs, targets in batches:
        accelerator.backward(cross_entropy(model(inputs), targets))
        optimizer.step()
    assert accelerator.layout is not None
    return accelerator.layout.shard_size, said.lines


def prepare_by_environment(limit: int) -> tuple[int, list[str]]:
    os.environ |= {"MICS_SHARD_SIZE": "auto", "MICS_MEMORY_LIMIT": str(limit)}
    # The launch file's number stands in for the word, which it cannot hold.
    os.environ |= {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "1", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4"}
    assert MiCSPlugin().memory_limit == limit
    return prepare(None)


@pytest.mark.parametrize("shard_size", [2, pytest.param(4, marks=pytest.mark.campaign)])
@pytest.mark.parametrize(
    ("way_in", "options"),
    [
        (fit, {}),
        (fit, {"by_example": True}),
        (set_up_fabric, {}),
        (prepare, {}),
        (prepare, {"loader_first": True}),
        (prepare_by_environment, {}),
    ],
    ids=["trainer", "trainer-example", "fabric", "accelerate", "accelerate-loader-first", "environment"],
)
def test_every_way_in_decides_alike(pool: WorkerPool, shard_size: int, way_in: Any, options: dict[str, Any]) -> None:
    results = pool.run(way_in, limit_for(shard_size), **options, world_size=WORLD)
    assert [size for size, _ in results] == [shard_size] * WORLD
    assert [len(lines) for _, lines in results] == [1, 0, 0, 0]
    line = results[0][1][0]
    assert f"Activations are those of micro-batches of {BATCH}." in line and "assumed" not in line


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.arange(index, index + GPT2_SEQUENCE) % 7
        return {"input_ids": tokens, "labels": tokens}


def train_with_transformers(folder: str) -> list[str]:
    from transformers import TrainingArguments

    from lightning_mics.transformers import MiCSTrainer

    forget_accelerate()
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=3, max_steps=2, use_cpu=True, report_to=[], save_strategy="no"
    )
    plugin = MiCSPlugin(shard_size="auto", memory_limit=2**30)
    with Said() as said:
        trainer = MiCSTrainer(model=tiny_gpt2(), args=arguments, train_dataset=Rows(), mics_plugin=plugin)
        trainer.train()
    assert runtime_of(trainer.model).config.shard_size == 1
    return said.lines


def test_the_trainer_of_transformers_has_a_sample_and_an_optimizer(pool: WorkerPool, tmp_path: Path) -> None:
    line = pool.run(train_with_transformers, str(tmp_path), world_size=2)[0][0]
    assert "Activations are those of micro-batches of 3." in line and "assumed" not in line


def losses_and_weights(shard_size: Any, limit: int | None) -> tuple[list[float], dict[str, Tensor]]:
    pl.seed_everything(1, verbose=False)
    module = Model()
    strategy = MiCSStrategy(shard_size=shard_size, memory_limit=limit)
    trainer = make_trainer(strategy=strategy, accumulate_grad_batches=2)
    trainer.fit(module, loader(6, trainer.world_size))
    assert strategy.layout.shard_size == 2
    return module.losses, full_state_dict(module)


def compare_runs() -> None:
    losses, weights = losses_and_weights(2, None)
    others, other_weights = losses_and_weights("auto", limit_for(2))
    assert losses == others
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_training_is_that_of_the_same_number_to_the_bit(pool: WorkerPool) -> None:
    pool.run(compare_runs, world_size=WORLD)


def resume(folder: str) -> None:
    path = f"{folder}/saved"
    torch.manual_seed(1)
    whole = Model()
    make_trainer(strategy=MiCSStrategy(shard_size=2), max_epochs=2).fit(whole, loader(2, WORLD))

    torch.manual_seed(1)
    module = Model()
    first = make_trainer(strategy=MiCSStrategy(**strategy_settings(limit_for(2))))
    first.fit(module, loader(2, WORLD))
    first.save_checkpoint(path)
    # A second Trainer keeps the module's size, whatever it would decide itself.
    second = make_trainer(strategy=MiCSStrategy(**strategy_settings(limit_for(4))))
    second.validate(module, loader(2, WORLD), verbose=False)
    assert second.strategy.layout.shard_size == 2

    resumed = Model()
    third = make_trainer(strategy=MiCSStrategy(**strategy_settings(limit_for(4))), max_epochs=2)
    third.fit(resumed, loader(2, WORLD), ckpt_path=path)
    assert third.strategy.layout.shard_size == 4 and third.global_step == 4
    worst = max(weight_differences(full_state_dict(resumed), full_state_dict(whole)).values())
    assert worst < 1e-4, worst


def test_checkpoints_go_from_one_decision_to_another(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(resume, str(tmp_path), world_size=WORLD)


class Stepping(Model):
    """Logs in its step, which nothing takes yet while the step is traced."""

    traced = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.log_dict({"again": loss})
        Stepping.traced += type(loss).__name__ == "FakeTensor"
        return loss


def fit_stepping() -> tuple[int, list[str]]:
    module, Stepping.traced = Stepping(), 0
    trainer = make_trainer(strategy=MiCSStrategy(**strategy_settings(2**30)))
    with Said() as said, warnings.catch_warnings():
        warnings.filterwarnings("error", message="You are trying to `self.log")
        trainer.fit(module, loader(2, 2))
    assert "log" not in vars(module) and trainer.logged_metrics.keys() == {"loss", "again"}
    return Stepping.traced, said.lines


def test_steps_are_traced_with_their_loss(pool: WorkerPool) -> None:
    traced, lines = pool.run(fit_stepping, world_size=2)[0]
    assert traced > 0 and "cannot be traced" not in lines[0]


class Refusing(Model):
    def configure_optimizers(self) -> object:
        self.asked += 1
        if self.asked == 1 and not isinstance(next(self.parameters()), DTensor):
            raise RuntimeError("not yet")
        return super().configure_optimizers()


def fit_refusing() -> list[str]:
    module = Refusing()
    with Said() as said:
        make_trainer(strategy=MiCSStrategy(**strategy_settings(2**30))).fit(module, loader(2, 2))
    return said.lines


def test_an_optimizer_that_cannot_be_asked_for_is_assumed(pool: WorkerPool) -> None:
    assert "AdamW is assumed" in pool.run(fit_refusing, world_size=2)[0][0]


class Adversaries(Model):
    """Two optimizers, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second):
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> object:
        blocks = set(self.net.blocks.parameters())
        rest = [param for param in self.parameters() if param not in blocks]
        return [torch.optim.SGD(blocks, lr=0.1), torch.optim.AdamW(rest)], []


def fit_adversaries(limit: int) -> tuple[int, float]:
    module = Adversaries()
    strategy = MiCSStrategy(**strategy_settings(limit))
    make_trainer(strategy=strategy).fit(module, loader(2, WORLD))
    choice = runtime_of(module).choice
    return strategy.layout.shard_size, choice.memory.optimizer


def test_states_of_several_optimizers_add_up(pool: WorkerPool) -> None:
    size, states = pool.run(fit_adversaries, 2**30, world_size=WORLD)[0]
    embedding = Net().embedding.weight.numel()
    assert size == 1 and 8 * embedding <= states <= 8 * embedding + 16


# --- Samples ----------------------------------------------------------------------------------------------------------


class Drawing(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(3) + np.random.rand() + random.random()


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        raise AssertionError("not to be read")


class Broken(Drawing):
    def __getitem__(self, index: int) -> Tensor:
        raise OSError("no such file")


def test_a_sample_is_taken_without_a_trace() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    sample = sample_of(DataLoader(Drawing(), batch_size=4, shuffle=True))
    assert sample is not None and sample.micro_batch == 4 and sample.batch.shape == (1, 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    whole = sample_of(DataLoader(Drawing(), batch_size=None))
    assert whole is not None and whole.micro_batch == 3


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Endless()),
        DataLoader(Broken()),
        [DataLoader(Drawing())],
        None,
        DataLoader(TensorDataset(torch.zeros(0, 3))),
    ],
    ids=["iterable", "broken", "several", "none", "empty"],
)
def test_where_there_is_no_sample_there_is_none(loader: Any) -> None:
    before = set(multiprocessing.active_children())
    assert sample_of(loader) is None
    assert set(multiprocessing.active_children()) <= before


def test_random_states_are_kept_where_something_fails() -> None:
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), random_states_kept():
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)


# --- Afterwards -------------------------------------------------------------------------------------------------------


def train_and_measure(measured: float, windows: int) -> list[str]:
    net, limit = Net(), limit_for(2)
    optimizer = adamw(net)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"
    factor = 1 if dist.get_rank() == 1 else 0.1  # the rank that takes most counts
    peak = mock.patch.object(Usage, "peak", lambda self: int(measured * factor))
    with Said() as said, peak, mock.patch.dict("lightning_mics.auto.check._NOISE", {"cpu": 0}):
        mics_shard(net, MiCSConfig(shard_size="auto", memory_limit=limit), optimizer=optimizer, sample=TOKENS)
        for _ in range(windows):
            cross_entropy(net(TOKENS), TOKENS).backward()
            optimizer.step()
            optimizer.zero_grad()
    return said.lines[1:]


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (1.0, "measured"),
        (0.5, "less than expected. shard_size=1 would probably fit"),
        (1.5, "more than expected. Pass a sample as large as those that are trained with, or use shard_size=4"),
    ],
)
def test_the_prediction_is_compared_once_all_states_are_there(pool: WorkerPool, share: float, told: str) -> None:
    measured = share * total(2, "AdamW")
    first, second = pool.run(train_and_measure, measured, 4, world_size=WORLD)[:2]
    assert len(first) == 1 and told in first[0] and "predicted" in first[0], first
    assert second == []


def test_one_step_is_too_early_to_compare(pool: WorkerPool) -> None:
    assert pool.run(train_and_measure, 1.0, 1, world_size=WORLD) == [[]] * WORLD


def test_a_failure_on_one_rank_is_one_on_all(pool: WorkerPool) -> None:
    for failure in pool.attempt(shard_with_a_problem, world_size=2):
        assert isinstance(failure, Failure) and failure.kind == "MiCSConfigError", failure
        assert "cannot plan this model: RuntimeError: boom" in failure.message


def shard_with_a_problem() -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("boom")

    with (
        mock.patch("lightning_mics.auto.forecast.predict_memory", fail)
        if dist.get_rank() == 1
        else contextlib.nullcontext()
    ):
        mics_shard(Net(), MiCSConfig(shard_size="auto"), sample=TOKENS)
