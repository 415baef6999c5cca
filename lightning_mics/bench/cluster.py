"""A cluster on one machine: nodes are network namespaces, joined by links of limited rate (Linux, root)."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from lightning_mics.errors import MiCSConfigError, MiCSError
from lightning_mics.processes import end_with_parent

_UNITS = {"": 1, "bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_RATES = (10**3, 10**11)
_MTUS = (576, 65535)
_MAX_NODES = 32
_PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "mount": "mount"}
_NAME = re.compile(r"(?P<key>mics-(?P<pid>\d+)-(?P<start>\d+)-\d+)-(node\d+|switch|files-\w+)")
_BRIDGE = "bridge"
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_counter = itertools.count()

# Everything that a node needs and that could be refused; all of it is gone when the trial ends.
_TRIAL = """
ip link add left type veth peer name right && ip link add switch type bridge &&
tc qdisc add dev left root tbf rate 1mbit burst 128k latency 200ms && echo trial > /proc/sys/kernel/hostname
"""
# The shell stays as process 1, for it reaps orphans and lets its child die of signals as usual. The mounts are seen by
# this program only and go with it, and so does shared memory that killed processes leave behind.
_ENTER = """
echo "$1" > /proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm || exit 125
shift 2
"$@"
exit $?
"""
_UNSHARE = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--propagation", "slave", "--mount-proc"]


class EmulatorError(MiCSError):
    """The emulated cluster cannot be made, or something in it failed."""


def parse_rate(text: str) -> int | None:
    """Reads the rate of a link.

    Args:
        text: Such as ``100mbit``, ``2.5gbit``, a plain number of bits per second, or ``none``.

    Returns:
        Bits per second, or None for a link without a limit.

    Raises:
        MiCSConfigError: If it is none of these.
    """
    words = text.strip().lower()
    if words == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", words)
    if found is None or found[2] not in _UNITS:
        raise MiCSConfigError(
            f"The rate {text!r} is not a number of bits per second. Write it with kbit, mbit or gbit (100mbit), as a "
            "plain number of bits per second (100000000), or none for no limit."
        )
    rate = round(float(found[1]) * _UNITS[found[2]])
    _check_rate(rate)
    return rate


def format_rate(rate: float | None) -> str:
    """Writes a rate for people, such as ``100 Mbit/s``; None is a link without a limit."""
    if rate is None:
        return "unlimited"
    for unit, size in (("Gbit/s", 10**9), ("Mbit/s", 10**6), ("kbit/s", 10**3)):
        if rate >= size:
            return f"{rate / size:.4g} {unit}"
    return f"{rate:.4g} bit/s"


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What an emulated cluster looks like.

    Attributes:
        num_nodes: Number of nodes.
        node_size: Ranks a node.
        rate: Bits per second of each node's link, in either direction; None for no limit.
        mtu: Largest packet of the links, in bytes.
    """

    num_nodes: int
    node_size: int
    rate: int | None
    mtu: int = 9000

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= _MAX_NODES:
            raise MiCSConfigError(f"num_nodes={self.num_nodes} must be from 1 to {_MAX_NODES}. Try num_nodes=2.")
        if self.node_size < 1:
            raise MiCSConfigError(f"node_size={self.node_size} must be at least 1. Try node_size=2.")
        if self.rate is not None:
            _check_rate(self.rate)
        if not _MTUS[0] <= self.mtu <= _MTUS[1]:
            raise MiCSConfigError(f"mtu={self.mtu} must be from {_MTUS[0]} to {_MTUS[1]} bytes. Try mtu=9000.")

    @property
    def world_size(self) -> int:
        """Ranks of all nodes together."""
        return self.num_nodes * self.node_size


def _check_rate(rate: int) -> None:
    if not _RATES[0] <= rate <= _RATES[1]:
        low, high = map(format_rate, _RATES)
        raise MiCSConfigError(
            f"A rate of {format_rate(rate)} must be from {low} to {high}. Try 100mbit, or none for no limit."
        )


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

    Attributes:
        spec: What it looks like.
        nodes: Its nodes; none outside the ``with`` statement.
        folder: A temporary folder that is deleted with the cluster.

    Raises:
        EmulatorError: On entering, if this machine cannot do it; says what is missing.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.nodes: tuple[Node, ...] = ()
        self.folder = Path()
        self._namespaces: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> EmulatedCluster:
        missing = missing_requirements()
        if missing is not None:
            raise EmulatorError(missing)
        key = f"mics-{os.getpid()}-{_start_time(os.getpid())}-{next(_counter)}"
        self.nodes = tuple(
            Node(index=index, namespace=f"{key}-node{index}", address=f"10.77.0.{index + 1}")
            for index in range(self.spec.num_nodes)
        )
        switch = f"{key}-switch"
        self._namespaces = [switch, *(node.namespace for node in self.nodes)]
        try:
            with _signals_later():
                self.folder = Path(tempfile.mkdtemp(prefix=f"{key}-files-"))
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
        process = subprocess.Popen(
            ["ip", "netns", "exec", place.namespace, *_UNSHARE, *enter, *command],
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
            shown = _run(["ip", "-n", node.namespace, "-j", "-s", "link", "show", "dev", node.interface])
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
        _batch(["ip"], [f"netns add {namespace}" for namespace in self._namespaces])
        _batch(
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
        _batch(["ip", "-n", switch], [*bridge, *ports])
        _limit(switch, [node.hostname for node in self.nodes], spec.rate)
        for node in self.nodes:
            address = f"address add {node.address}/24 dev {node.interface}"
            link = f"link set {node.interface} addrgenmode none up"
            _batch(["ip", "-n", node.namespace], ["link set lo up", address, link])
            _limit(node.namespace, [node.interface], spec.rate)

    def _remove(self) -> None:
        with _signals_later():
            self.end(self._processes)
            _remove_namespaces(self._namespaces)
            if self.folder != Path():
                shutil.rmtree(self.folder, ignore_errors=True)
            self.nodes, self.folder, self._namespaces, self._processes = (), Path(), [], []


def missing_requirements() -> str | None:
    """Returns what this machine lacks for an emulated cluster and what to do about it, or None if it lacks nothing."""
    missing = _missing_tools()
    if missing is not None:
        return missing
    trial = subprocess.run(
        [*_UNSHARE, "--net", "sh", "-c", _TRIAL],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    if trial.returncode == 0:
        return None
    return (
        f"An emulated cluster needs namespaces, veth links, a bridge and the tbf queue, and the kernel refuses one of "
        f"them: {trial.stderr.strip()}. In a container, start it with --privileged; elsewhere, load the kernel modules "
        "veth, bridge and sch_tbf."
    )


def _missing_tools() -> str | None:
    if sys.platform != "linux":
        return f"An emulated cluster needs Linux, and this is {sys.platform}. Run it in a Linux virtual machine."
    missing = [tool for tool in _PACKAGES if shutil.which(tool) is None]
    if missing:
        packages = " ".join(dict.fromkeys(_PACKAGES[tool] for tool in missing))
        return (
            f"An emulated cluster needs {', '.join(missing)}, not found on PATH. Install with: apt install {packages}"
        )
    if os.geteuid() != 0:
        return f"An emulated cluster needs root, and this is user {os.geteuid()}. Run it with sudo, or in a container."
    return None


def clean(everything: bool = False) -> list[str]:
    """Removes what emulated clusters left behind because the process that made them was killed.

    Links go with their namespaces. A process in another process namespace cannot be seen, and counts as gone.

    Args:
        everything: Whether to remove the clusters of processes that still run, too.

    Returns:
        Names of the network namespaces and folders that were removed.

    Raises:
        EmulatorError: If something cannot be removed.
    """
    missing = _missing_tools()
    if missing is not None:
        raise EmulatorError(missing)
    namespaces = [name for name in _list_namespaces() if _is_to_remove(name, everything)]
    folders = [
        path
        for path in Path(tempfile.gettempdir()).glob("mics-*-files-*")
        if _is_to_remove(path.name, everything) and path.lstat().st_uid == os.geteuid() and not path.is_symlink()
    ]
    _remove_namespaces(namespaces)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    left = [name for name in _list_namespaces() if name in namespaces]
    left += [str(folder) for folder in folders if folder.exists()]
    if left:
        raise EmulatorError(f"These could not be removed: {', '.join(left)}. Try again as root.")
    return [*namespaces, *map(str, folders)]


def _is_to_remove(name: str, everything: bool) -> bool:
    found = _NAME.fullmatch(name)
    return found is not None and (everything or _start_time(int(found["pid"])) != int(found["start"]))


def _start_time(pid: int) -> int | None:
    """Returns when a process started, in the kernel's ticks, or None if none with this number runs.

    A process is its number and its start: numbers are used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the second field, a name, may hold spaces and brackets
    return None if state == "Z" else int(fields[18])


def _limit(namespace: str, links: Sequence[str], rate: int | None) -> None:
    """Limits what leaves by ``links``."""
    if rate is None:
        return
    # A packet may have 64 KiB before it is cut for the wire, and the timer that refills the bucket is no finer than
    # about a millisecond under load.
    burst = max(128 * 1024, math.ceil(rate / 8 / 1000))
    lines = [f"qdisc add dev {link} root tbf rate {rate}bit burst {burst}b latency 200ms" for link in links]
    _batch(["tc", "-n", namespace], lines)


def _list_namespaces() -> list[str]:
    return [line.split()[0] for line in _run(["ip", "netns", "list"]).splitlines() if line.strip()]


def _remove_namespaces(namespaces: Sequence[str]) -> None:
    """Kills what runs in namespaces and removes them, as far as they still exist."""
    existing = [name for name in _list_namespaces() if name in namespaces]
    deadline = time.monotonic() + 5
    while (pids := [pid for name in existing for pid in _pids(name)]) and time.monotonic() < deadline:
        for pid in pids:
            _kill(pid)
        time.sleep(0.02)
    if existing:
        _batch(["ip", "-force"], [f"netns delete {name}" for name in existing], check=False)


def _pids(namespace: str) -> list[int]:
    return [int(word) for word in _run(["ip", "netns", "pids", namespace], check=False).split()]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _open_inside(pid: int) -> int | None:
    """Opens process 1 of the namespace that the ``unshare`` process ``pid`` made, if it exists yet.

    The file becomes readable when it has ended, and the kernel ends all others in the namespace before it.
    """
    with suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return os.pidfd_open(int(children[0])) if children else None
    return None


@contextmanager
def _signals_later() -> Iterator[None]:
    """Lets a second Ctrl-C wait until everything is removed."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batch(command: Sequence[str], lines: Sequence[str], check: bool = True) -> None:
    _run([*command, "-batch", "-"], "\n".join(lines) + "\n", check)


def _run(command: Sequence[str], text: str = "", check: bool = True) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, start_new_session=True)
    if check and done.returncode != 0:
        raise EmulatorError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}\n{text}".strip())
    return done.stdout
