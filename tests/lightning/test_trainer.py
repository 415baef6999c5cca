"""The Trainer strategy against one process that sees the global batch."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning_tools import (
    BATCH,
    LanguageModel,
    Net,
    PoolEnvironment,
    cross_entropy,
    dataset,
    loader,
    make_optimizer,
    make_trainer,
    mean_over_ranks,
    train_alone,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from works import works

from lightning_mics import Hop, MiCSConfigError, MiCSMonitor, MiCSStrategy
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict, relative_difference


def reference() -> Net:
    torch.manual_seed(3)
    return Net()


def module(cls: type[LanguageModel] = LanguageModel, *args: Any) -> LanguageModel:
    lightning_module = cls(*args)
    lightning_module.net.load_state_dict(reference().state_dict())
    return lightning_module


def net_state(lightning_module: pl.LightningModule) -> dict[str, Tensor]:
    return {name.removeprefix("net."): value for name, value in full_state_dict(lightning_module).items()}


def check_fit(
    strategy: dict[str, Any], num_batches: int, accumulate: int, optimizer: str = "sgd", **trainer_settings: Any
) -> None:
    alone, ours = reference(), module(LanguageModel, optimizer)
    clip, algorithm = trainer_settings.get("gradient_clip_val"), trainer_settings.get("gradient_clip_algorithm")
    trainer = make_trainer(
        strategy=MiCSStrategy(**strategy), accumulate_grad_batches=accumulate, max_epochs=2, **trainer_settings
    )
    losses = train_alone(
        alone,
        num_batches,
        trainer.world_size,
        accumulate=accumulate,
        optimizer=optimizer,
        clip_norm=clip if algorithm == "norm" else None,
        clip_value=clip if algorithm == "value" else None,
        epochs=2,
    )
    trainer.fit(ours, loader(num_batches, trainer.world_size))
    measured = mean_over_ranks(ours.losses)
    assert len(measured) == len(losses)
    assert max(map(relative_difference, measured, losses)) < 1e-5
    if optimizer == "sgd":
        assert_parity(net_state(ours), alone.state_dict())


@pytest.mark.parametrize(
    ("world_size", "strategy", "accumulate"),
    [
        (2, {"shard_size": 2}, 1),
        (4, {"shard_size": 2, "node_size": 2}, 4),
        (4, {"shard_size": 4, "node_size": 2, "hierarchical": True}, 4),
        (4, {"shard_size": "world", "node_size": 2, "hierarchical": False}, 1),
        (4, {"shard_size": 1}, 4),
        (8, {"shard_size": 4, "node_size": 2}, 4),
    ],
)
def test_fit_equals_one_process(pool: WorkerPool, world_size: int, strategy: dict[str, Any], accumulate: int) -> None:
    pool.run(check_fit, strategy, 6, accumulate, world_size=world_size)


def test_adamw_losses_equal_one_process(pool: WorkerPool) -> None:
    pool.run(check_fit, {"shard_size": 2, "node_size": 2}, 6, 4, "adamw", world_size=4)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_equals_one_process(pool: WorkerPool, algorithm: str) -> None:
    clip = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    pool.run(check_fit, {"shard_size": 2, "node_size": 2}, 4, 2, **clip, world_size=4)


@pytest.mark.parametrize("how", [True, "selective", ["Linear", "LayerNorm"]], ids=["all", "selective", "by name"])
def test_activation_checkpointing_equals_one_process(pool: WorkerPool, how: Any) -> None:
    pool.run(check_fit, {"shard_size": 2, "node_size": 2, "activation_checkpointing": how}, 4, 2, world_size=4)


def count_hops(accumulate: int, num_batches: int) -> None:
    ours = module()
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2, node_size=2), accumulate_grad_batches=accumulate)
    trainer.fit(ours, loader(num_batches, trainer.world_size))
    ledger = trainer.strategy.ledger
    assert len(ledger.units()) == 4
    for unit in ledger.units():
        assert ledger.total(Hop.PARTITION_REDUCE, unit).calls == num_batches
        assert ledger.total(Hop.REPLICATION_REDUCE, unit).calls == -(-num_batches // accumulate)


def test_one_wide_all_reduce_a_window_and_one_for_the_incomplete_last(pool: WorkerPool) -> None:
    pool.run(count_hops, 4, 10, world_size=4)


def change_accumulation() -> None:
    ours = module()
    scheduler = GradientAccumulationScheduler(scheduling={0: 1, 1: 4})
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2, node_size=2), max_epochs=2, callbacks=[scheduler])
    trainer.fit(ours, loader(4, trainer.world_size))
    unit = trainer.strategy.ledger.units()[0]
    assert trainer.strategy.ledger.total(Hop.REPLICATION_REDUCE, unit).calls == 4 + 1


@works("Training loops", "GradientAccumulationScheduler")
def test_accumulation_changed_by_the_scheduler_callback(pool: WorkerPool) -> None:
    pool.run(change_accumulation, world_size=4)


class Unsharded(LanguageModel):
    """Keeps a torchmetrics metric and evaluates like a user would."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.MeanMetric()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy((logits.argmax(-1) == batch[1]).float())
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.log("val_loss", cross_entropy(logits, batch[1]), sync_dist=True)


def evaluate() -> None:
    ours, alone = module(Unsharded), reference()
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2, node_size=2))
    world_size = trainer.world_size
    rows = dataset(3, world_size).tensors
    logits = alone(rows[0])
    validated = trainer.validate(ours, loader(3, world_size), verbose=False)[0]
    assert relative_difference(validated["val_loss"], cross_entropy(logits, rows[1]).item()) < 1e-5
    assert relative_difference(validated["accuracy"], (logits.argmax(-1) == rows[1]).float().mean().item()) < 1e-5
    tested = trainer.test(ours, loader(3, world_size), verbose=False)[0]
    assert relative_difference(tested["test_loss"], cross_entropy(logits, rows[1]).item()) < 1e-5
    predicted = torch.cat(trainer.predict(ours, loader(3, world_size)))
    assert torch.equal(predicted, logits.argmax(-1)[trainer.global_rank :: world_size])
    # Training after evaluation must train the shards, not what evaluation gathered.
    trainer.fit(ours, loader(3, world_size), loader(2, world_size))
    train_alone(alone, 3, world_size)
    assert_parity(net_state(ours), alone.state_dict())


@works("Training loops", "Validate, test and predict before and between fits")
def test_validate_test_predict_and_then_fit(pool: WorkerPool) -> None:
    pool.run(evaluate, world_size=4)


class StepsOfABatch(LanguageModel):
    """Its steps do not ask for the batch's index, as in Lightning's own examples; one is decorated."""

    def training_step(self, batch: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    @torch.no_grad()
    def predict_step(self, batch: list[Tensor]) -> Tensor:
        return self(batch[0]).argmax(-1)


def fit_by_batches_alone() -> None:
    ours, alone = module(StepsOfABatch), reference()
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2, node_size=2))
    trainer.fit(ours, loader(2, trainer.world_size), loader(1, trainer.world_size))
    train_alone(alone, 2, trainer.world_size)
    assert_parity(net_state(ours), alone.state_dict())
    rows = dataset(1, trainer.world_size).tensors[0]
    predicted = torch.cat(trainer.predict(ours, loader(1, trainer.world_size)))
    assert torch.equal(predicted, alone(rows).argmax(-1)[trainer.global_rank :: trainer.world_size])


@works("Training loops", "Steps that take a batch without its index (`training_step(self, batch)`)")
def test_steps_need_not_take_the_index_of_a_batch(pool: WorkerPool) -> None:
    pool.run(fit_by_batches_alone, world_size=4)


def weights_after_fit(evaluate_first: bool, precision: str, **strategy: Any) -> dict[str, Tensor]:
    ours = module()
    trainer = make_trainer(strategy=MiCSStrategy(node_size=2, **strategy), precision=precision)
    if evaluate_first:  # in inference mode
        trainer.validate(ours, loader(2, trainer.world_size), verbose=False)
        trainer.predict(ours, loader(2, trainer.world_size))
    trainer.fit(ours, loader(3, trainer.world_size), loader(2, trainer.world_size))
    return net_state(ours)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "strategy", [{"shard_size": 4, "hierarchical": True, "activation_checkpointing": True}, {"shard_size": 1}]
)
def test_training_is_the_same_after_evaluation(pool: WorkerPool, precision: str, strategy: dict[str, Any]) -> None:
    first, second = (
        pool.run(weights_after_fit, evaluated, precision, **strategy, world_size=4)[0] for evaluated in (False, True)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


class TwoPlayers(pl.LightningModule):
    """Manual optimisation with two optimizers that take turns, as in adversarial training."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = sign * players_loss(self.first, self.second, batch[0])
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [make_optimizer("sgd", self.first.parameters()), make_optimizer("sgd", self.second.parameters())]


def players_loss(first: nn.Module, second: nn.Module, rows: Tensor) -> Tensor:
    return second(torch.tanh(first(rows))).square().mean()


def play() -> None:
    ours, alone = TwoPlayers(), TwoPlayers()
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2, node_size=2))
    rows = torch.randn(5 * trainer.world_size * BATCH, 6, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(rows)
    trainer.fit(ours, DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, shuffle=False)))
    optimizers = alone.configure_optimizers()
    for part in rows.split(trainer.world_size * BATCH):
        for optimizer, sign in zip(optimizers, (1.0, -1.0), strict=True):
            alone.zero_grad()
            (sign * players_loss(alone.first, alone.second, part)).backward()
            optimizer.step()
    assert_parity(full_state_dict(ours), alone.state_dict())


@works("Training loops", "Manual optimization with two optimizers, Lightning")
def test_manual_optimisation_with_two_optimizers(pool: WorkerPool) -> None:
    pool.run(play, world_size=4)


def gathered_bytes(precision: str) -> tuple[int, float]:
    ours = module()
    strategy = MiCSStrategy(shard_size=2, node_size=2)
    trainer = make_trainer(strategy=strategy, precision=precision, max_epochs=4)
    trainer.fit(ours, loader(4, trainer.world_size))
    assert all(torch.isfinite(value).all() for value in full_state_dict(ours).values())
    return strategy.ledger.total(Hop.PARTITION_GATHER).message_bytes, ours.losses[-1] / ours.losses[0]


def test_mixed_precision_gathers_exactly_half_the_bytes(pool: WorkerPool) -> None:
    full, _ = pool.run(gathered_bytes, "32-true", world_size=2)[0]
    for precision in ("bf16-mixed", "bf16-true"):
        half, progress = pool.run(gathered_bytes, precision, world_size=2)[0]
        assert 2 * half == full
        assert progress < 1


class Normed(pl.LightningModule):
    """A norm meets the batch itself, and a batch norm is in the middle."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(2)]
        self.net = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 6), *blocks, nn.BatchNorm1d(6), nn.Linear(6, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.net(batch[0].float()).float().square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit_with_norms(precision: str, **settings: Any) -> tuple[list[float], set[torch.dtype]]:
    torch.manual_seed(0)
    ours = Normed()
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2), precision=precision, **settings)
    trainer.fit(ours, loader(4, trainer.world_size))
    return ours.losses, {buffer.dtype for name, buffer in ours.named_buffers() if "running" in name}


def test_norms_train_in_mixed_precision(pool: WorkerPool) -> None:
    full, _ = pool.run(fit_with_norms, "32-true", world_size=2)[0]
    for precision in ("bf16-mixed", "16-mixed"):
        losses, dtypes = pool.run(fit_with_norms, precision, world_size=2)[0]
        assert losses == pytest.approx(full, rel=0.05)
        assert dtypes == {torch.float32}


class OverflowOnce(LanguageModel):
    """Makes the gradient of one rank overflow in the first step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.trainer.global_rank == 0 and batch_idx == 0 else loss


def overflow() -> tuple[float, bool, bool]:
    ours = module(OverflowOnce)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu")
    trainer = make_trainer(
        strategy=MiCSStrategy(shard_size=2, node_size=2),
        plugins=[plugin, PoolEnvironment()],
        callbacks=[RememberFirstStep()],
    )
    trainer.fit(ours, loader(3, trainer.world_size))
    changed = not torch.equal(net_state(ours)["head.weight"], reference().state_dict()["head.weight"])
    return plugin.scaler.get_scale(), trainer.callbacks[0].skipped, changed


class RememberFirstStep(Callback):
    skipped = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if args[-1] == 0:
            same = torch.equal(net_state(pl_module)["head.weight"], reference().state_dict()["head.weight"])
            self.skipped = same


@works("Training loops", "Loss scaling (16-mixed): an overflow on one rank skips the step on all")
def test_an_overflow_on_one_rank_skips_the_step_on_all(pool: WorkerPool) -> None:
    results = pool.run(overflow, world_size=4)
    assert len({scale for scale, _, _ in results}) == 1
    assert all(skipped and changed for _, skipped, changed in results)


class MetaModel(LanguageModel):
    """Builds its layers in ``configure_model``."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.optimizer, self.losses, self.net = "sgd", [], None

    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta"):
                self.net = Net()


class RebuildingModel(MetaModel):
    def configure_model(self) -> None:
        self.net = Net()


def fit_from_meta() -> tuple[float, float]:
    ours = MetaModel()
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2, node_size=2), max_epochs=6)
    trainer.fit(ours, loader(4, trainer.world_size), loader(2, trainer.world_size))
    trainer.test(ours, loader(2, trainer.world_size), verbose=False)
    return ours.losses[0], ours.losses[-1]


@works("Model kinds", "Built on the meta device in configure_model")
def test_configure_model_on_the_meta_device(pool: WorkerPool) -> None:
    for first, last in pool.run(fit_from_meta, world_size=4):
        assert last < first


def rebuild() -> None:
    ours = RebuildingModel()
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2))
    trainer.validate(ours, loader(2, trainer.world_size), verbose=False)
    trainer.test(ours, loader(2, trainer.world_size), verbose=False)


def choose_precision(precision: str) -> None:
    make_trainer(strategy=MiCSStrategy(shard_size=2), precision=precision)


def choose_shard_size(shard_size: Any, **settings: Any) -> None:
    make_trainer(strategy=MiCSStrategy(shard_size=shard_size, **settings))


def foreign_precision() -> Any:
    return pl.plugins.precision.FSDPPrecision("bf16-mixed")


def use_a_plugin(make_plugin: Any) -> None:
    make_trainer(strategy=MiCSStrategy(shard_size=2), plugins=[PoolEnvironment(), make_plugin()])


def synchronise_batch_norms() -> None:
    make_trainer(strategy=MiCSStrategy(shard_size=2), sync_batchnorm=True).fit(Normed(), loader(2, 2))


def configure_by_dict() -> None:
    MiCSStrategy(config={"shard_size": 2})


def change_shard_size() -> None:
    ours = module()
    make_trainer(strategy=MiCSStrategy(shard_size=2)).validate(ours, loader(2, 2), verbose=False)
    make_trainer(strategy=MiCSStrategy(shard_size=1)).validate(ours, loader(2, 2), verbose=False)


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        (rebuild, (), ("configure_model", "net.embedding.weight")),
        (choose_precision, ("16-true",), ("16-true", "16-mixed")),
        (choose_shard_size, (0,), ("shard_size=0", "at least 1")),
        (choose_shard_size, (-2,), ("shard_size=-2", "at least 1")),
        (choose_shard_size, (4,), ("shard_size=4", "1, 2")),
        (choose_shard_size, ("nodes",), ("'nodes'", "'node'")),
        (use_a_plugin, (AsyncCheckpointIO,), ("AsyncCheckpointIO", "Leave the plugin out")),
        (use_a_plugin, (foreign_precision,), ("FSDPPrecision", "precision='bf16-mixed'")),
        (synchronise_batch_norms, (), ("sync_batchnorm=True", "Use False")),
        (configure_by_dict, (), ("config={'shard_size': 2}", "MiCSConfig(")),
        (change_shard_size, (), ("shard_size=2", "shard_size=1", "ckpt_path=")),
    ],
)
def test_bad_settings_raise_on_every_rank(
    pool: WorkerPool, function: Any, args: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    for failure in pool.attempt(function, *args, world_size=2):
        assert failure.kind == MiCSConfigError.__name__, failure
        for word in words:
            assert word in failure.message


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen = {name: float(value) for name, value in trainer.logged_metrics.items()}


def monitor() -> dict[str, float]:
    watch = Watch()
    callbacks = [MiCSMonitor(every_n_steps=1), watch, EarlyStopping("val_loss", patience=1)]
    trainer = make_trainer(
        strategy=MiCSStrategy(shard_size=2, node_size=2), accumulate_grad_batches=2, callbacks=callbacks
    )
    trainer.fit(module(), loader(4, trainer.world_size), loader(2, trainer.world_size))
    return watch.seen


def test_the_monitor_logs_bytes_speed_and_memory(pool: WorkerPool) -> None:
    seen = pool.run(monitor, world_size=4)[0]
    mebi, shard_bytes = 2**20, sum(p.numel() for p in reference().parameters()) * 4 / 2
    # Two shards on the node, each all-reduced between two replicas on two nodes: 2 (r-1)/r = 1 time the shard.
    assert seen["mics/replication_reduce_inter_mib"] * mebi == pytest.approx(2 * shard_bytes, rel=0.02)
    assert seen["mics/partition_gather_inter_mib"] == 0
    assert seen["mics/inter_mib"] == pytest.approx(seen["mics/replication_reduce_inter_mib"])
    assert seen["mics/samples_per_s"] > 0
    assert seen["mics/peak_memory_mib"] > 1


class SeenRows(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.rows += batch[0].tolist()
        return super().training_step(batch, batch_idx)


def read_with_lightnings_sampler() -> list[list[int]]:
    ours = SeenRows()
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2, node_size=2))
    trainer.fit(ours, DataLoader(dataset(3, trainer.world_size), batch_size=BATCH, shuffle=True))
    return ours.rows


def test_lightnings_own_sampler_spreads_the_data_over_all_ranks(pool: WorkerPool) -> None:
    seen = [tuple(row) for rows in pool.run(read_with_lightnings_sampler, world_size=4) for row in rows]
    assert sorted(seen) == sorted(map(tuple, dataset(3, 4).tensors[0].tolist()))


def by_name() -> str:
    trainer = make_trainer(strategy="mics")
    trainer.fit(module(), loader(2, trainer.world_size))
    return str(trainer.strategy.layout)


def test_the_strategy_is_registered_by_name(pool: WorkerPool) -> None:
    assert "1 replica(s) x 2 shard(s)" in pool.run(by_name, world_size=2)[0]
