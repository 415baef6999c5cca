"""Network namespaces of the kernel: whether this machine has what they need, and removing what is left of them."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_mics.errors import MiCSError
from lightning_mics.processes import start_time

_PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "mount": "mount"}
_NAME = re.compile(r"mics-(?P<pid>\d+)-(?P<start>\d+)-\d+-(node\d+|storage|switch|files-\w+)")
_counter = itertools.count()
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
UNSHARE = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--propagation", "slave", "--mount-proc"]
# Everything that a node needs and that could be refused; all of it is gone when the trial ends.
_TRIAL = """
ip link add left type veth peer name right && ip link add switch type bridge &&
tc qdisc add dev left root tbf rate 1mbit burst 128k latency 200ms && echo trial > /proc/sys/kernel/hostname
"""


class EmulatorError(MiCSError):
    """The emulated cluster cannot be made, or something in it failed."""


def missing_requirements() -> str | None:
    """Returns what this machine lacks for an emulated cluster and what to do about it, or None if it lacks nothing."""
    missing = _missing_tools()
    if missing is not None:
        return missing
    trial = subprocess.run(
        [*UNSHARE, "--net", "sh", "-c", _TRIAL],
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
    remove_namespaces(namespaces)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    left = [name for name in _list_namespaces() if name in namespaces]
    left += [str(folder) for folder in folders if folder.exists()]
    if left:
        raise EmulatorError(f"These could not be removed: {', '.join(left)}. Try again as root.")
    return [*namespaces, *map(str, folders)]


def _is_to_remove(name: str, everything: bool) -> bool:
    found = _NAME.fullmatch(name)
    return found is not None and (everything or start_time(int(found["pid"])) != int(found["start"]))


def _list_namespaces() -> list[str]:
    return [line.split()[0] for line in run(["ip", "netns", "list"]).splitlines() if line.strip()]


def remove_namespaces(namespaces: Sequence[str]) -> None:
    """Kills what runs in namespaces and removes them, as far as they still exist."""
    existing = [name for name in _list_namespaces() if name in namespaces]
    deadline = time.monotonic() + 5
    while (pids := [pid for name in existing for pid in _pids(name)]) and time.monotonic() < deadline:
        for pid in pids:
            _kill(pid)
        time.sleep(0.02)
    if existing:
        batch(["ip", "-force"], [f"netns delete {name}" for name in existing], check=False)


def _pids(namespace: str) -> list[int]:
    return [int(word) for word in run(["ip", "netns", "pids", namespace], check=False).split()]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def new_key() -> str:
    """Returns a name for what belongs to this process, by which :func:`clean` knows whether it is left over."""
    return f"mics-{os.getpid()}-{start_time(os.getpid())}-{next(_counter)}"


def temporary_folder(key: str | None = None) -> Path:
    """Makes a temporary folder, which :func:`clean` removes if this process is killed."""
    return Path(tempfile.mkdtemp(prefix=f"{key or new_key()}-files-"))


@contextmanager
def signals_later() -> Iterator[None]:
    """Lets a second Ctrl-C wait until everything is removed."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def batch(command: Sequence[str], lines: Sequence[str], check: bool = True) -> None:
    """Runs lines of ``ip`` or ``tc`` as one command."""
    run([*command, "-batch", "-"], "\n".join(lines) + "\n", check)


def run(command: Sequence[str], text: str = "", check: bool = True) -> str:
    """Runs a command and returns what it prints.

    Raises:
        EmulatorError: If it fails and ``check`` is set.
    """
    done = subprocess.run(command, input=text, capture_output=True, text=True, start_new_session=True)
    if check and done.returncode != 0:
        raise EmulatorError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}\n{text}".strip())
    return done.stdout
