"""A cluster in name only: all its ranks talk over this machine's loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from lightning_mics.bench.cluster import Node
from lightning_mics.bench.namespaces import signals_later, temporary_folder
from lightning_mics.bench.spec import ClusterSpec
from lightning_mics.processes import end_with_children, end_with_parent

_PATIENCE = 5.0


class LoopbackCluster:
    """Takes the place of an :class:`~lightning_mics.bench.cluster.EmulatedCluster` where none can be made.

    Its nodes are numbers only: every link is loopback, as fast between nodes as inside of one, and nobody counts what a
    node sends. It needs neither root nor Linux.

    Args:
        spec: How many nodes of how many ranks; its rate and packets are of no account.

    Attributes:
        spec: What it looks like.
        nodes: Its nodes; none outside the ``with`` statement.
        folder: A temporary folder that is deleted with the cluster.
        port: A port that was free, for torchrun.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.nodes: tuple[Node, ...] = ()
        self.folder = Path()
        self.port = 0
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> LoopbackCluster:
        self.nodes = tuple(
            Node(index=index, namespace="", address="127.0.0.1", interface="lo") for index in range(self.spec.num_nodes)
        )
        self.port = _free_port()
        with signals_later():
            self.folder = temporary_folder()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with signals_later():
            self.end(self._processes)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.nodes, self.folder, self._processes = (), Path(), []

    def popen(
        self,
        node: int,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a program, as :meth:`EmulatedCluster.popen <lightning_mics.bench.cluster.EmulatedCluster.popen>` does.

        What it starts itself should ask the kernel to end with it.
        """
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        self._processes.append(process)
        return process

    def end(self, processes: Iterable[subprocess.Popen[bytes]]) -> None:
        """Ends programs that :meth:`popen` started, with their children."""
        for process in processes:
            if process.poll() is None:
                end_with_children(process, _PATIENCE)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
