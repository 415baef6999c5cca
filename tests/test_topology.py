"""Groups are pure arithmetic; a wrong one would train a wrong model in silence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mics import ClusterTopology, MiCSConfigError
from lightning_mics.topology import GroupLayout, divisors

CLUSTERS = [(1, 1), (2, 1), (4, 2), (6, 3), (8, 2), (8, 4), (8, 8), (12, 6), (64, 8), (1024, 8)]


def layouts(world_size: int, node_size: int) -> list[GroupLayout]:
    topology = ClusterTopology(world_size=world_size, node_size=node_size)
    return [topology.layout(p) for p in topology.valid_shard_sizes()]


@pytest.mark.parametrize(("world_size", "node_size"), CLUSTERS)
def test_each_kind_of_group_holds_every_rank_once_and_in_order(world_size: int, node_size: int) -> None:
    for layout in layouts(world_size, node_size):
        for groups in (
            layout.partition_groups,
            layout.replication_groups,
            layout.intra_groups,
            layout.inter_groups,
        ):
            assert sorted(rank for group in groups for rank in group) == list(range(world_size))
            assert all(list(group) == sorted(group) for group in groups)


@pytest.mark.parametrize(("world_size", "node_size"), CLUSTERS)
def test_partitions_never_straddle_nodes_unevenly(world_size: int, node_size: int) -> None:
    for layout in layouts(world_size, node_size):
        for group in layout.partition_groups:
            on_node: dict[int, int] = {}
            for rank in group:
                node = layout.topology.node_of(rank)
                on_node[node] = on_node.get(node, 0) + 1
            assert set(on_node.values()) == {layout.local_size}
            assert len(on_node) == layout.nodes_per_partition


@pytest.mark.parametrize(("world_size", "node_size"), CLUSTERS)
def test_stages_cover_the_partition_and_keep_to_their_links(world_size: int, node_size: int) -> None:
    for layout in layouts(world_size, node_size):
        topology = layout.topology
        partition_of = {rank: group for group in layout.partition_groups for rank in group}
        for group in layout.intra_groups:
            assert len({topology.node_of(rank) for rank in group}) == 1
            assert len({partition_of[rank] for rank in group}) == 1
        for group in layout.inter_groups:
            assert len({topology.node_of(rank) for rank in group}) == len(group)
            assert len({partition_of[rank] for rank in group}) == 1
        assert layout.local_size * layout.nodes_per_partition == layout.shard_size


@pytest.mark.parametrize(("world_size", "node_size"), CLUSTERS)
def test_a_replication_group_holds_one_shard_of_every_replica(world_size: int, node_size: int) -> None:
    for layout in layouts(world_size, node_size):
        for shard, group in enumerate(layout.replication_groups):
            assert {layout.shard_of(rank) for rank in group} == {shard}
            assert [layout.replica_of(rank) for rank in group] == list(range(layout.num_replicas))


def test_words_stand_for_sizes() -> None:
    topology = ClusterTopology(world_size=8, node_size=4)
    assert topology.layout("node").shard_size == topology.layout().shard_size == 4
    assert topology.layout("world").shard_size == 8
    assert topology.valid_shard_sizes() == [1, 2, 4, 8]
    assert ClusterTopology(world_size=12, node_size=6).valid_shard_sizes() == [1, 2, 3, 6, 12]


def test_the_drawing_shows_nodes_replicas_and_shards() -> None:
    drawing = str(ClusterTopology(world_size=8, node_size=4).layout(2))
    assert "8 ranks = 2 node(s) x 4; 4 replica(s) x 2 shard(s)" in drawing
    assert "node 1  [replica 2 | 4:s0 5:s1] [replica 3 | 6:s0 7:s1]" in drawing
    assert "{0,2,4,6} {1,3,5,7}" in drawing
    assert "across nodes" not in drawing

    spanning = str(ClusterTopology(world_size=8, node_size=2).layout(4))
    assert "node 1  [replica 0 | 2:s2 3:s3]" in spanning
    assert "inside nodes        {0,1} {2,3} {4,5} {6,7}" in spanning
    assert "across nodes        {0,2} {1,3} {4,6} {5,7}" in spanning


def test_a_large_drawing_stays_readable() -> None:
    lines = str(ClusterTopology(world_size=1024, node_size=8).layout(64)).splitlines()
    assert max(map(len, lines[-4:])) < 160
    assert "..." in lines[-1]


@pytest.mark.parametrize(
    ("shard_size", "told"),
    [
        (0, "shard_size=0 must be at least 1"),
        (-2, "shard_size=-2 must be at least 1"),
        (2.0, "shard_size=2.0 is neither a whole number"),
        (True, "shard_size=True is neither a whole number"),
        ("all", "shard_size='all' is neither a whole number"),
        (None, "shard_size=None is neither a whole number"),
        (24, "shard_size=24 is larger than a world of 12 ranks (2 x 6)"),
        (5, "shard_size=5 does not divide a world of 12 ranks"),
        (4, "shard_size=4 makes partition groups straddle nodes unevenly in a world of 12 ranks (2 x 6)"),
    ],
)
def test_a_bad_shard_size_names_itself_and_what_works(shard_size: object, told: str) -> None:
    with pytest.raises(MiCSConfigError) as caught:
        ClusterTopology(world_size=12, node_size=6).layout(shard_size)  # type: ignore[arg-type]
    assert told in str(caught.value)
    assert "1, 2, 3, 6, 12, 'node' or 'world'" in str(caught.value)


@pytest.mark.parametrize(
    ("world_size", "node_size", "told"),
    [
        (8, 3, "node_size=3 does not divide the world of 8 ranks"),
        (8, 16, "node_size=16 does not divide the world of 8 ranks"),
        (8, 0, "node_size=0 must be at least 1"),
        (0, 1, "world_size=0 must be at least 1"),
        ("8", 1, "world_size='8' is not a whole number"),
    ],
)
def test_a_bad_cluster_names_its_numbers(world_size: object, node_size: object, told: str) -> None:
    with pytest.raises(MiCSConfigError) as caught:
        ClusterTopology(world_size=world_size, node_size=node_size)  # type: ignore[arg-type]
    assert told in str(caught.value)


LAUNCHERS = {
    "torchrun": {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
    "slurm, one number": {"SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)"},
    "slurm step": {"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8,8", "SLURM_TASKS_PER_NODE": "16"},
    "slurm, asked": {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"},
    "open mpi": {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"},
    "mvapich": {"MV2_COMM_WORLD_SIZE": "16", "MV2_COMM_WORLD_LOCAL_SIZE": "8"},
    "ray": {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "9", "LOCAL_RANK": "1", "NODE_RANK": "1"},
    "hyperpod with slurm": {
        **{"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_NNODES": "2"},
        **{"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1"},
    },
    "intel mpi": {"PMI_SIZE": "16", "MPI_LOCALNRANKS": "8"},
}


@pytest.mark.parametrize("environ", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_launchers_tell_the_cluster(environ: dict[str, str]) -> None:
    for known in (16, None):
        assert ClusterTopology.from_env(known, environ) == ClusterTopology(world_size=16, node_size=8)


@pytest.mark.slow
def test_torchrun_is_told_by_variables_as_kubeflow_does(tmp_path: Path) -> None:
    script = tmp_path / "tell.py"
    script.write_text(
        "import os, pathlib\nfrom lightning_mics import ClusterTopology\n"
        "pathlib.Path(os.environ['RANK']).write_text(repr(ClusterTopology.from_env()) + os.environ['GROUP_RANK'])"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    told = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    told |= {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", str(script)]
    nodes = [
        subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **told, "PET_NODE_RANK": str(node)})
        for node in range(2)
    ]
    try:
        assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    found = [(tmp_path / str(rank)).read_text() for rank in range(4)]
    assert found == [f"ClusterTopology(world_size=4, node_size=2){node}" for node in (0, 0, 1, 1)]


def test_variables_of_an_outer_launcher_are_not_believed() -> None:
    # A torchrun of 4 processes in a SLURM allocation with one task a node.
    environ = {"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert ClusterTopology.from_env(4, environ) == ClusterTopology(world_size=4, node_size=2)
    assert ClusterTopology.from_env(8, environ) is None
    assert ClusterTopology.from_env(None, {}) is None
    assert ClusterTopology.from_env(None, {"WORLD_SIZE": "many", "LOCAL_WORLD_SIZE": "2"}) is None
    # torchrun sets no LOCAL_WORLD_SIZE under some launchers: nothing is guessed.
    assert ClusterTopology.from_env(8, {"WORLD_SIZE": "8"}) is None


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_NTASKS": "6", "SLURM_TASKS_PER_NODE": "4,2"},
        {"SLURM_NTASKS": "11", "SLURM_TASKS_PER_NODE": "4(x2),3"},
        {"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "4"},
        {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4"},
    ],
)
def test_uneven_launches_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(MiCSConfigError, match="different numbers of ranks") as caught:
        ClusterTopology.from_env(None, environ)
    assert "for example" in str(caught.value)


def test_host_names_tell_the_cluster() -> None:
    assert ClusterTopology.from_hostnames(["a", "a", "b", "b"]) == ClusterTopology(world_size=4, node_size=2)
    assert ClusterTopology.from_hostnames(["a"] * 4) == ClusterTopology(world_size=4, node_size=4)
    with pytest.raises(MiCSConfigError, match=r"different numbers of ranks \(a: 4, b: 2\).*for example 3 on each of 2"):
        ClusterTopology.from_hostnames(["a", "a", "a", "a", "b", "b"])
    with pytest.raises(MiCSConfigError, match=r"not numbered node by node: rank 1 is on 'b'.*distribution=block"):
        ClusterTopology.from_hostnames(["a", "b", "a", "b"])


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
