"""A cluster on one machine: nodes are network namespaces, joined by links of limited rate (Linux, root)."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from lightning_mics.bench.namespaces import (
    UNSHARE,
    EmulatorError,
    batch,
    missing_requirements,
    new_key,
    remove_namespaces,
    run,
    signals_later,
    temporary_folder,
)
from lightning_mics.bench.spec import ClusterSpec
from lightning_mics.processes import end_with_parent

_BRIDGE = "bridge"
# The shell stays as process 1, for it reaps orphans and lets its child die of signals as usual. The mounts are seen by
# this program only and go with it, and so does shared memory that killed processes leave behind.
_ENTER = """
echo "$1" > /proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts || exit 125
test "$3" = shared || mount -t tmpfs tmpfs /dev/shm || exit 125
shift 3
"$@"
exit $?
"""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of an emulated cluster.

    Attributes:
        index: Its number, from 0.
        namespace: The name of its network namespace, for ``ip netns``.
        address: Its IPv4 address.
        interface: Its network interface.
    """

    index: int
    namespace: str
    address: str
    interface: str = "eth0"

    @property
    def hostname(self) -> str:
        """The host name that programs on it see."""
        return f"node{self.index}"


class EmulatedCluster:
    """A cluster that exists within a ``with`` statement.

    Each node has a network namespace of its own, with one interface whose link to a switch is limited in both
    directions. Nothing is added to the machine's own network, so several clusters can exist side by side. Programs on
    a node also have a process namespace and a host name of their own; they end with the cluster, and with the process
    that made it, even if that is killed.

    Args:
        spec: What it looks like.
        shared_memory: Whether nodes see the machine's shared memory, as clients of one of its services may have to.

    Attributes:
        spec: What it looks like.
        nodes: Its nodes; none outside the ``with`` statement.
        folder: A temporary folder that is deleted with the cluster.
        port: A free port, for torchrun.

    Raises:
        EmulatorError: On entering, if this machine cannot do it; says what is missing.
    """

    port = 29500  # each node has all ports for itself

    def __init__(self, spec: ClusterSpec, *, shared_memory: bool = False) -> None:
        self.spec = spec
        self._shared_memory = shared_memory
        self.nodes: tuple[Node, ...] = ()
        self.folder = Path()
        self._namespaces: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> EmulatedCluster:
        missing = missing_requirements()
        if missing is not None:
            raise EmulatorError(missing)
        key = new_key()
        self.nodes = tuple(
            Node(index=index, namespace=f"{key}-node{index}", address=f"10.77.0.{index + 1}")
            for index in range(self.spec.num_nodes)
        )
        switch = f"{key}-switch"
        self._namespaces = [switch, *(node.namespace for node in self.nodes)]
        try:
            with signals_later():
                self.folder = temporary_folder(key)
            self._write_files()
            self._make(switch)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

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
        """Starts a program on a node.

        It ends with the thread that starts it. What is returned stands for the program but is not it: its exit code
        is the program's (128 plus the number of the signal that ended it), but only :meth:`end` ends it tidily.

        Args:
            node: Number of the node.
            command: The program and its arguments.
            environment: Variables to add to those of this process. ``TMPDIR`` is a folder that goes with the cluster.
            stdout: As for ``Popen``.
            stderr: As for ``Popen``.
            cwd: The folder to start it in; the one of this process by default.

        Returns:
            The process.
        """
        place = self.nodes[node]
        enter = ["sh", "-c", _ENTER, "sh", place.hostname, str(self.folder / "hosts")]
        enter.append("shared" if self._shared_memory else "own")
        process = subprocess.Popen(
            ["ip", "netns", "exec", place.namespace, *UNSHARE, *enter, *command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env={**os.environ, "TMPDIR": str(self.folder / place.hostname), **(environment or {})},
            start_new_session=True,  # Ctrl-C in a terminal reaches this process only, and it ends the others
            preexec_fn=end_with_parent,
        )
        self._processes.append(process)
        return process

    def end(self, processes: Iterable[subprocess.Popen[bytes]]) -> None:
        """Kills programs that :meth:`popen` started, with all their descendants, and waits until they are gone."""
        processes = [process for process in processes if process.poll() is None]
        insides = [inside for process in processes if (inside := _open_inside(process.pid)) is not None]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        for inside in insides:
            select.select([inside], [], [], 5)
            os.close(inside)

    def sent_bytes(self) -> list[int]:
        """Returns how many bytes each node has sent over its link so far, as the kernel counts them.

        Headers are included, but once for each packet of up to 64 KiB that the kernel cuts for the wire later.
        """
        counts = []
        for node in self.nodes:
            shown = run(["ip", "-n", node.namespace, "-j", "-s", "link", "show", "dev", node.interface])
            counts.append(json.loads(shown)[0]["stats64"]["tx"]["bytes"])
        return counts

    def _write_files(self) -> None:
        lines = ["127.0.0.1 localhost", *(f"{node.address} {node.hostname}" for node in self.nodes)]
        # PyTorch also looks these up, and warns if they have no name.
        lines += [f"::ffff:{node.address} {node.hostname}.mapped" for node in self.nodes]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        self.folder.chmod(0o755)
        for node in self.nodes:
            (self.folder / node.hostname).mkdir()

    def _make(self, switch: str) -> None:
        spec = self.spec
        batch(["ip"], [f"netns add {namespace}" for namespace in self._namespaces])
        batch(
            ["ip"],
            [
                f"link add {node.interface} netns {node.namespace} mtu {spec.mtu} type veth "
                f"peer name {node.hostname} netns {switch} mtu {spec.mtu}"
                for node in self.nodes
            ],
        )
        # Without multicast snooping and link-local addresses, the counters hold little but what programs send.
        ports = [f"link set {node.hostname} addrgenmode none master {_BRIDGE} up" for node in self.nodes]
        bridge = [f"link add {_BRIDGE} mtu {spec.mtu} type bridge mcast_snooping 0", f"link set {_BRIDGE} up"]
        bridge.insert(1, f"link set {_BRIDGE} addrgenmode none")
        batch(["ip", "-n", switch], [*bridge, *ports])
        _limit(switch, [node.hostname for node in self.nodes], spec.rate)
        for node in self.nodes:
            address = f"address add {node.address}/24 dev {node.interface}"
            link = f"link set {node.interface} addrgenmode none up"
            batch(["ip", "-n", node.namespace], ["link set lo up", address, link])
            _limit(node.namespace, [node.interface], spec.rate)

    def _remove(self) -> None:
        with signals_later():
            self.end(self._processes)
            remove_namespaces(self._namespaces)
            if self.folder != Path():
                shutil.rmtree(self.folder, ignore_errors=True)
            self.nodes, self.folder, self._namespaces, self._processes = (), Path(), [], []


def _limit(namespace: str, links: Sequence[str], rate: int | None) -> None:
    """Limits what leaves by ``links``."""
    if rate is None:
        return
    # A packet may have 64 KiB before it is cut for the wire, and the timer that refills the bucket is no finer than
    # about a millisecond under load.
    burst = max(128 * 1024, math.ceil(rate / 8 / 1000))
    lines = [f"qdisc add dev {link} root tbf rate {rate}bit burst {burst}b latency 200ms" for link in links]
    batch(["tc", "-n", namespace], lines)


def _open_inside(pid: int) -> int | None:
    """Opens process 1 of the namespace that the ``unshare`` process ``pid`` made, if it exists yet.

    The file becomes readable when it has ended, and the kernel ends all others in the namespace before it.
    """
    with suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return os.pidfd_open(int(children[0])) if children else None
    return None
