"""The ways to train that are compared, by name. What trains is in :mod:`lightning_mics.bench.loops`."""

from __future__ import annotations

import importlib.metadata

from lightning_mics.bench.records import Case, Contender
from lightning_mics.errors import MiCSConfigError
from lightning_mics.metrics import partition_share, replication_share
from lightning_mics.topology import ClusterTopology

_PEERS = ("full-sharding", "mesh-2d", "mesh-2d-no-sync", "ddp", "deepspeed-zero3")


def parse_contender(word: str, topology: ClusterTopology) -> Contender | None:
    """Returns the contender that a word names.

    Args:
        word: ``"full-sharding"`` and so on; ``"mics:2"``, ``"mics:node"``, ``"mics:world"`` for ours with that shard
            size; ``"mics:4:flat"`` or ``"mics:4:hierarchical"`` to choose the collectives.
        topology: The cluster.

    Returns:
        The contender, or ``None`` if its shard size is larger than the cluster, or hierarchical where nothing spans
        nodes.

    Raises:
        MiCSConfigError: If the word names none.
    """
    name, *details = str(word).split(":")
    trainer = f"Lightning Trainer {_version('lightning')}"
    node = topology.node_size
    if name == "mics" and details:
        return _parse_mics(word, details, topology, f"{trainer}, MiCSStrategy")
    known = {
        "full-sharding": ("Full sharding", topology.world_size, f"{trainer}, ModelParallelStrategy, FSDP2"),
        "mesh-2d": ("2-D mesh", node, f"{trainer}, ModelParallelStrategy, FSDP2"),
        "mesh-2d-no-sync": ("2-D mesh, no_sync", node, f"Lightning Fabric {_version('lightning')}, FSDP2"),
        "ddp": ("DDP", 1, f"{trainer}, DDPStrategy"),
        "deepspeed-zero3": ("DeepSpeed ZeRO-3", topology.world_size, f"DeepSpeed {_version('deepspeed')}"),
    }
    if name not in known or details:
        raise MiCSConfigError(
            f"contenders: {word!r} is unknown. Values that work: {', '.join(_PEERS)}, mics:N, mics:node, mics:world, "
            "mics:N:flat, mics:N:hierarchical."
        )
    label, shard_size, stack = known[name]
    return Contender(name=name, label=label, shard_size=shard_size, hierarchical=False, stack=stack)


def _parse_mics(word: str, details: list[str], topology: ClusterTopology, stack: str) -> Contender | None:
    size, kind = details[0], details[1] if len(details) > 1 else None
    words = {"node": topology.node_size, "world": topology.world_size}
    is_size = size in words or size.isdecimal()
    if not is_size or kind not in (None, "flat", "hierarchical") or len(details) > 2:
        raise MiCSConfigError(f"contenders: {word!r} is unknown. Try mics:node, mics:4:flat or mics:4:hierarchical.")
    wanted = words[size] if size in words else int(size)
    if wanted > topology.world_size:
        return None
    try:
        layout = topology.layout(wanted)
    except MiCSConfigError as error:
        raise MiCSConfigError(f"contenders: {word!r} cannot work: {error}") from error
    can_be_hierarchical = layout.spans_nodes and layout.local_size > 1
    if kind == "hierarchical" and not can_be_hierarchical:
        return None
    hierarchical = can_be_hierarchical and kind != "flat"
    label = f"MiCS p={size}"
    if can_be_hierarchical:
        label += " hierarchical" if hierarchical else " flat"
    return Contender(name="mics", label=label, shard_size=wanted, hierarchical=hierarchical, stack=stack)


def reason_to_skip(case: Case, contender: Contender) -> str | None:
    """Returns why a contender cannot run here, or ``None``."""
    if contender.name == "deepspeed-zero3" and case.hardware:
        return "DeepSpeed is compared on CPUs only"
    if contender.name == "deepspeed-zero3" and _version("deepspeed") == "(not installed)":
        return "DeepSpeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation 'deepspeed==0.19.*'"
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def least_bytes(case: Case, contender: Contender, block_bytes: int, root_bytes: int) -> float:
    """Returns the least bytes that leave a node in an optimizer step of a contender's algorithm.

    A block is gathered for its forward and again for its backward pass, the root once a microstep. The shares of a
    message that leave a node are those of :mod:`lightning_mics.metrics`.

    Args:
        case: The conditions.
        contender: The algorithm.
        block_bytes: Size of all blocks together, as they are gathered.
        root_bytes: Size of what is outside of them.
    """
    if case.num_nodes == 1:
        return 0.0
    layout = case.topology.layout(contender.shard_size)
    model_bytes = block_bytes + root_bytes
    gathered = case.accumulation * (2 * block_bytes + root_bytes)
    reduced = model_bytes * (1 if contender.name == "mesh-2d-no-sync" else case.accumulation)
    in_partition = 0 if contender.name == "ddp" else gathered + reduced
    replicated = model_bytes / contender.shard_size * (case.accumulation if contender.name == "mesh-2d" else 1)
    partition, replication = partition_share(layout, contender.hierarchical), replication_share(layout)
    return float(partition.inter) * in_partition + float(replication.inter) * replicated
