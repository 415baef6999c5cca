"""The worker pool that all multi-process tests share, and the check that nothing outlives the tests."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import pytest
from script_tools import HEAVY
from works import ROWS, checked_refusals

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with checked_refusals(item):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps what was collected, campaigns included, and puts files with slow tests first.

    Processes that share the suite then end together.
    """
    config.stash[ROWS] = list(items)
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, help="write what the campaigns count to this file")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Tells what campaigns counted: tests record it as the property ``figures``."""
    stats = terminalreporter.stats
    passed = [report for report in stats.get("passed", []) if "campaign" in report.keywords]
    if not passed:
        return
    rows = []
    for report in sorted(passed, key=lambda report: report.nodeid):
        figures = dict(report.user_properties).get("figures", "passed")
        rows.append(f"| `{report.nodeid.removeprefix('tests/')}` | {figures} | {report.duration:.0f} s |")
    table = "\n".join(["| campaign | outcome | time |", "| --- | --- | --- |", *rows, ""])
    terminalreporter.section("figures of campaigns")
    terminalreporter.write(table)
    if path := config.getoption("--figures"):
        versions = [f"{name} {version(name)}" for name in ("torch", "lightning", "accelerate", "transformers")]
        where = ", ".join([str(date.today()), f"Python {platform.python_version()}", *versions])
        path.write_text(f"{where}: {len(rows)} passed, {len(stats.get('failed', []))} failed.\n\n{table}")
