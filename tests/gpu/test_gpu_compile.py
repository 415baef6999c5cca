"""Blocks that inductor compiled, before sharding and after it, train as they do eagerly."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from gpu_tools import NEEDS_CARD, on_cards
from models import build, loss_of, microbatch
from torch import Tensor, nn

from lightning_mics import Hop, MiCSConfig, communication_ledger, defer_replication_sync, mics_shard
from lightning_mics.testing import WorkerPool, full_state_dict, shard_batch, weight_differences, worker_device

pytestmark = NEEDS_CARD

ACCUMULATE, STEPS = 2, 4


def compile_blocks(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("GPT2Block"):
            module.compile(dynamic=False)


def train(compiled: str) -> tuple[dict[str, Tensor], int, list[int]]:
    """Returns the weights, how often something was compiled after two steps, and the calls of hop two a unit."""
    world, rank, device = dist.get_world_size(), dist.get_rank(), worker_device()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build("gpt2")
    if compiled == "before":
        compile_blocks(model)
    config = MiCSConfig(shard_size=2, node_size=2, wrap="GPT2Block")
    mics_shard(model, config, device_type=device.type)
    if compiled == "after":
        compile_blocks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    graphs = 0
    for step in range(STEPS):
        for index in range(ACCUMULATE):
            rows = microbatch("gpt2", step * ACCUMULATE + index, 2 * world)
            with defer_replication_sync(model, enabled=index + 1 < ACCUMULATE):
                loss = loss_of("gpt2", model, shard_batch(rows, rank, world).to(device))
                (loss / ACCUMULATE).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    late = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    assert (graphs > 0) == (compiled != "never")
    ledger = communication_ledger(model)
    return full_state_dict(model), late, [ledger.total(Hop.REPLICATION_REDUCE, unit).calls for unit in ledger.units()]


@pytest.mark.parametrize("compiled", ["before", "after"])
def test_compiled_blocks_train_as_eager_ones(pool: WorkerPool, compiled: str) -> None:
    eager, _, hops = on_cards(pool, train, "never")[0]
    for weights, late, own_hops in on_cards(pool, train, compiled):
        assert max(weight_differences(weights, eager).values()) < 1e-5
        assert late == 0
        assert own_hops == hops
