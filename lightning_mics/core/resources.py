"""How much memory this rank has, and how much it takes."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

# What a CUDA context takes beside the allocator's memory (assumption); only what exceeds it is somebody else's.
_OWN_CONTEXT = 2**29
_UNLIMITED = 2**60


def device_memory(device: torch.device) -> int:
    """Returns the bytes that this process can have on an accelerator, with what it holds already."""
    module = torch.get_device_module(device.type)
    free, total = module.mem_get_info(device)
    others = max(0, total - free - module.memory_reserved(device) - _OWN_CONTEXT)
    fraction = getattr(module, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return int(min(total * fraction, total - others))


def free_host_memory(root: Path = Path("/")) -> int:
    """Returns the bytes of this machine that processes can still have, as far as control groups let them.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    amounts = [_available(root), *_headrooms(root)]
    return max(0, min(amounts))


def _available(root: Path) -> int:
    try:
        return _kib_field(root / "proc/meminfo", "MemAvailable")
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _kib_field(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _headrooms(root: Path) -> Iterator[int]:
    """Yields what is left in this process's control groups and those above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, place = line.split(":", 2)
        if number == "0" and not controllers:
            files = ("memory.max", "memory.current", "inactive_file")
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mounts = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        for mount in mounts:
            inner = mount / place.lstrip("/")
            for folder in [inner, *inner.parents]:
                if folder.is_relative_to(mount):
                    yield from _headroom(folder, *files)


def _headroom(folder: Path, limit_file: str, usage_file: str, inactive: str) -> Iterator[int]:
    """Yields limit minus usage; files in the page cache that nobody reads now count as free."""
    try:
        limit, used = (folder / limit_file).read_text().strip(), int((folder / usage_file).read_text())
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    if limit.isdigit() and int(limit) < _UNLIMITED:
        yield int(limit) - used + int(stats.get(inactive, 0))


def bytes_on(model: nn.Module, device_type: str) -> int:
    """Returns the bytes of a model's parameters and buffers that lie on a kind of device."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
        if tensor.device.type == device_type
    }
    return sum(storages.values())


class ResidentMemory:
    """The growth of this process's resident memory since the object was made, as the kernel counts it.

    Raises:
        OSError: Where the kernel does not tell.
    """

    def __init__(self) -> None:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        self._before = _status("VmRSS")
        self.restart_peak()

    def restart_peak(self) -> None:
        """Forgets the peak so far, but not where growth is counted from."""
        Path("/proc/self/clear_refs").write_text("5")

    def growth(self) -> int:
        """Returns the bytes that the process has grown by; negative if it has shrunk."""
        return _status("VmRSS") - self._before

    def peak_growth(self) -> int:
        """Returns the most bytes that the process has grown by; negative if it has shrunk."""
        return _status("VmHWM") - self._before


def _status(field: str) -> int:
    try:
        return _kib_field(Path("/proc/self/status"), field)
    except KeyError as error:
        raise OSError(f"no {field} in /proc/self/status") from error


class Usage:
    """The most memory of a device that training a model takes, from before it is sharded.

    Args:
        model: The model, whose own memory counts.
        device: Where it is trained.

    Attributes:
        device: Where it is trained.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self._own = bytes_on(model, device.type)
        self._before = 0
        self._resident: ResidentMemory | None = None
        if device.type != "cpu":
            self._before = torch.get_device_module(device.type).memory_allocated(device)
            return
        try:
            self._resident = ResidentMemory()
        except OSError:
            return

    def restart_peak(self) -> None:
        """Forgets the peak so far."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device.type).reset_peak_memory_stats(self.device)
        elif self._resident is not None:
            self._resident.restart_peak()

    def peak(self) -> int | None:
        """Returns the most bytes since the last restart; ``None`` where they cannot be told."""
        if self.device.type != "cpu":
            peak = torch.get_device_module(self.device.type).max_memory_allocated(self.device)
            return int(max(0, peak - self._before + self._own))
        return None if self._resident is None else max(0, self._resident.peak_growth() + self._own)
