"""One rank of four raises: the whole job is gone within seconds, and its error is the last on the screen."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from process_tools import processes_naming

from lightning_mics.accelerate.launch_file import LaunchSettings, write_launch_file
from lightning_mics.core import failures

SCRIPT = Path(__file__).parent / "scripts" / "failing_rank.py"
SECONDS = 15.0
PLACES = ("forward", "backward", "optimizer", "loader")

# One of each launcher; the campaign has them all.
FEW = [
    ("torchrun", "bare", "forward", 1),
    ("lightning", "lightning", "backward", 2),
    ("accelerate", "accelerate", "loader", 0),
]
ALL = [
    *(("torchrun", "bare", place, rank) for place in PLACES for rank in (0, 3)),
    *(("lightning", "lightning", place, rank) for place in (*PLACES, "callback") for rank in (0, 3)),
    *(("torchrun", "lightning", place, rank) for place in (*PLACES, "callback") for rank in (0, 3)),
    *(("accelerate", "accelerate", place, rank) for place in PLACES for rank in (0, 3)),
]


def command(launcher: str, folder: Path) -> list[str]:
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone"]
    if launcher == "lightning":
        return [sys.executable]
    file = folder / "mics.yaml"
    write_launch_file(file, LaunchSettings(num_processes=4, shard_size=2, cpu=True))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]


def fail(folder: Path, launcher: str, *words: object) -> tuple[float, str]:
    """Returns the seconds from the error until the job is gone, and what was on the screen."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    mark = str(folder / SCRIPT.name)
    Path(mark).write_text(SCRIPT.read_text())
    done = subprocess.run(
        [*command(launcher, folder), mark, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, env=environment, cwd=folder,
    )  # fmt: skip
    raised = re.search(r"RAISED ([\d.]+)", done.stdout)
    assert raised is not None and done.returncode != 0, done.stdout
    seconds = time.time() - float(raised[1])
    assert processes_naming(mark) == []
    return seconds, done.stdout


def check(folder: Path, launcher: str, way: str, place: str, rank: int) -> float:
    seconds, screen = fail(folder, launcher, way, place, rank)
    lines = [line.strip() for line in screen.splitlines() if line.strip(" =")]
    assert lines[-1].endswith(f"ValueError: rank {rank} failed in {place}"), screen
    assert "transport" not in screen, screen  # no errors of lost connections
    assert seconds < SECONDS, screen
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "way", "place", "rank"), FEW, ids=[case[0] for case in FEW])
def test_the_job_ends_with_the_error_of_the_rank_that_failed(
    tmp_path: Path, launcher: str, way: str, place: str, rank: int
) -> None:
    check(tmp_path, launcher, way, place, rank)


@pytest.mark.campaign
@pytest.mark.parametrize(("launcher", "way", "place", "rank"), ALL, ids=["-".join(map(str, case)) for case in ALL])
def test_it_does_wherever_that_was(
    tmp_path: Path, record_property: pytest.RecordProperty, launcher: str, way: str, place: str, rank: int
) -> None:
    record_property("figures", f"gone after {check(tmp_path, launcher, way, place, rank):.1f} s")


@pytest.mark.parametrize(
    ("error", "is_of_peer"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_lost_connections_are_told_from_other_errors(error: Exception, is_of_peer: bool) -> None:
    assert bool(failures._tells_of_a_peer(error)) is is_of_peer
    wrapped = KeyError("while saving")
    wrapped.__cause__ = error
    assert bool(failures._tells_of_a_peer(wrapped)) is is_of_peer


def test_an_error_that_causes_itself_is_followed_once() -> None:
    error = ValueError("raise error from error")
    error.__cause__ = error
    assert not failures._tells_of_a_peer(error)


def test_torchrun_reads_the_earliest_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    found = {}
    for rank, (message, earlier) in enumerate([("rank 0 ended after rank 1", -1), ("Traceback\nthe error", 1)]):
        path = tmp_path / f"{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        failures.write_error_file(message, earlier=earlier)
        failures.write_error_file("what comes later", earlier=9)
        assert json.loads(path.read_text())["message"]["message"] == message
        found[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=1, error_file=str(path))
    error = ChildFailedError("train.py", found)
    assert error.get_first_failure()[0] == 1
    assert str(error).rstrip("= \n").endswith("the error")
