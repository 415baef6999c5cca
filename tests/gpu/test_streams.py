"""On CUDA, hop one and hop two run on streams of their own; the numbers are those of one process all the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from models import Block, microbatch, regression_loss
from torch import Tensor, nn

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core._torch import forget_dtensor_meshes
from lightning_mics.core.runtime import is_sharded
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict, shard_batch

# A process that has asked the driver for devices must not fork; the pool's server forks, and its imports ask.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH, ROWS, WINDOWS, ACCUMULATE = 512, 8, 2, 4
# Sums of a wide model round more than those of the small ones; a race between streams shows in whole values.
TOLERANCE = 1e-4


def build_wide(seed: int = 0) -> nn.Module:
    """Kernels long enough for the host to run ahead of them."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, WIDTH), *(Block(WIDTH, 2 * WIDTH) for _ in range(6)), nn.Linear(WIDTH, 1))


def train(model: nn.Module, device: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for window in range(WINDOWS):
        for index in range(ACCUMULATE):
            rows = shard_batch(microbatch("uneven", window * ACCUMULATE + index, ROWS), rank, world).to(device)
            defers = is_sharded(model) and index + 1 < ACCUMULATE
            with defer_replication_sync(model) if defers else nullcontext():
                (regression_loss(model, rows) / ACCUMULATE).backward()
        optimizer.step()
        optimizer.zero_grad()
    return full_state_dict(model)


def train_alone(device: str) -> dict[str, Tensor]:
    return train(build_wide().to(device), device)


def train_sharded(shard_size: int, device: str) -> dict[str, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    config = MiCSConfig(shard_size=shard_size, node_size=world, wrap="Block")
    return train(mics_shard(build_wide(seed=rank), config, device_type=device), device, rank, world)


def use_first_card() -> None:
    """Keeps a DeviceMesh from choosing the card with the number of the local rank."""
    torch.cuda.init()
    torch.cuda.set_device(0)


@pytest.fixture
def nccl_world_of_one() -> Iterator[None]:
    use_first_card()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    forget_dtensor_meshes()


@pytest.mark.skipif(not dist.is_nccl_available(), reason="needs NCCL")
def test_one_rank_on_nccl_trains_like_plain_pytorch(nccl_world_of_one: None) -> None:
    assert_parity(train_sharded(1, "cuda"), train_alone("cuda"), TOLERANCE)


def compare_on_one_card(shard_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    use_first_card()
    return train_sharded(shard_size, "cuda"), train_alone("cuda")


@pytest.mark.parametrize("shard_size", [2, 1])
def test_two_ranks_on_one_card_train_like_one_process(pool: WorkerPool, shard_size: int) -> None:
    # NCCL refuses two ranks on one card; gloo takes CUDA tensors, and the rings, which do not, leave them to it.
    for sharded, alone in pool.run(compare_on_one_card, shard_size, world_size=2, timeout=120):
        assert_parity(sharded, alone, TOLERANCE)
