"""Float32 rows with those who step on them, and shards in 16 bits: what is held, read, written, saved and refused."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from way_tools import WAYS, WIDTH, adamw
from works import refused, works

from lightning_mics import (
    MiCSConfig,
    MiCSConfigError,
    MiCSError,
    SelfCheckError,
    load_checkpoint,
    mics_shard,
    save_checkpoint,
)
from lightning_mics.core.masters import master_of
from lightning_mics.core.runtime import MiCSRuntime
from lightning_mics.testing import WorkerPool, full_state_dict

OWNERS = MiCSConfig(
    shard_size=2,
    node_size=2,
    optimizer_shard_size="world",
    param_dtype="bfloat16",
    master_weights="owners",
    wrap=nn.Linear,
)
PARTITION = OWNERS.replace(master_weights="partition")


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def made(config: MiCSConfig, seed: int = 0, **model: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    sharded = mics_shard(net(seed, **model), config)
    return sharded, torch.optim.AdamW(sharded.parameters(), lr=0.01)


def loss_of(model: nn.Module, step: int) -> Tensor:
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
    loss: Tensor = model(rows).float().square().mean()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What is held.


def twenty_steps(config: MiCSConfig) -> tuple[list[float], dict[str, Tensor], dict[str, int]]:
    """Returns losses, weights, and the bytes of what this rank holds."""
    model, optimizer = made(config)
    losses = train(model, optimizer, range(19))
    loss = loss_of(model, 19)
    loss.backward()
    params = list(model.parameters())
    held = {
        "shards": sum(param.to_local().nbytes for param in params),
        "gradients": sum(param.grad.to_local().nbytes for param in params),
        "masters": sum(0 if (rows := master_of(param)) is None else rows.to_local().nbytes for param in params),
        "states": sum(
            value.to_local().nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, DTensor)
        ),
    }
    optimizer.step()
    return [*losses, loss.item()], full_state_dict(model), held


@works("Optimizers", "Float32 weights with those who step on them, and shards in 16 bits (master_weights)")
def test_losses_are_those_of_float32_shards_and_bytes_fall(pool: WorkerPool) -> None:
    numel = sum(param.numel() for param in net().parameters())
    in_shards = pool.run(twenty_steps, PARTITION, world_size=4)
    with_owners = pool.run(twenty_steps, OWNERS, world_size=4)
    for (losses, weights, _), (own_losses, own_weights, held) in zip(in_shards, with_owners, strict=True):
        assert own_losses == losses and same(own_weights, weights)
        # Of n elements: 2/p of shards, 4/N of masters, 8/N of states; slices of gradients after hop two.
        assert held == {
            "shards": 2 * numel // 2, "masters": 4 * numel // 4, "states": 8 * numel // 4, "gradients": 4 * numel // 4
        }  # fmt: skip


# What is read, written and loaded.


def write_in_all_ways() -> list[str]:
    """Returns what did not come out as it was written."""
    wrong = []
    model, optimizer = made(OWNERS)
    train(model, optimizer, range(2))
    state = full_state_dict(model)
    assert {value.dtype for value in state.values()} == {torch.float32}

    def check(what: str, expected: dict[str, Tensor]) -> None:
        found = full_state_dict(model)
        rounded = {name: param.full_tensor().detach() for name, param in model.named_parameters()}
        if not same(found, expected):
            wrong.append(f"{what}: state_dict")
        if not same(rounded, {name: value.bfloat16() for name, value in expected.items()}):
            wrong.append(f"{what}: shards")

    check("steps", state)
    whole = {name: value + 1e-4 for name, value in state.items()}
    model.load_state_dict(whole)
    check("load_state_dict of whole tensors", whole)
    model.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()})
    check("load_state_dict of slices", {name: value * 1.01 for name, value in whole.items()})
    model.load_state_dict(whole, assign=True)
    check("load_state_dict(assign=True)", whole)
    shards = mics_shard(net(5), PARTITION)
    model.load_state_dict(shards.state_dict())
    check("load_state_dict of shards", full_state_dict(shards))
    wider = mics_shard(net(6), MiCSConfig(shard_size=4, node_size=4))
    model.load_state_dict(wider.state_dict())
    check("load_state_dict of larger partitions", full_state_dict(wider))
    by_two = mics_shard(net(7), OWNERS.replace(shard_size=1, node_size=1, optimizer_shard_size=2))
    model.load_state_dict(by_two.state_dict())
    check("load_state_dict of other slices", full_state_dict(by_two))
    if any(
        value is not dict(model.named_parameters())[name] for name, value in model.state_dict(keep_vars=True).items()
    ):
        wrong.append("keep_vars")
    before = full_state_dict(model)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)
    check("a write to shards", {name: (value.bfloat16() * 0.5).float() for name, value in before.items()})
    before = full_state_dict(model)
    model.load_state_dict({name: value.bfloat16() for name, value in before.items()})
    check("load_state_dict of 16 bits", {name: value.bfloat16().float() for name, value in before.items()})
    # States of an optimizer come back in float32, and training goes on from them.
    saved = optimizer.state_dict()
    other = torch.optim.AdamW(model.parameters(), lr=0.01)
    other.load_state_dict(saved)
    states = zip(*([v for s in o.state.values() for v in s.values()] for o in (optimizer, other)), strict=True)
    if not all(a.dtype == b.dtype and torch.equal(local(a), local(b)) for a, b in states):
        wrong.append("optimizer.load_state_dict")
    return wrong


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_what_is_written_is_read(pool: WorkerPool) -> None:
    assert pool.run(write_in_all_ways, world_size=4) == [[]] * 4


def go_on(path: str, config: MiCSConfig, steps: range, sharded: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Trains on from a checkpoint, if there is one, and leaves one."""
    model, optimizer = made(config, seed=steps.start)
    if Path(path).exists():
        load_checkpoint(path, model, optimizer)
    losses = train(model, optimizer, steps)
    save_checkpoint(path, model, optimizer, sharded=sharded)
    return losses, full_state_dict(model)


@works("Savers", "Float32 weights with those who step on them (master_weights), resumed to the bit, also as shards")
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_checkpoints_have_float32_and_go_either_way(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    whole = pool.run(go_on, str(tmp_path / "whole"), PARTITION, range(4), sharded, world_size=4)
    for first, second in itertools.product((PARTITION, OWNERS), repeat=2):
        path = str(tmp_path / f"{first.master_weights}-{second.master_weights}")
        before = pool.run(go_on, path, first, range(2), sharded, world_size=4)
        after = pool.run(go_on, path, second, range(2, 4), sharded, world_size=4)
        for rank in range(4):
            assert before[rank][0] + after[rank][0] == whole[rank][0]
            assert same(after[rank][1], whole[rank][1])
    to_two = pool.run(go_on, path, OWNERS.replace(shard_size=1, node_size=1), range(4, 4), sharded, world_size=2)
    assert same(to_two[0][1], whole[0][1])


def train_in_16_bits() -> tuple[bool, bool]:
    model, optimizer = made(OWNERS, dtype=torch.bfloat16)
    reference = mics_shard(net(dtype=torch.bfloat16).float(), PARTITION)
    losses = train(model, optimizer, range(3))
    expected = train(reference, torch.optim.AdamW(reference.parameters(), lr=0.01), range(3))
    return losses == expected, same(full_state_dict(model), full_state_dict(reference))


def test_a_model_in_16_bits_gets_float32_masters(pool: WorkerPool) -> None:
    assert pool.run(train_in_16_bits, world_size=4) == [(True, True)] * 4


def renormalise(place: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(9, 8, max_norm=0.5), nn.Linear(8, 8))
    model = mics_shard(table, OWNERS.replace(master_weights=place))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(3):
        model(torch.arange(4) + dist.get_rank() + step).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return full_state_dict(model)


def test_rows_of_embeddings_are_renormalised_in_float32(pool: WorkerPool) -> None:
    in_shards, with_owners = (pool.run(renormalise, place, world_size=4)[0] for place in ("partition", "owners"))
    assert same(with_owners, in_shards)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {"loss": self.down(torch.tanh(self.up(rows))).float().square().mean()}


def in_every_way() -> list[str]:
    """Returns in which ways shards are not in 16 bits, or weights not those of float32 shards."""
    wrong = []
    for name, way in WAYS.items():
        found = []
        for place in ("partition", "owners"):
            torch.manual_seed(0)
            settings = {"optimizer_shard_size": "world", "param_dtype": "bfloat16", "wrap": nn.Linear}
            model = way(Small(), adamw, 2, {**settings, "shard_size": 2, "node_size": 2, "master_weights": place})
            weights = full_state_dict(model)
            found.append((weights, {param.dtype for param in model.parameters()}))
        (weights, _), (own, dtypes) = found
        if dtypes != {torch.bfloat16} or not same(own, weights):
            wrong.append(name)
    return wrong


def test_every_way_in_takes_them(pool: WorkerPool) -> None:
    assert pool.run(in_every_way, world_size=4, timeout=180) == [[]] * 4


# What goes wrong.


def flip(mode: str) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """Flips the last bit of a master of one of three instances; returns the error, or weights with and without it."""
    found = []
    for is_flipped in (False, True):
        config = OWNERS.replace(shard_size=1, node_size=1, optimizer_shard_size=2, verify_every=1, on_mismatch=mode)
        model, optimizer = made(config)
        train(model, optimizer, range(1))
        rows = master_of(model[2].weight).to_local()
        if is_flipped and dist.get_rank() == 3:
            rows.view(torch.int32).view(-1)[5] ^= 1
        try:
            train(model, optimizer, range(1, 4))
        except SelfCheckError as error:
            return str(error), {}, {}
        found.append(full_state_dict(model))
    return "", *found


def test_instances_of_masters_are_compared(pool: WorkerPool) -> None:
    for error, clean, repaired in pool.run(flip, "repair", world_size=6):
        assert not error and same(repaired, clean)
    for error, *_ in pool.run(flip, "raise", world_size=6):
        assert "rank 3 holds another shard of the float32 values of 2.weight than ranks" in error


class Breaks(torch.optim.SGD):
    """Raises when half of the parameters have been stepped on, if it is told to."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            params = self.param_groups[0]["params"]
            for index, param in enumerate(params):
                if self.param_groups[0]["nesterov"] and index == len(params) // 2:
                    raise RuntimeError("broken")
                param.sub_(param.grad, alpha=0.1)


def break_a_step(place: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    model = mics_shard(net(), OWNERS.replace(master_weights=place))
    optimizer = Breaks(model.parameters(), lr=0.1)
    losses = train(model, optimizer, range(1))
    loss_of(model, 1).backward()
    optimizer.param_groups[0]["nesterov"] = True
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    optimizer.param_groups[0]["nesterov"] = False
    after_error = full_state_dict(model) if place == "owners" else {}
    optimizer.zero_grad()
    losses += train(model, optimizer, range(2, 4))
    return losses, full_state_dict(model), after_error


def test_a_step_that_raises_leaves_what_it_did(pool: WorkerPool) -> None:
    expected, found = (pool.run(break_a_step, place, world_size=4) for place in ("partition", "owners"))
    for (losses, weights, _), (own_losses, own_weights, after_error) in zip(expected, found, strict=True):
        assert own_losses == losses and same(own_weights, weights)
        assert {value.dtype for value in after_error.values()} == {torch.float32}


def refusals() -> list[str]:
    said = []

    def error_of(what: Any) -> None:
        with pytest.raises(MiCSError) as raised:
            what()
        said.append(str(raised.value))

    model = made(OWNERS)[0]
    penalty = sum(param.full_tensor().square().sum() for param in model.parameters())
    error_of(lambda: (loss_of(model, 0) + penalty).backward())
    model = made(OWNERS)[0]
    model.float()
    error_of(lambda: loss_of(model, 0).backward())
    return said


PENALTY = refused(
    "Optimizers",
    "Penalties on shards whose float32 is with those who step on them (master_weights)",
    says="a penalty on parameters would be one of rounded values",
)


@PENALTY
def test_what_would_see_16_bits_is_refused(pool: WorkerPool) -> None:
    for said in pool.run(refusals, world_size=4):
        PENALTY.check(said[0])
        assert "was converted to torch.float32" in said[1]


def shard_wrongly(settings: dict[str, Any]) -> str:
    with pytest.raises(MiCSConfigError) as raised:
        mics_shard(net(), OWNERS.replace(**settings))
    assert raised.value.setting == "master_weights"
    return str(raised.value)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"optimizer_shard_size": "partition"}, "Use optimizer_shard_size='world'"),
        ({"param_dtype": None}, "Use param_dtype='bfloat16'"),
        ({"cpu_offload": True}, "Use cpu_offload=False"),
    ],
)
def test_settings_that_leave_nothing_to_do_are_refused(pool: WorkerPool, settings: dict[str, Any], said: str) -> None:
    assert all(said in error for error in pool.run(shard_wrongly, settings, world_size=2))


def models_left(config: MiCSConfig) -> int:
    """Returns how many sharded models are left when one has been trained and dropped."""

    def run() -> None:
        model, optimizer = made(config)
        train(model, optimizer, range(2))

    def alive() -> set[int]:
        gc.collect()
        return {id(found) for found in gc.get_objects() if type(found) is MiCSRuntime}

    before = alive()
    run()
    return len(alive() - before)


@pytest.mark.parametrize("config", [PARTITION, OWNERS])
def test_a_model_that_nobody_holds_is_gone_with_its_groups(pool: WorkerPool, config: MiCSConfig) -> None:
    assert pool.run(models_left, config, world_size=4) == [0] * 4
