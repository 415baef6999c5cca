"""The Fabric strategy against one process that sees the global batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning_tools import Net, PoolEnvironment, cross_entropy, dataset, make_optimizer
from safetensors.torch import load_file
from torch import Tensor

from lightning_mics import CheckpointError, Hop, consolidate
from lightning_mics.fabric import MiCSStrategy
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict, relative_difference

ACCUMULATE, STEPS, ROWS = 3, 4, 2


def make_fabric(precision: str = "32-true", **settings: Any) -> Fabric:
    fabric = Fabric(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=MiCSStrategy(**{"shard_size": 2, "node_size": 2, **settings}),
        plugins=[PoolEnvironment()],
        precision=precision,
    )
    fabric.launch()
    return fabric


def microbatches(world_size: int) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = dataset(ACCUMULATE * STEPS, world_size).tensors
    size = world_size * ROWS
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def reference() -> Net:
    torch.manual_seed(4)
    return Net()


def train(fabric: Fabric, model: Any, optimizer: Any, steps: range) -> list[float]:
    """Runs optimizer steps; returns the norm of each step's gradient."""
    world_size, rank, norms = fabric.world_size, fabric.global_rank, []
    batches = microbatches(world_size)
    for step in steps:
        for index in range(ACCUMULATE):
            inputs, targets = (rows[rank::world_size] for rows in batches[step * ACCUMULATE + index])
            with fabric.no_backward_sync(model, enabled=index + 1 < ACCUMULATE):
                fabric.backward(cross_entropy(model(inputs), targets) / ACCUMULATE)
        norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def train_alone(net: Net, world_size: int) -> list[float]:
    optimizer, norms = make_optimizer("sgd", net.parameters()), []
    batches = microbatches(world_size)
    for step in range(STEPS):
        for inputs, targets in batches[step * ACCUMULATE : (step + 1) * ACCUMULATE]:
            (cross_entropy(net(inputs), targets) / ACCUMULATE).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def compare(settings: dict[str, Any], together: bool) -> None:
    fabric, net, alone = make_fabric(**settings), reference(), reference()
    if together:
        model, optimizer = fabric.setup(net, make_optimizer("sgd", net.parameters()))
    else:
        model = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(make_optimizer("sgd", model.parameters()))
    norms = train(fabric, model, optimizer, range(STEPS))
    expected = train_alone(alone, fabric.world_size)
    assert max(map(relative_difference, norms, expected)) < 1e-5
    assert_parity(full_state_dict(net), alone.state_dict())
    ledger = fabric.strategy.ledger(model)
    for unit in ledger.units():
        assert ledger.total(Hop.PARTITION_REDUCE, unit).calls == ACCUMULATE * STEPS
        assert ledger.total(Hop.REPLICATION_REDUCE, unit).calls == (STEPS if fabric.world_size > 2 else 0)


@pytest.mark.parametrize("together", [True, False], ids=["setup", "setup_module"])
@pytest.mark.parametrize(("world_size", "settings"), [(2, {}), (4, {}), (8, {"shard_size": 2, "node_size": 4})])
def test_fabric_equals_one_process(pool: WorkerPool, world_size: int, settings: dict[str, Any], together: bool) -> None:
    pool.run(compare, settings, together, world_size=world_size)


def save_and_load(folder: str, sharded: bool) -> None:
    fabric, net = make_fabric(save_distributed_checkpoint=sharded), reference()
    model, optimizer = fabric.setup(net, make_optimizer("adamw", net.parameters()))
    train(fabric, model, optimizer, range(2))
    fabric.save(f"{folder}/saved.ckpt", {"model": model, "optimizer": optimizer, "step": 2})
    train(fabric, model, optimizer, range(2, 4))
    expected = full_state_dict(net)

    other = make_fabric(shard_size=4)
    net = Net()
    model, optimizer = other.setup(net, make_optimizer("adamw", net.parameters()))
    state = {"model": model, "optimizer": optimizer, "step": 0}
    assert other.load(f"{folder}/saved.ckpt", state) == {}
    assert state["step"] == 2
    train(other, model, optimizer, range(2, 4))
    assert_parity(full_state_dict(net), expected, tolerance=1e-4)


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_save_and_load_on_another_shard_size(pool: WorkerPool, tmp_path: Any, sharded: bool) -> None:
    pool.run(save_and_load, str(tmp_path), sharded, world_size=4)


def gathered_bytes(precision: str) -> int:
    fabric, net = make_fabric(precision), reference()
    model, optimizer = fabric.setup(net, make_optimizer("sgd", net.parameters()))
    train(fabric, model, optimizer, range(2))
    return fabric.strategy.ledger(model).total(Hop.PARTITION_GATHER).message_bytes


def test_mixed_precision_gathers_half_the_bytes(pool: WorkerPool) -> None:
    full, half = (pool.run(gathered_bytes, precision, world_size=2)[0] for precision in ("32-true", "bf16-mixed"))
    assert 2 * half == full


class Stepping(Net):
    def training_step(self, tokens: Tensor) -> Tensor:
        return cross_entropy(self.head(self.embedding(tokens)), tokens)


def call_a_step() -> bool:
    fabric, net = make_fabric(), Stepping()
    model, _ = fabric.setup(net, make_optimizer("sgd", net.parameters()))
    fabric.backward(model.training_step(torch.zeros(1, 2, dtype=torch.long)))
    return all(param.grad is not None for param in (net.head.weight, net.embedding.weight))


def test_steps_can_be_called_on_the_model(pool: WorkerPool) -> None:
    assert pool.run(call_a_step, world_size=2) == [True, True]


def set_up_a_used_optimizer() -> None:
    fabric, net = make_fabric(), reference()
    optimizer = make_optimizer("adamw", net.parameters())
    cross_entropy(net(torch.zeros(1, 2, dtype=torch.long)), torch.zeros(1, 2, dtype=torch.long)).backward()
    optimizer.step()
    fabric.setup(net, optimizer)


def load_without_a_model() -> None:
    make_fabric().load("nowhere", {"step": 1})


def save_an_optimizer_alone() -> None:
    fabric, net = make_fabric(), reference()
    _, optimizer = fabric.setup(net, make_optimizer("sgd", net.parameters()))
    fabric.save("nowhere", {"optimizer": optimizer})


@pytest.mark.parametrize(
    ("function", "args", "kind", "words"),
    [
        (set_up_a_used_optimizer, (), "MiCSConfigError", ("AdamW", "taken steps")),
        (make_fabric, ("16-true",), "MiCSConfigError", ("16-true", "bf16-mixed")),
        (load_without_a_model, (), "CheckpointError", ("There is no checkpoint at nowhere",)),
        (save_an_optimizer_alone, (), "CheckpointError", ("'optimizer' holds shards", "'model': model")),
    ],
)
def test_bad_use_raises_on_every_rank(
    pool: WorkerPool, function: Any, args: tuple[Any, ...], kind: str, words: tuple[str, ...]
) -> None:
    for failure in pool.attempt(function, *args, world_size=2):
        assert failure.kind == kind, failure
        for word in words:
            assert word in failure.message


def save_under_another_name(folder: str) -> dict[str, Tensor]:
    fabric, net = make_fabric(), reference()
    model = fabric.setup(net)
    fabric.save(f"{folder}/saved.ckpt", {"net": model, "step": 3})
    return full_state_dict(net)


def test_weights_are_found_under_any_name(pool: WorkerPool, tmp_path: Any) -> None:
    saved = pool.run(save_under_another_name, str(tmp_path), world_size=2)[0]
    weights = load_file(consolidate(tmp_path / "saved.ckpt", tmp_path / "weights.safetensors"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())


def load_into_another_optimizer(folder: str, sharded: bool) -> list[str]:
    told: list[str] = []
    for kind in (torch.optim.Adam, torch.optim.RAdam):
        fabric = make_fabric(save_distributed_checkpoint=sharded)
        net = Net()
        model, optimizer = fabric.setup(net, kind(net.parameters()))
        if kind is torch.optim.Adam:
            fabric.save(f"{folder}/saved", {"model": model, "optimizer": optimizer})
            continue
        try:
            fabric.load(f"{folder}/saved", {"model": model, "optimizer": optimizer})
        except CheckpointError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_another_class_of_optimizer_is_an_error(pool: WorkerPool, tmp_path: Any, sharded: bool) -> None:
    for told in pool.run(load_into_another_optimizer, str(tmp_path), sharded, world_size=2):
        assert len(told) == 1 and "saved with amsgrad, unlike RAdam" in told[0]
