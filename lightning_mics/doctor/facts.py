"""What a rank knows about itself without asking anybody."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import struct
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lightning_mics
from lightning_mics.core.resources import device_memory
from lightning_mics.doctor.meeting import Launch

PACKAGES = ("torch", "lightning", "accelerate", "transformers", "lightning-mics")
_VARIABLES = re.compile(
    r"(NCCL|TORCH_NCCL|GLOO|UCX|FI|MICS|PYTORCH)_\w+|OMP_NUM_THREADS|CUDA_LAUNCH_BLOCKING|CUDA_DEVICE_MAX_CONNECTIONS|"
    r"TORCH_DISTRIBUTED_DEBUG|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
)
_INFINIBAND, _SHARED_MEMORY = Path("/sys/class/infiniband"), Path("/dev/shm")
_GET_ADDRESS = 0x8915  # SIOCGIFADDR


@dataclass(frozen=True)
class Folder:
    """A folder that a job writes to.

    Attributes:
        path: The folder; for one that does not exist yet, the innermost one around it that does.
        size: Bytes of its file system.
        free: Bytes that are free there.
        problem: Why nothing can be written; empty if it can.
    """

    path: str
    size: int = 0
    free: int = 0
    problem: str = ""

    @classmethod
    def of(cls, path: Path) -> Folder:
        """Looks at a folder, and tries to write."""
        try:
            path = path.expanduser().absolute()
            place = next(folder for folder in (path, *path.parents) if folder.exists())
            usage = shutil.disk_usage(place)
        except OSError as error:
            return cls(str(path), problem=str(error))
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"mics")
        except OSError as error:
            return cls(str(place), usage.total, usage.free, str(error))
        return cls(str(place), usage.total, usage.free)


@dataclass(frozen=True)
class Card:
    """A rank's accelerator.

    Attributes:
        name: What it is.
        uuid: Which one it is.
        memory: Its bytes.
        taken: Bytes of it that others hold.
        count: How many this process sees.
    """

    name: str
    uuid: str
    memory: int
    taken: int
    count: int

    @classmethod
    def of(cls, launch: Launch) -> Card | None:
        """Looks at the card that this rank would take; ``None`` without cards."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            return None
        if launch.local_rank >= count:
            return cls("none", "", 0, 0, count)
        device = torch.device("cuda", launch.local_rank)
        known = torch.cuda.get_device_properties(device)
        taken = known.total_memory - device_memory(device)
        return cls(known.name, str(getattr(known, "uuid", "")), known.total_memory, max(0, taken), count)


@dataclass(frozen=True)
class Network:
    """How a rank reaches others.

    Attributes:
        interfaces: Those of its machine.
        used: The one on the way to rank 0; empty if that cannot be told.
        mtu: The largest packet of that one.
        own_address: What the name of its machine stands for; empty if for nothing.
        has_infiniband: Whether its machine has such adapters.
    """

    interfaces: tuple[str, ...]
    used: str
    mtu: int
    own_address: str
    has_infiniband: bool

    @classmethod
    def of(cls, launch: Launch) -> Network:
        """Looks at this machine's interfaces."""
        names = tuple(name for _, name in socket.if_nameindex())
        used, mtu, own = "", 0, ""
        with suppress(OSError, ValueError):  # no such host, or IPv6 alone
            used = _interface_to(launch.address.rpartition(":")[0], names)
            mtu = int(Path(f"/sys/class/net/{used}/mtu").read_text())
        with suppress(OSError):
            own = socket.gethostbyname(socket.gethostname())
        return cls(names, used, mtu, own, _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()))


def _interface_to(host: str, names: tuple[str, ...]) -> str:
    """Returns the interface whose address packets to a host bear; nothing is sent."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        own = socket.inet_aton(probe.getsockname()[0])
        for name in names:
            with suppress(OSError):  # it has no address
                answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                if answer[20:24] == own:
                    return name
    return ""


@dataclass(frozen=True)
class Facts:
    """What a rank knows about itself.

    Attributes:
        rank: The rank.
        host: Its machine's name.
        node_size: How many ranks its launcher says to have started there.
        versions: Of what it runs, by name; what is not installed is left out.
        variables: Of its environment, those that collectives, devices and lightning-mics heed.
        network: How it reaches others.
        card: Its accelerator, if there is one.
        shared_memory: ``/dev/shm``, where there is such a thing.
        temporary: Where its temporary files go.
        checkpoints: Where checkpoints are to go, if it was told.
    """

    rank: int
    host: str
    node_size: int
    versions: dict[str, str]
    variables: dict[str, str]
    network: Network
    card: Card | None = None
    shared_memory: Folder | None = None
    temporary: Folder | None = None
    checkpoints: Folder | None = None

    @classmethod
    def collect(cls, launch: Launch, checkpoints: Path | None = None) -> Facts:
        """Looks around on this rank."""
        return cls(
            rank=launch.rank,
            host=socket.gethostname(),
            node_size=launch.node_size,
            versions=_versions(),
            variables={name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
            network=Network.of(launch),
            card=Card.of(launch),
            shared_memory=Folder.of(_SHARED_MEMORY) if _SHARED_MEMORY.exists() else None,
            temporary=Folder.of(Path(tempfile.gettempdir())),
            checkpoints=None if checkpoints is None else Folder.of(checkpoints),
        )

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Facts:
        """Returns what another rank has told, as ``dataclasses.asdict`` wrote it."""
        kinds: dict[str, Any] = {"card": Card, "shared_memory": Folder, "temporary": Folder, "checkpoints": Folder}
        parts = {name: told[name] and kind(**told[name]) for name, kind in kinds.items()}
        return cls(**{**told, **parts, "network": Network(**told["network"])})


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["lightning-mics' files"] = _digest(Path(lightning_mics.__file__).parent)
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _digest(folder: Path) -> str:
    """Returns a few digits that differ where two folders' Python files do: checkouts that are not equally old."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]
