"""Who a process is, processes that do not outlive the one that started them, and programs that tidy up at the end."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def start_time(pid: int) -> int | None:
    """Returns when a process started, in the kernel's ticks; ``None`` if it is over, or the system does not tell.

    A process is its number and its start: numbers are used again. One that nobody has waited for is over.
    """
    try:
        told = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = told.rpartition(")")[2].split()  # the second field, a name, may hold spaces and brackets
    return None if state in "ZX" else int(fields[18])


def end_with_parent() -> None:
    """Asks the kernel to kill this process when its parent is gone, however that ended (on Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def end_with_launcher() -> None:
    """Does what :func:`end_with_parent` does for a process whose launcher may be gone by now: imports take seconds.

    Raises:
        SystemExit: If it is. A launcher is never the first process itself: whoever starts it is there.
    """
    end_with_parent()
    if os.getppid() == 1:
        raise SystemExit("The launcher of this process has ended.")


def end_with_children(process: subprocess.Popen[bytes], patience: float) -> None:
    """Tells a launcher to end, kills it if it does not, and with it those of its processes that it leaves (on Linux).

    Args:
        process: The launcher.
        patience: Seconds that it has for ending its processes.
    """
    children = _children(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience)
    children |= _children(process.pid)
    process.kill()
    process.wait()
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _children(pid: int) -> set[int]:
    """Returns the processes that a process has started and that run; none where the kernel does not tell."""
    found: set[int] = set()
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            found.update(map(int, thread.read_text().split()))
    return found


def exit_on_signals() -> None:
    """Makes SIGTERM and SIGHUP leave the program through its context managers; by default they end it on the spot."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)


def _exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
