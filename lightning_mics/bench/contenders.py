"""The ways to train that are compared, by name. What trains is in :mod:`lightning_mics.bench.loops`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import yaml

from lightning_mics.bench.records import Case, Contender
from lightning_mics.errors import MiCSConfigError
from lightning_mics.metrics import partition_share, replication_share, slice_share
from lightning_mics.topology import ClusterTopology

_PEERS = (
    "full-sharding",
    "full-sharding-node",
    "mesh-2d",
    "mesh-2d-no-sync",
    "ddp",
    "ddp-zero1",
    "deepspeed-zero3",
)

# By setting of ours: how it is called in tables, and the value that is compared with the default.
_SETTINGS = {
    "reshard_after_forward": ("not resharded", "false"),
    "activation_checkpointing": ("recomputed", "true"),
    "replication_reduce_dtype": ("hop two in 16 bits", "bfloat16"),
}


def parse_contender(word: str, topology: ClusterTopology) -> Contender | None:
    """Returns the contender that a word names.

    Args:
        word: ``"full-sharding"`` and so on; ``"mics:2"``, ``"mics:node"``, ``"mics:world"`` for ours with that shard
            size; ``"mics:node+world"`` for optimizer states divided further; ``"mics:4:flat"`` or
            ``"mics:4:hierarchical"`` to choose the collectives; ``"mics:2:reshard_after_forward=false"`` and so on for
            other settings.
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
        "full-sharding-node": (
            "Full sharding, hpZ",  # as ZeRO++ calls a second partition in each node
            topology.world_size,
            f"{trainer}, ModelParallelStrategy, FSDP2",
        ),
        "mesh-2d": ("2-D mesh", node, f"{trainer}, ModelParallelStrategy, FSDP2"),
        "mesh-2d-no-sync": ("2-D mesh, no_sync", node, f"Lightning Fabric {_version('lightning')}, FSDP2"),
        "ddp": ("DDP", 1, f"{trainer}, DDPStrategy"),
        "ddp-zero1": ("DDP with ZeRO-1", 1, f"{trainer}, DDPStrategy, ZeroRedundancyOptimizer"),
        "deepspeed-zero3": ("DeepSpeed ZeRO-3", topology.world_size, f"DeepSpeed {_version('deepspeed')}"),
    }
    if name not in known or details:
        raise MiCSConfigError(
            f"contenders: {word!r} is unknown. Values that work: {', '.join(_PEERS)}, mics:N, mics:node, mics:world, "
            "mics:node+world, mics:N:flat, mics:N:hierarchical."
        )
    label, shard_size, stack = known[name]
    divided = topology.world_size if name == "ddp-zero1" else None
    return Contender(
        name=name,
        label=label,
        shard_size=shard_size,
        hierarchical=False,
        stack=stack,
        optimizer_shard_size=divided,
    )


def _parse_mics(word: str, details: list[str], topology: ClusterTopology, stack: str) -> Contender | None:
    settings = dict(map(_parse_setting, [detail for detail in details if "=" in detail]))
    details = [detail for detail in details if "=" not in detail]
    sizes, kind = details[0].split("+") if details else [], details[1] if len(details) > 1 else None
    words = {"node": topology.node_size, "world": topology.world_size}
    are_sizes = 1 <= len(sizes) <= 2 and all(size in words or size.isdecimal() for size in sizes)
    if not are_sizes or kind not in (None, "flat", "hierarchical") or len(details) > 2:
        raise MiCSConfigError(
            f"contenders: {word!r} is unknown. Try mics:node, mics:node+world, mics:4:flat or mics:4:hierarchical."
        )
    numbers = [words[size] if size in words else int(size) for size in sizes]
    if max(numbers) > topology.world_size:
        return None
    try:
        layout = topology.layout(numbers[0])
        divided = layout.resolve_optimizer_shard_size(numbers[-1])
    except MiCSConfigError as error:
        raise MiCSConfigError(f"contenders: {word!r} cannot work: {error}") from error
    can_be_hierarchical = layout.spans_nodes and layout.local_size > 1
    if kind == "hierarchical" and not can_be_hierarchical:
        return None
    hierarchical = can_be_hierarchical and kind != "flat"
    label = f"MiCS p={sizes[0]}" + (f" q={sizes[1]}" if sizes[1:] else "")
    if can_be_hierarchical:
        label += " hierarchical" if hierarchical else " flat"
    label += "".join(f", {_SETTINGS[name][0]}" for name in settings)
    return Contender(
        name="mics",
        label=label,
        shard_size=numbers[0],
        hierarchical=hierarchical,
        stack=stack,
        optimizer_shard_size=divided if divided > numbers[0] else None,
        settings=settings,
    )


def _parse_setting(detail: str) -> tuple[str, Any]:
    name, _, value = detail.partition("=")
    if name not in _SETTINGS or value != _SETTINGS[name][1]:
        known = ", ".join(f"mics:2:{name}={value}" for name, (_, value) in _SETTINGS.items())
        raise MiCSConfigError(f"contenders: {detail!r} is no setting that is compared. Values that work: {known}.")
    return name, yaml.safe_load(value)


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
    layout, divided = case.topology.layout(contender.shard_size), contender.optimizer_shard_size
    model_bytes = block_bytes + root_bytes
    # Where blocks stay whole until the backward pass, in a rank or in a node, their second gather does not leave it.
    stays = contender.name == "full-sharding-node" or contender.settings.get("reshard_after_forward") is False
    gathers = 1 if stays else 2
    gathered = case.accumulation * (gathers * block_bytes + root_bytes)
    reduced = model_bytes * (1 if contender.name == "mesh-2d-no-sync" else case.accumulation)
    in_partition = 0 if contender.shard_size == 1 else gathered + reduced
    replicated = model_bytes / contender.shard_size * (case.accumulation if contender.name == "mesh-2d" else 1)
    partition = partition_share(layout, contender.hierarchical)
    # ZeRO-1 beside DDP averages all gradients everywhere, and so has divided nothing yet when it steps.
    replication = float(replication_share(layout, None if contender.name == "ddp-zero1" else divided).inter)
    if "replication_reduce_dtype" in contender.settings:  # sums in 16 bits; what comes back has that of the shards
        replication *= 0.5 if divided else 0.75
    replication += float(slice_share(layout, divided).inter) if divided else 0
    return float(partition.inter) * in_partition + replication * replicated
