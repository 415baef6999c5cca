"""A bit that flips in one replica: found before the next step's gradients are averaged, named, repaired or raised."""

from __future__ import annotations

import random
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate_tools import make_accelerator
from lightning_tools import LanguageModel, loader, make_trainer, where
from models import build, loss_of, microbatch, regression_loss
from torch import Tensor, nn
from works import works

from lightning_mics import MiCSConfig, SelfCheckError, defer_replication_sync, mics_shard
from lightning_mics.core.drift import DriftCheck
from lightning_mics.core.fingerprints import fingerprint, fingerprints, joint_fingerprint
from lightning_mics.core.runtime import runtime_of
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict

ROWS = 2


class Flip:
    """Flips a bit of one rank's shards right after an optimizer step."""

    def __init__(self, optimizer: torch.optim.Optimizer, at: int, rank: int, *, bit: int = 30, in_state: bool = False):
        self.step, self.at, self.rank, self.bit, self.in_state = 0, at, rank, bit, in_state
        optimizer.register_step_post_hook(self)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        if self.step == self.at and dist.get_rank() == self.rank:
            shards = [(param, param.to_local()) for group in optimizer.param_groups for param in group["params"]]
            param, shard = next((param, shard) for param, shard in shards if shard.numel() > 1)
            target = optimizer.state[param]["exp_avg"].to_local() if self.in_state else shard
            target.detach().view(-1).view(torch.int32)[-1] ^= 1 << self.bit


def train(
    settings: dict[str, Any], accumulate: int, steps: int, flip: dict[str, Any] | None
) -> tuple[dict[str, Tensor], int, str]:
    """Returns the weights, the steps that were taken, and the error that ended them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = mics_shard(build("uneven"), MiCSConfig(verify=False, verify_every=1, **settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if flip is not None:
        Flip(optimizer, **flip)
    taken, error = 0, ""
    try:
        for step in range(steps):
            for index in range(accumulate):
                rows = microbatch("uneven", step * accumulate + index, world * ROWS)[rank * ROWS : (rank + 1) * ROWS]
                with defer_replication_sync(model, enabled=index + 1 < accumulate):
                    (regression_loss(model, rows) / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            taken += 1
    except SelfCheckError as found:
        error = str(found)
    return full_state_dict(model) if not error else {}, taken, error


def check_layout(shard: int, accumulate: int, at: int, guilty: int, bit: int, steps: int) -> None:
    world = dist.get_world_size()
    replicas = world // shard
    settings: dict[str, Any] = {"shard_size": shard, "node_size": shard}
    flip = {"at": at, "rank": guilty, "bit": bit}
    case = f"world {world}, {settings}, accumulate {accumulate}, {flip}"
    clean, taken, error = train(settings, accumulate, steps, None)
    assert (taken, error) == (steps, ""), case
    for mode in ("raise", "repair"):
        weights, taken, error = train({**settings, "on_mismatch": mode}, accumulate, steps, flip)
        if mode == "repair" and replicas > 2:
            assert (taken, error) == (steps, ""), f"{case}: {error}"
            assert_parity(weights, clean)
            continue
        assert taken == at and f"after optimizer step {at} (verify_every=1)" in error, f"{case}: {taken} {error}"
        group = [rank for rank in range(world) if rank % shard == guilty % shard]
        others = ", ".join(str(rank) for rank in group if rank != guilty)
        if replicas > 2:
            assert f"rank {guilty} holds another shard of " in error and f"than ranks {others}, the majority" in error
        else:
            assert f"ranks {', '.join(map(str, group))} hold different shards of " in error, error
            assert "no majority" in error


def layouts() -> None:
    world = dist.get_world_size()
    for shard in (1, 2, 4):
        if world % shard == 0 and world // shard > 1:
            for accumulate in (1, 3):
                check_layout(shard, accumulate, at=2, guilty=world - 1, bit=30, steps=4)


@works("Training loops", "Flipped bit in one replica (verify_every=1)")
@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_a_flipped_bit_is_named_and_repaired(pool: WorkerPool, world_size: int) -> None:
    pool.run(layouts, world_size=world_size)


def random_bits(seed: int, count: int) -> None:
    choice = random.Random(seed)
    world = dist.get_world_size()
    for _ in range(count):
        shard = choice.choice([size for size in (1, 2) if world % size == 0 and world // size > 1])
        at, guilty, bit = choice.randrange(1, 50), choice.randrange(world), choice.randrange(31)
        check_layout(shard, choice.choice([1, 3]), at, guilty, bit, steps=50)


@pytest.mark.parametrize("world_size", [2, 3])
def test_fifty_steps_and_a_random_bit(pool: WorkerPool, world_size: int) -> None:
    pool.run(random_bits, 1, 1, world_size=world_size)


@pytest.mark.campaign
@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_many_random_bits(pool: WorkerPool, world_size: int) -> None:
    pool.run(random_bits, 2, 20, world_size=world_size, timeout=600)


def a_state_then_two_models() -> None:
    settings: dict[str, Any] = {"shard_size": 1, "node_size": 1, "on_mismatch": "repair"}
    clean, *_ = train(settings, 1, 4, None)
    weights, taken, error = train(settings, 1, 4, {"at": 2, "rank": 1, "bit": 30, "in_state": True})
    assert (taken, error) == (4, "")
    assert_parity(weights, clean)  # the weight differed one step later; its states came with it
    models = [mics_shard(build("uneven", index), MiCSConfig(**settings, verify_every=2)) for index in range(2)]
    optimizer = torch.optim.SGD([param for model in models for param in model.parameters()], lr=0.1)
    Flip(optimizer, at=1, rank=0)
    for step in range(4):
        for model in models:
            regression_loss(model, microbatch("uneven", step, ROWS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for model in models:
        for param in model.parameters():
            everyones = [torch.empty_like(param.to_local()) for _ in range(3)]
            dist.all_gather(everyones, param.to_local().detach())
            assert all(torch.equal(other, everyones[0]) for other in everyones)


def test_states_are_repaired_and_every_model_is_compared(pool: WorkerPool) -> None:
    pool.run(a_state_then_two_models, world_size=3)


def never_and_alone() -> list[bool]:
    found = []
    for shard, every in ((1, None), (1, 0), (2, 1)):
        model = mics_shard(build("uneven"), MiCSConfig(shard_size=shard, verify=False, verify_every=every))
        found.append(any(isinstance(observer, DriftCheck) for observer in runtime_of(model).window._observers))
        regression_loss(model, microbatch("uneven", 0, ROWS)).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found


def test_without_the_setting_or_without_replicas_nothing_is_compared(pool: WorkerPool) -> None:
    assert pool.run(never_and_alone, world_size=2) == [[False] * 3] * 2


# The ways in.


class _Flipping(LanguageModel):
    def configure_optimizers(self) -> object:
        found: Any = super().configure_optimizers()
        Flip(found["optimizer"], at=2, rank=1)
        return found


def _trainer(mode: str) -> nn.Module:
    from lightning_mics.lightning.trainer import MiCSStrategy

    model = _Flipping()
    strategy = MiCSStrategy(shard_size=1, verify_every=1, on_mismatch=mode)
    trainer = make_trainer(strategy=strategy, max_steps=4, limit_val_batches=0)
    trainer.fit(model, loader(8, dist.get_world_size()))
    return model


def _fabric(mode: str) -> nn.Module:
    from lightning.fabric import Fabric

    from lightning_mics.fabric import MiCSStrategy

    fabric = Fabric(strategy=MiCSStrategy(shard_size=1, verify_every=1, on_mismatch=mode), **where())
    fabric.launch()
    model = build("uneven")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    Flip(optimizer.optimizer, at=2, rank=1)
    for step in range(4):
        fabric.backward(regression_loss(model, microbatch("uneven", step, ROWS)))
        optimizer.step()
        optimizer.zero_grad()
    return model


def _accelerate(mode: str) -> nn.Module:
    accelerator = make_accelerator(settings={"shard_size": 1, "verify_every": 1, "on_mismatch": mode})
    model = build("gpt2")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    Flip(optimizer.optimizer, at=2, rank=1)
    for step in range(4):
        accelerator.backward(loss_of("gpt2", model, microbatch("gpt2", step, ROWS)))
        optimizer.step()
        optimizer.zero_grad()
    return model


def _transformers(mode: str) -> nn.Module:
    from test_transformers import make_trainer as make_hf_trainer

    from lightning_mics.accelerate import MiCSPlugin
    from lightning_mics.transformers import MiCSTrainer

    class Flipping(MiCSTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            is_new = self.optimizer is None
            optimizer = super().create_optimizer(*args, **kwargs)
            if is_new:
                Flip(optimizer, at=2, rank=1)
            return optimizer

    plugin = MiCSPlugin(shard_size=1, verify_every=1, on_mismatch=mode)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_hf_trainer(Flipping, folder, build("gpt2"), ROWS, plugin=plugin)
        trainer.train()
        return trainer.model


def through_the_ways_in() -> None:
    for way in (_trainer, _fabric, _accelerate, _transformers):
        with pytest.raises(SelfCheckError, match="after optimizer step 2 ") as raised:
            way("raise")
        assert "rank 1 holds another shard" in str(raised.value), way.__name__
        shards = [param.to_local().detach() for param in way("repair").parameters()]
        total = fingerprints(shards, torch.device("cpu")).sum()
        everyones = [torch.empty_like(total) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, total)
        assert len(set(map(int, everyones))) == 1, way.__name__


def test_through_every_way_in(pool: WorkerPool) -> None:
    pool.run(through_the_ways_in, world_size=3, timeout=120)


# Fingerprints.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.complex128])
def test_fingerprints_see_every_bit_and_every_exchange(dtype: torch.dtype) -> None:
    choice = random.Random(0)
    for numel in (1, 3, 257, 5000, 600_000):
        values = torch.ones(numel).to(dtype)
        if dtype is not torch.uint8:
            values[::2] = -1  # which differ in one bit, the highest
        device = torch.device("cpu")
        before = [int(fingerprint(values)), int(joint_fingerprint([values, values], device))]
        bits = values.view(-1).view(torch.uint8)
        for _ in range(20):
            place, bit = choice.randrange(len(bits)), 1 << choice.randrange(8)
            bits[place] ^= bit
            assert (
                int(fingerprint(values)) != before[0] and int(joint_fingerprint([values, values], device)) != before[1]
            )
            bits[place] ^= bit
        assert int(fingerprint(values)) == before[0]
        for _ in range(20):
            first, second = choice.randrange(numel), choice.randrange(numel)
            if values[first] != values[second]:
                changed = values.clone()
                changed[[first, second]] = values[[second, first]]
                assert int(fingerprint(changed)) != before[0]
