"""How one rank ends: what is limited after an error, and what it prints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

SCRIPT = Path(__file__).parent / "scripts" / "ending_rank.py"
Ended = tuple[int, str, str]


def start(way: str, world_size: int) -> list[subprocess.Popen[str]]:
    """Starts ranks without a launcher, so that rank 0 has the store."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), way], env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip


def end(process: subprocess.Popen[str]) -> Ended:
    try:
        printed, errors = process.communicate(timeout=55)
    finally:
        process.kill()
    return process.returncode, printed, errors


@pytest.mark.slow
def test_destructors_and_groups_have_little_time_after_an_error_and_work_at_exit_has_all() -> None:
    code, printed, errors = end(*start("slow destructor", 1))
    assert code == -signal.SIGALRM, errors
    assert "registered before the groups" in printed
    assert "registered after the groups" in printed
    assert end(*start("slow groups", 1))[0] == -signal.SIGALRM


@pytest.mark.slow
def test_a_rank_that_follows_loses_nothing_printed_and_tells_one_line() -> None:
    (code, printed, errors), _ = map(end, start("follows", 2))
    assert (code, printed) == (1, "printed, and not flushed\n")
    assert errors == "rank 0 ended after rank 1 had failed: ValueError: no luck\n"


@pytest.mark.slow
def test_a_rank_that_outlives_the_store_is_silent() -> None:
    for code, _, errors in map(end, start("outlives rank 0", 2)):
        assert (code, errors) == (0, "")
