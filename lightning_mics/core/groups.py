"""Process groups: their backends, making them, and destroying them at the end of the process."""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lightning_mics.config import MiCSConfig
from lightning_mics.core import failures
from lightning_mics.core._torch import (
    abort_groups,
    carries_cpu_tensors,
    group_timeout,
    new_local_group,
    wait_for_gloo_threads,
)
from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import Group


def backend_for(device_type: str, *, cpu_offload: bool) -> str:
    """Returns the backends that a world needs: the device's, and with offload one for tensors in host memory.

    Not one for host memory always: its connections, of every rank with every other, take time and ports.

    Args:
        device_type: Where ranks compute, ``"cuda"`` or ``"cpu"``.
        cpu_offload: Whether states live in host memory.
    """
    backend: str = dist.get_default_backend_for_device(device_type)
    return f"cpu:gloo,{device_type}:{backend}" if cpu_offload and device_type != "cpu" else backend


def check_backends(config: MiCSConfig, device_type: str) -> None:
    """Checks that the world can carry what the settings put where.

    Raises:
        MiCSConfigError: If states are to live in host memory, and there is no backend for tensors there.
    """
    backends = dist.get_backend_config()
    if config.cpu_offload and device_type != "cpu" and "cpu:" not in backends:
        works = backend_for(device_type, cpu_offload=True)
        raise MiCSConfigError(
            f"cpu_offload=True keeps gradients in host memory, but the process group has only {backends}, so that they "
            f"could not be clipped or saved whole. Use init_process_group({works!r}), or cpu_offload=False. (Lightning "
            f"and Fabric: process_group_backend={works!r}; Accelerate: InitProcessGroupKwargs(backend={works!r}); "
            f"transformers: ddp_backend={works!r}; Ray: TorchConfig(backend={works!r}).)",
            setting="cpu_offload",
        )


def choose_device(device_type: str) -> None:
    """Chooses this rank's device where nobody has, as a DeviceMesh does that makes its groups itself."""
    if device_type == "cpu" or dist.get_backend() == "fake":
        return
    module = torch.get_device_module(device_type)
    if not module.is_initialized():
        module.set_device(int(os.environ.get("LOCAL_RANK", dist.get_rank() % module.device_count())))


class GroupMaker:
    """Makes the groups of one mesh.

    Args:
        prefix: What their names begin with.
        device_type: Where ranks compute.
    """

    def __init__(self, prefix: str, device_type: str) -> None:
        assert dist.group.WORLD is not None
        self._prefix, self._world = prefix, dist.group.WORLD
        self._timeout = group_timeout(self._world, torch.device(device_type))

    def make(self, kind: str, division: Sequence[Group]) -> dist.ProcessGroup:
        """Returns this rank's group of a division of the world. Collective over that group.

        All ranks make theirs at once: NCCL may split them off the world's communicator, which takes everyone.

        Args:
            kind: What the name says.
            division: Groups that together are the world.
        """
        ranks = next(ranks for ranks in division if dist.get_rank() in ranks)
        if len(division) == 1:
            return self._world
        return new_local_group(ranks, f"{self._prefix}_{kind}_{ranks[0]}", self._timeout)

    def make_unused(self, kind: str, used: Sequence[dist.ProcessGroup]) -> dist.ProcessGroup:
        """Returns a group of all ranks that is none of those in use, if it carries the device's tensors alone.

        A device runs the collectives of one communicator in the order of their launch, whatever their streams.
        """
        if self._world not in used or carries_cpu_tensors(self._world) or self._world.size() == 1:
            return self._world
        return new_local_group(range(self._world.size()), f"{self._prefix}_{kind}_0", self._timeout)


def end_well() -> None:
    """Has all groups destroyed when the process ends, and all ranks end with one that fails."""
    failures.watch()
    _destroy_at_exit()


@functools.cache
def _destroy_at_exit() -> None:
    atexit.register(_end)


def _end() -> None:
    failures.stop_watching()
    with failures.limited_after_error():  # peers may never come
        destroy_groups()


def destroy_groups() -> None:
    """Destroys all process groups, so that this process can end: gloo's threads would abort it (torch 2.13).

    After an error nobody waits for what is in flight: its peers may never come.
    """
    if dist.is_initialized() and failures.has_failed() and "nccl" in dist.get_backend_config():
        abort_groups()
    elif dist.is_initialized():
        dist.destroy_process_group()
    wait_for_gloo_threads()
