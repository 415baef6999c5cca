"""The settings of MiCS: partition groups, hierarchy, the dtype of reduction, offloading, activations."""

from __future__ import annotations

from typing import Any

import torch

from lightning_mics.config import as_dtype
from lightning_mics.deepspeed.reader import AUTO, ZERO, Reader
from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import ClusterTopology, check_positive_int, divisors

_MICS, _HPZ = f"{ZERO}.mics_shard_size", f"{ZERO}.zero_hpz_partition_size"


def check_cluster(world_size: int | None, node_size: int | None) -> None:
    """Checks what is known about the cluster."""
    if world_size is not None:
        check_positive_int("world_size", world_size, 8)
    if node_size is not None:
        check_positive_int("node_size", node_size, 8)
    if world_size is not None and node_size is not None:
        ClusterTopology(world_size=world_size, node_size=node_size)


def read_sharding(reader: Reader, world_size: int | None, node_size: int | None) -> dict[str, Any]:
    """Reads over how many ranks the states are sharded, and whether in two stages."""
    stage = _read_stage(reader)
    mics = reader.whole(_MICS, least=-1)
    hpz = reader.whole(_HPZ, least=0)
    shard_size: int | str
    if mics is not None and mics > 0:
        shard_size, origin = mics, "mics_shard_size"
    elif hpz is not None and hpz > 1:
        shard_size, origin = hpz, "zero_hpz_partition_size"
    else:
        shard_size, origin = ("world", "stage 3") if stage == 3 else ("node", "the default")
    _check_shard_size(shard_size, world_size, node_size)
    _note_stage(reader, stage, shard_size, origin)
    _note_shard_size(reader, shard_size, origin)
    hierarchical = _read_hierarchical(reader, shard_size, node_size)
    return {"shard_size": shard_size, "hierarchical": hierarchical}


def _read_stage(reader: Reader) -> int:
    if isinstance(legacy := reader.value(ZERO), bool):
        return int(legacy)
    key = f"{ZERO}.stage"
    stage = reader.whole(key, least=0, example=3)
    if reader.is_auto(key) or (stage is not None and stage > 3):
        raise MiCSConfigError(f"{key}={reader.value(key)!r} is not one of 0, 1, 2, 3. Try 3.", setting=key)
    return stage or 0


def _check_shard_size(shard_size: int | str, world_size: int | None, node_size: int | None) -> None:
    if world_size is None or isinstance(shard_size, str):
        return
    if node_size is not None:
        ClusterTopology(world_size=world_size, node_size=node_size).resolve_shard_size(shard_size)
    elif world_size % shard_size:
        works = ", ".join(map(str, divisors(world_size)))
        raise MiCSConfigError(
            f"shard_size={shard_size} does not divide a world of {world_size} ranks. Values that work: {works}.",
            setting="shard_size",
        )


def _note_stage(reader: Reader, stage: int, shard_size: int | str, origin: str) -> None:
    key = ZERO if isinstance(reader.value(ZERO), bool) else f"{ZERO}.stage"
    if stage == 3 and origin != "stage 3":
        reader.kept(key, "MiCS shards parameters, gradients and optimizer states, as stage 3 does.")
    elif stage == 3:
        reader.replaced(
            key,
            "shard_size='world', as stage 3 without MiCS shards over all ranks. A node ('node') or a few nodes, if "
            "the model fits there, keep gathers off the slow network.",
        )
    elif origin == "the default":
        reader.replaced(
            key,
            f"shard_size='node', the default. Stage {stage} keeps whole parameters on each rank; MiCS shards all "
            "states, here over a node. shard_size=1 would replicate everything.",
        )
    else:
        reader.replaced(
            key, f"DeepSpeed ignores {origin} in stage {stage}; here shard_size={shard_size} holds, for all states."
        )


def _note_shard_size(reader: Reader, shard_size: int | str, origin: str) -> None:
    if origin == "mics_shard_size":
        reader.kept(_MICS, f"shard_size={shard_size}")
    else:
        why = "'auto' is no number" if reader.is_auto(_MICS) else "MiCS is off in this file"
        reader.replaced(_MICS, f"{why}; shard_size={shard_size!r} follows from {origin}.")
    if origin == "zero_hpz_partition_size":
        reader.replaced(
            _HPZ,
            f"shard_size={shard_size}. hpZ gathers parameters for the backward pass from a copy inside {shard_size} "
            f"ranks, and shards the states over all of them; MiCS shards the states over {shard_size} ranks, too. "
            "That takes more memory for optimizer states, and keeps the forward gathers inside as well.",
        )
    elif (reader.whole(_HPZ, least=0) or 0) > 1:
        reader.replaced(_HPZ, f"Superseded by {origin}: shard_size={shard_size!r}.")


def _read_hierarchical(reader: Reader, shard_size: int | str, node_size: int | None) -> bool | str:
    key = f"{ZERO}.mics_hierarchical_params_gather"
    wanted = reader.switch(key)
    if wanted is False:
        reader.kept(key, "hierarchical=False")
        return False
    if wanted is None:
        return "auto"
    both = "for gathers and for the reduction of gradients."
    if node_size is None or isinstance(shard_size, str):
        reader.replaced(key, f"hierarchical='auto': two stages wherever a partition spans nodes, {both}")
        return "auto"
    if shard_size > node_size:
        reader.kept(key, f"hierarchical=True, {both}")
        return True
    reader.replaced(
        key,
        f"hierarchical='auto', as no partition of {shard_size} ranks spans nodes of {node_size}: there True is an "
        "error, 'auto' is not.",
    )
    return "auto"


def read_reduce_dtype(reader: Reader) -> dict[str, Any]:
    """Reads two settings that are one here: the dtype of reduction, and of accumulation over microsteps."""
    dtypes: dict[str, torch.dtype] = {}
    for key in ("communication_data_type", "data_types.grad_accum_dtype"):
        value = reader.value(key)
        if value not in (None, AUTO) and (dtype := as_dtype(str(value).lower(), key)) is not None:
            dtypes[key] = dtype
    if not dtypes:
        return {}
    # The wider of the two loses nothing.
    chosen = max(dtypes.values(), key=lambda dtype: torch.finfo(dtype).bits)
    name = str(chosen).removeprefix("torch.")
    for key, dtype in dtypes.items():
        if dtype == chosen:
            reader.kept(key, f"reduce_dtype={name!r}")
        else:
            reader.replaced(
                key, f"reduce_dtype={name!r}: one setting for both hops and the accumulation, so the wider."
            )
    return {"reduce_dtype": name}


def read_offload(reader: Reader) -> dict[str, Any]:
    """Reads whether host memory is used."""
    offloads = False
    together = "cpu_offload=True: parameters, gradients and optimizer states, always together."
    for section in ("offload_optimizer", "offload_param"):
        key = f"{ZERO}.{section}.device"
        device = reader.value(key, "none")
        if device not in (None, "none", "cpu", "nvme", AUTO):
            raise MiCSConfigError(
                f"{key}={device!r} is not a device. Values that work: 'none', 'cpu', 'nvme'.", setting=key
            )
        if device == "cpu":
            offloads = True
            reader.replaced(key, together)
        elif device == "nvme":
            reader.dropped(
                key, "No disk offload. Use a larger shard_size, or cpu_offload=True with enough host memory."
            )
    for name in ("cpu_offload", "cpu_offload_param", "cpu_offload_params"):
        if reader.switch(f"{ZERO}.{name}"):
            offloads = True
            reader.replaced(f"{ZERO}.{name}", together)
    return {"cpu_offload": True} if offloads else {}


def read_activations(reader: Reader) -> dict[str, Any]:
    """Reads whether activations are recomputed; DeepSpeed leaves the rest of it to the model."""
    section = "activation_checkpointing"
    switches = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization")
    on = any([reader.switch(f"{section}.{name}") for name in switches])
    on = on or bool(reader.whole(f"{section}.number_checkpoints", least=0, example=4))
    if not on:
        return {}
    checkpoints = "activation_checkpointing=True: each unit is a checkpoint. Remove deepspeed.checkpointing calls"
    reader.replaced(f"{section}.number_checkpoints", f"{checkpoints}.")
    reader.replaced(
        f"{section}.partition_activations",
        f"{checkpoints}. What a rank keeps is not divided: that needs model parallelism.",
    )
    if not reader.switch(f"{section}.cpu_checkpointing"):
        return {"activation_checkpointing": True}
    reader.replaced(f"{section}.cpu_checkpointing", "activation_checkpointing_offload=True.")
    return {"activation_checkpointing": True, "activation_checkpointing_offload": True}
