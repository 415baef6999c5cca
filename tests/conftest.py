"""The worker pool that all multi-process tests share, and the check that nothing outlives the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest
from script_tools import HEAVY

from lightning_mics.testing import WorkerPool, get_pool


def child_processes(pid: int) -> dict[int, str]:
    """Returns the command lines of the processes that descend from ``pid``, by process id (on Linux)."""
    found = {}
    with suppress(FileNotFoundError):  # it has ended meanwhile
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                found |= child_processes(child)
    return found


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fails the session if a test leaves a process behind; multiprocessing's own two servers end with this one."""
    yield
    servers = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    left = {pid: command for pid, command in child_processes(os.getpid()).items() if pid not in servers}
    assert not left, f"processes left behind: {left}"


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    with get_pool(preload=HEAVY) as pool:
        yield pool


@pytest.fixture(params=["forked", pytest.param("real", marks=pytest.mark.campaign)])
def real(request: pytest.FixtureRequest) -> bool:
    """Whether a script is started by a real launcher and in fresh interpreters, or in processes that are forked."""
    return bool(request.param == "real")
