"""What a rank of a benchmark is: its place in the world, its device and its process group."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from lightning_mics.bench.records import Case


def join(hardware: dict[str, Any]) -> None:
    """Starts this rank's process group on what the cases' ``hardware`` names."""
    if not hardware:
        dist.init_process_group("gloo")
        return
    _become_host()
    if hardware["device"] == "cpu":
        dist.init_process_group("gloo")
        return
    device = torch.device("cuda", int(os.environ["RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    dist.init_process_group("nccl", device_id=device)


def _become_host() -> None:
    """Makes this rank the only one of a host, so that NCCL lets it share a card and libraries ask for one device."""
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=rank, GROUP_WORLD_SIZE=world_size)
    os.environ["NCCL_HOSTID"] = f"host{rank}"


def device_of(case: Case) -> torch.device:
    """Returns this rank's device."""
    if case.hardware.get("device") == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def place_of(case: Case) -> dict[str, Any]:
    """Returns the settings with which Lightning finds this rank's place."""
    if not case.hardware:
        return {"accelerator": "cpu", "devices": case.node_size, "num_nodes": case.num_nodes}
    device = device_of(case)
    kind, devices = ("cpu", 1) if device.type == "cpu" else ("gpu", [device.index])
    return {"accelerator": kind, "devices": devices, "num_nodes": case.cluster.world_size}
