"""What is gathered and reduced in which dtype, by the bytes of the ledger."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from models import WIDTH, build, loss_of, microbatch, regression_loss
from torch import Tensor, nn

from lightning_mics import (
    Hop,
    MiCSConfig,
    MiCSConfigError,
    communication_ledger,
    defer_replication_sync,
    mics_shard,
)
from lightning_mics.core.loss_scaling import MiCSGradScaler
from lightning_mics.core.runtime import runtime_of
from lightning_mics.precision import PRECISIONS
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict

CONFIG = MiCSConfig(shard_size=2, node_size=2)


def step_bytes(name: str, settings: dict[str, object], dtype: torch.dtype) -> dict[Hop, int]:
    """Returns the message bytes of each hop of one step."""
    model = mics_shard(build(name).to(dtype), CONFIG.replace(**settings))
    rows = microbatch(name, 0, 4)
    rows = rows.to(dtype) if rows.is_floating_point() else rows
    loss_of(name, model, rows).float().backward()
    assert all(param.dtype is dtype and param.grad is not None for param in model.parameters())
    return {hop: traffic.message_bytes for hop, traffic in communication_ledger(model).by_hop().items()}


@pytest.mark.parametrize("name", ["uneven", "gpt2", "tied"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float16"])
def test_16_bit_gathers_move_exactly_half_the_bytes(pool: WorkerPool, name: str, param_dtype: str) -> None:
    full = pool.run(step_bytes, name, {}, torch.float32, world_size=4)
    half = pool.run(step_bytes, name, {"param_dtype": param_dtype}, torch.float32, world_size=4)
    for whole, mixed in zip(full, half, strict=True):
        assert 2 * mixed[Hop.PARTITION_GATHER] == whole[Hop.PARTITION_GATHER] > 0
        # Gradients are reduced in float32 all the same.
        assert mixed[Hop.PARTITION_REDUCE] == whole[Hop.PARTITION_REDUCE] > 0
        assert mixed[Hop.REPLICATION_REDUCE] == whole[Hop.REPLICATION_REDUCE] > 0


@pytest.mark.parametrize(("reduce_dtype", "share"), [("float32", 1), ("bfloat16", 2), (None, 2)])
def test_reduce_dtype_decides_about_both_reductions(pool: WorkerPool, reduce_dtype: str | None, share: int) -> None:
    full = pool.run(step_bytes, "uneven", {}, torch.float32, world_size=4)
    low = pool.run(step_bytes, "uneven", {"reduce_dtype": reduce_dtype}, torch.bfloat16, world_size=4)
    for whole, found in zip(full, low, strict=True):
        for hop in (Hop.PARTITION_REDUCE, Hop.REPLICATION_REDUCE):
            assert share * found[hop] == whole[hop]


def train_in_float64(settings: dict[str, object], frozen: bool) -> tuple[torch.dtype, dict[str, Tensor]]:
    """Returns the dtype of sums of gradients, and the weights after two steps of two microsteps."""
    net = build("uneven").double()
    model = mics_shard(net.requires_grad_(not frozen), CONFIG.replace(**settings))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(0 if frozen else 2):
        for last in (False, True):
            rows = microbatch("uneven", 2 * step + last, 8).double()[dist.get_rank() :: dist.get_world_size()]
            with defer_replication_sync(model, enabled=not last):
                regression_loss(model, rows).div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return runtime_of(model).config.reduce_dtype, full_state_dict(net)


def test_gradients_of_float64_parameters_are_not_rounded(pool: WorkerPool) -> None:
    alone = build("uneven").double()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(2):
        for microstep in (2 * step, 2 * step + 1):
            regression_loss(alone, microbatch("uneven", microstep, 8).double()).div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for dtype, weights in pool.run(train_in_float64, {}, False, world_size=4):
        assert dtype is torch.float64
        assert_parity(weights, alone.state_dict(), 1e-14)
    for settings, frozen, expected in (
        ({"reduce_dtype": "bfloat16"}, False, torch.bfloat16),
        ({"param_dtype": "bfloat16"}, False, torch.float32),
        ({}, True, torch.float32),
    ):
        assert {dtype for dtype, _ in pool.run(train_in_float64, settings, frozen, world_size=4)} == {expected}


class Watcher(nn.Module):
    """Notes the dtypes that arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        x = self.first(x.to(self.first.weight.dtype))
        for block in self.blocks:
            x = block(x.float())
            self.seen.append(x.dtype)
        return x.sum(1, keepdim=True)


def dtypes_seen(settings: dict[str, object]) -> tuple[list[torch.dtype], torch.dtype]:
    model = mics_shard(Watcher(), CONFIG.replace(param_dtype="bfloat16", **settings))
    output = model(torch.ones(2, 5))
    return model.seen, output.dtype


def test_inputs_and_outputs_are_cast_as_asked(pool: WorkerPool) -> None:
    half, full = torch.bfloat16, torch.float32
    for settings, expected in (
        ({}, ([half, half, half], half)),
        ({"cast_forward_inputs": "units"}, ([full, half, half], half)),
        ({"output_dtype": "float32"}, ([half, half, half], full)),
    ):
        assert pool.run(dtypes_seen, settings, world_size=2) == [expected] * 2


def test_lightnings_precisions_become_gather_dtypes() -> None:
    assert MiCSConfig().with_precision("bf16-mixed").param_dtype is torch.bfloat16
    assert MiCSConfig().with_precision("16-mixed").param_dtype is torch.float16
    assert MiCSConfig(param_dtype="bfloat16").with_precision("16-mixed").param_dtype is torch.bfloat16
    for precision in ("32-true", "bf16-true"):
        assert MiCSConfig().with_precision(precision) == MiCSConfig()
    assert all(MiCSConfig().with_precision(p).reduce_dtype is torch.float32 for p in PRECISIONS if p != "64-true")
    assert MiCSConfig().with_precision("64-true") == MiCSConfig(reduce_dtype="float64")
    with pytest.raises(MiCSConfigError, match=r"precision='transformer-engine' is not supported by MiCS. Values that"):
        MiCSConfig().with_precision("transformer-engine")


def overflow_on_one_rank() -> tuple[float, bool]:
    """Returns the scale after the step and whether the step was taken."""
    model = mics_shard(build("uneven"), CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = MiCSGradScaler(device="cpu", init_scale=4.0, growth_interval=100)
    before = model.blocks[0].up.weight.to_local().clone()
    scaler.scale(regression_loss(model, microbatch("uneven", 0, 2))).backward()
    if dist.get_rank() == 1:
        model.blocks[0].up.weight.grad.to_local()[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), not torch.equal(before, model.blocks[0].up.weight.to_local())


def test_an_overflow_on_one_rank_skips_the_step_everywhere(pool: WorkerPool) -> None:
    assert pool.run(overflow_on_one_rank, world_size=4) == [(2.0, False)] * 4
