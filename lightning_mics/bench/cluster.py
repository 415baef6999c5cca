"""A cluster on one machine: nodes are network namespaces, joined by links of limited rate (Linux, root)."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import subprocess
import time
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

STORAGE_INTERFACE = "eth1"  # of a node, where there is a storage server
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
    """One node of an emulated cluster, or its storage server.

    Attributes:
        index: Its number, from 0; -1 for the storage server.
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
        return "storage" if self.index < 0 else f"node{self.index}"


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
        storage: Its storage server, where the specification asks for one; programs on nodes know it by this name.
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
        self.storage: Node | None = None
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
        if self.spec.storage_rate is not None:
            self.storage = Node(index=-1, namespace=f"{key}-storage", address="10.78.0.254")
        switch = f"{key}-switch"
        self._namespaces = [switch, *(node.namespace for node in self._places())]
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

    def _places(self) -> list[Node]:
        return [*self.nodes, *([self.storage] if self.storage is not None else [])]

    def popen(
        self,
        node: int | Node,
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
            node: The node, or its number.
            command: The program and its arguments.
            environment: Variables to add to those of this process. ``TMPDIR`` is a folder that goes with the cluster.
            stdout: As for ``Popen``.
            stderr: As for ``Popen``.
            cwd: The folder to start it in; the one of this process by default.

        Returns:
            The process.
        """
        place = node if isinstance(node, Node) else self.nodes[node]
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
        # A namespace that was only being made had nothing inside yet; what was dies with its parent, a moment later.
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not _sessions().isdisjoint(process.pid for process in processes):
            time.sleep(0.01)

    def sent_bytes(self) -> list[int]:
        """Returns how many bytes each node has sent over its link so far, as the kernel counts them.

        Headers are included, but once for each packet of up to 64 KiB that the kernel cuts for the wire later.
        """
        return [_counted(node, node.interface, "tx") for node in self.nodes]

    def stored_bytes(self) -> int:
        """Returns how many bytes the storage server has received so far, as the kernel counts them."""
        assert self.storage is not None
        return _counted(self.storage, self.storage.interface, "rx")

    def _write_files(self) -> None:
        lines = ["127.0.0.1 localhost", *(f"{node.address} {node.hostname}" for node in self._places())]
        # PyTorch also looks these up, and warns if they have no name.
        lines += [f"::ffff:{node.address} {node.hostname}.mapped" for node in self.nodes]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        self.folder.chmod(0o755)
        for node in self._places():
            (self.folder / node.hostname).mkdir()

    def _make(self, switch: str) -> None:
        batch(["ip"], [f"netns add {namespace}" for namespace in self._namespaces])
        for place in self._places():
            batch(["ip", "-n", place.namespace], ["link set lo up"])
        self._join(switch, "bridge", [_Link(node, node.interface, node.address, self.spec.rate) for node in self.nodes])
        if self.storage is not None:
            links = [_Link(node, STORAGE_INTERFACE, f"10.78.0.{node.index + 1}", None) for node in self.nodes]
            links.append(_Link(self.storage, self.storage.interface, self.storage.address, self.spec.storage_rate))
            self._join(switch, "storage", links)

    def _join(self, switch: str, bridge: str, links: Sequence[_Link]) -> None:
        """Joins places by a bridge."""
        mtu = self.spec.mtu
        batch(
            ["ip"],
            [
                f"link add {link.interface} netns {link.place.namespace} mtu {mtu} type veth "
                f"peer name {link.port} netns {switch} mtu {mtu}"
                for link in links
            ],
        )
        # Without multicast snooping and link-local addresses, the counters hold little but what programs send.
        made = [f"link add {bridge} mtu {mtu} type bridge mcast_snooping 0"]
        made += [f"link set {bridge} addrgenmode none", f"link set {bridge} up"]
        made += [f"link set {link.port} addrgenmode none master {bridge} up" for link in links]
        batch(["ip", "-n", switch], made)
        for link in links:
            address = f"address add {link.address}/24 dev {link.interface}"
            up = f"link set {link.interface} addrgenmode none up"
            batch(["ip", "-n", link.place.namespace], [address, up])
            _limit(switch, link.port, link.rate)
            _limit(link.place.namespace, link.interface, link.rate)

    def _remove(self) -> None:
        with signals_later():
            self.end(self._processes)
            remove_namespaces(self._namespaces)
            if self.folder != Path():
                shutil.rmtree(self.folder, ignore_errors=True)
            self.nodes, self.storage, self.folder = (), None, Path()
            self._namespaces, self._processes = [], []


@dataclass(frozen=True)
class _Link:
    """A link of a place to a bridge; ``rate`` as in the specification."""

    place: Node
    interface: str
    address: str
    rate: int | None

    @property
    def port(self) -> str:
        """Its end at the bridge."""
        return f"{self.place.hostname}-{self.interface}"


def _counted(place: Node, interface: str, direction: str) -> int:
    shown = run(["ip", "-n", place.namespace, "-j", "-s", "link", "show", "dev", interface])
    return int(json.loads(shown)[0]["stats64"][direction]["bytes"])


def _limit(namespace: str, interface: str, rate: int | None) -> None:
    """Limits what leaves by an interface."""
    if rate is None:
        return
    # A packet may have 64 KiB before it is cut for the wire, and the timer that refills the bucket is no finer than
    # about a millisecond under load.
    burst = max(128 * 1024, math.ceil(rate / 8 / 1000))
    batch(["tc", "-n", namespace], [f"qdisc add dev {interface} root tbf rate {rate}bit burst {burst}b latency 200ms"])


def _sessions() -> set[int]:
    """Returns the sessions of all processes."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            found.add(int(entry.read_text().rpartition(")")[2].split()[3]))
    return found


def _open_inside(pid: int) -> int | None:
    """Opens process 1 of the namespace that the ``unshare`` process ``pid`` made, if it exists yet.

    The file becomes readable when it has ended, and the kernel ends all others in the namespace before it.
    """
    with suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return os.pidfd_open(int(children[0])) if children else None
    return None
