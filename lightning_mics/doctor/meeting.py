"""Where ranks tell one another what they found: the store of their launcher, which needs no rank's patience.

Nothing here is a collective: a rank that is missing, ended or hanging is one of which nothing is heard.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_mics.errors import MiCSConfigError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What a launcher told a rank.

    Attributes:
        rank: The rank.
        world_size: How many there are.
        local_rank: Its place on its node.
        node_size: How many ranks its launcher started on its node.
        address: Of rank 0, as ``host:port``; empty where there is no launcher.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node_size: int = 1
    address: str = ""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Launch:
        """Reads the variables of torchrun; one process alone where there are none.

        Raises:
            MiCSConfigError: If some of them are missing, or are no numbers.
        """
        missing = [name for name in _VARIABLES if not environ.get(name)]
        if {"RANK", "WORLD_SIZE"} <= set(missing):
            return cls()
        if missing:
            raise MiCSConfigError(
                f"The launcher set {', '.join(name for name in _VARIABLES if name not in missing)}, but not "
                f"{', '.join(missing)}. Start mics doctor by torchrun, or set all four."
            )
        try:
            rank, world_size = (int(environ[name]) for name in ("RANK", "WORLD_SIZE"))
            local_rank, node_size = int(environ.get("LOCAL_RANK", "0")), int(environ.get("LOCAL_WORLD_SIZE", "1"))
        except ValueError as error:
            raise MiCSConfigError(f"A variable of the launcher is no whole number: {error}.") from error
        return cls(rank, world_size, local_rank, node_size, f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}")

    @property
    def is_launched(self) -> bool:
        """Whether a launcher started this process."""
        return bool(self.address)

    def connect(self, timeout: float, *, serve: bool = False) -> dist.Store:
        """Returns a new connection to the store of all ranks, which waits at most ``timeout`` seconds for anything.

        Args:
            timeout: See above.
            serve: Whether to be its server, unless the launcher is.

        Raises:
            RuntimeError: If rank 0 does not answer.
        """
        host, _, port = self.address.rpartition(":")
        serves = serve and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not serves:
            _wait_for_server(host, int(port), timeout)
        store = dist.TCPStore(
            host,
            int(port),
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        return dist.PrefixStore(f"mics-doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_server(host: str, port: int, timeout: float) -> None:
    """Waits until a store answers; PyTorch would print pages of C++ frames meanwhile."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(str(error)) from error
        time.sleep(0.1)


class Meeting:
    """What all ranks have told so far.

    Args:
        store: Where they tell it; no other thread may use this connection.
        rank: This rank.
        world_size: How many there are.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def tell(self, topic: str, value: Any) -> None:
        """Tells something (of JSON) about a topic, once more in the place of what was told before."""
        self._store.set(f"{topic}/{self._rank}", json.dumps(value))

    def has(self, topic: str, rank: int) -> bool:
        """Returns whether a rank has told something about a topic."""
        return self._store.check([f"{topic}/{rank}"])

    def heard(self, topic: str) -> dict[int, Any]:
        """Returns, by rank, what has been told about a topic so far."""
        told = [rank for rank in range(self._world_size) if self.has(topic, rank)]
        return {rank: self.read(topic, rank) for rank in told}

    def read(self, topic: str, rank: int) -> Any:
        """Returns what a rank tells about a topic; waits for it."""
        return json.loads(self._store.get(f"{topic}/{rank}"))

    def meet(self, where: str) -> None:
        """Waits until all ranks are here."""
        if self._store.add(f"met/{where}", 1) == self._world_size:
            self._store.set(f"all/{where}", "")
        self._store.wait([f"all/{where}"])
