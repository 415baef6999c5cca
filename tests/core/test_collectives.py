"""Two-stage collectives against flat ones, and the bytes that leave a node."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from models import build, microbatch, regression_loss
from torch import Tensor

from lightning_mics import ClusterTopology, Hop, MiCSConfig, communication_ledger, mics_shard
from lightning_mics.core._torch import all_gather_single, reduce_scatter_single
from lightning_mics.core.mesh import MiCSMesh, build_mesh
from lightning_mics.core.transport import DeviceTransport, RingTransport, Transport
from lightning_mics.testing import WorkerPool

# Nodes of a partition and ranks on each.
SHAPES = [(2, 2), (4, 2), (2, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64]
NUMELS = [1, 7, 2**16 + 1]  # the last in chunks, on rings
TRANSPORTS = {"backend": DeviceTransport(), "rings": RingTransport(overlaps=True)}


def spanning_mesh(local_size: int, hierarchical: bool = True) -> MiCSMesh:
    topology = ClusterTopology(world_size=dist.get_world_size(), node_size=local_size)
    config = MiCSConfig(shard_size="world", hierarchical=hierarchical)
    return build_mesh(config, topology.layout("world"), "cpu")


def values(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator).to(dtype)
    return torch.randint(0, 255, (numel,), generator=generator).to(dtype)


def gather_all_ways(local_size: int, transport: Transport) -> list[str]:
    """Returns the ways in which the two-stage gather differs from the flat one."""
    mesh, rank, world_size = spanning_mesh(local_size), dist.get_rank(), dist.get_world_size()
    assert len(mesh.stages(two_stages=True)) == 2
    wrong = []
    for dtype, numel, in_place, async_op in itertools.product(DTYPES, NUMELS, (False, True), (False, True)):
        mine = values(numel, dtype, seed=rank)
        expected = torch.empty(world_size * numel, dtype=dtype)
        all_gather_single(expected, mine, group=mesh.partition_group)
        seen: list[int] = []
        gather = transport.all_gather(mesh.stages(two_stages=True), seen.append)
        output = gather.allocate((world_size * numel,), dtype=dtype, device=mine.device)
        part = output[rank * numel : (rank + 1) * numel] if in_place else torch.empty_like(mine)
        part.copy_(mine)
        work = gather(output, part, mesh.partition_group, async_op=async_op)
        if async_op:
            assert isinstance(work, dist.Work)
            # The second stage begins with the wait; on rings a thread may have run both.
            assert isinstance(transport, RingTransport) or not work.is_completed()
            work.wait()
            work.wait()
            assert work.is_completed()
        else:
            assert work is None
        if not torch.equal(output.view(torch.uint8), expected.view(torch.uint8)) or seen != [output.nbytes]:
            wrong.append(f"{dtype}, {numel} elements, in place {in_place}, async {async_op}")
    return wrong


@pytest.mark.parametrize(("num_nodes", "local_size"), SHAPES)
@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS.keys())
def test_the_two_stage_gather_is_bitwise_the_flat_one(
    pool: WorkerPool, num_nodes: int, local_size: int, transport: Transport
) -> None:
    world_size = num_nodes * local_size
    assert pool.run(gather_all_ways, local_size, transport, world_size=world_size) == [[]] * world_size


def reduce_all_ways(local_size: int, transport: Transport) -> list[str]:
    mesh, rank, world_size = spanning_mesh(local_size), dist.get_rank(), dist.get_world_size()
    assert len(mesh.stages(two_stages=True)) == 2
    ops = (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
    wrong = []
    for dtype, numel, op, async_op in itertools.product(DTYPES[:2], NUMELS, ops, (False, True)):
        message = values(world_size * numel, dtype, seed=rank)
        kept = message.clone()
        expected = torch.empty(numel, dtype=dtype)
        reduce_scatter_single(expected, message.clone(), group=mesh.partition_group, op=op)
        seen: list[int] = []
        reduce = transport.reduce_scatter(mesh.stages(two_stages=True), seen.append)
        output = reduce.allocate((numel,), dtype=dtype, device=message.device)
        work = reduce(output, message, mesh.partition_group, op, async_op=async_op)
        if async_op:
            assert isinstance(work, dist.Work)
            work.wait()
        tolerance = 1e-5 if dtype is torch.float32 else 0.1
        if not torch.allclose(output, expected, rtol=tolerance, atol=tolerance) or not torch.equal(message, kept):
            wrong.append(f"{dtype}, {numel} elements, {op}, async {async_op}")
        assert seen == [message.nbytes]
    return wrong


@pytest.mark.parametrize(("num_nodes", "local_size"), SHAPES)
@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS.keys())
def test_the_two_stage_reduction_is_the_flat_one(
    pool: WorkerPool, num_nodes: int, local_size: int, transport: Transport
) -> None:
    world_size = num_nodes * local_size
    assert pool.run(reduce_all_ways, local_size, transport, world_size=world_size) == [[]] * world_size


def step_traffic(local_size: int, hierarchical: bool) -> dict[Hop, tuple[int, int, int]]:
    """Returns calls, message and inter-node bytes of each hop of one step."""
    config = MiCSConfig(shard_size="world", node_size=local_size, hierarchical=hierarchical)
    model = mics_shard(build("uneven"), config)
    regression_loss(model, microbatch("uneven", dist.get_rank(), 2)).backward()
    hops = communication_ledger(model).by_hop()
    return {hop: (traffic.calls, traffic.message_bytes, traffic.inter_bytes) for hop, traffic in hops.items()}


@pytest.mark.parametrize(("num_nodes", "local_size"), SHAPES)
@pytest.mark.parametrize("hierarchical", [True, False], ids=["hierarchical", "flat"])
def test_bytes_that_leave_a_node(pool: WorkerPool, num_nodes: int, local_size: int, hierarchical: bool) -> None:
    p, k = num_nodes * local_size, local_size
    share = (p - k) if hierarchical else (p - 1)
    for hops in pool.run(step_traffic, local_size, hierarchical, world_size=p):
        for hop in (Hop.PARTITION_GATHER, Hop.PARTITION_REDUCE):
            calls, message_bytes, inter_bytes = hops[hop]
            assert calls >= 3  # the root and two blocks
            # Each message is a multiple of p elements, so nothing is rounded.
            assert inter_bytes * p == message_bytes * share
        assert hops[Hop.REPLICATION_REDUCE] == (0, 0, 0)


def flat_collectives(transport: Transport) -> list[int]:
    group = dist.group.WORLD
    assert group is not None
    rank, seen = dist.get_rank(), []
    mine, output = torch.full((3,), float(rank)), torch.empty(6)
    work = transport.all_gather([group], seen.append)(output, mine, group, async_op=True)
    assert isinstance(work, dist.Work)
    work.wait()
    assert output.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    part = torch.empty(3)
    assert transport.reduce_scatter([group], seen.append)(part, output, group, dist.ReduceOp.SUM) is None
    assert part.tolist() == [2.0 * rank] * 3
    return seen


@pytest.mark.parametrize("transport", TRANSPORTS.values(), ids=TRANSPORTS.keys())
def test_flat_collectives_tell_their_bytes(pool: WorkerPool, transport: Transport) -> None:
    assert pool.run(flat_collectives, transport, world_size=2) == [[24, 24]] * 2
