"""The examination of a job's ranks, which ends in time whatever hangs.

Each rank looks and measures in a thread of its own, and tells what it found through the launcher's store. The main
thread of rank 0 collects until all are done or the time is over; then it says who is where.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_mics.core.mesh import communication_device
from lightning_mics.doctor.facts import Facts
from lightning_mics.doctor.findings import Findings
from lightning_mics.doctor.meeting import Launch, Meeting
from lightning_mics.doctor.rates import Exchanges, compute_rates, exchange, opponents, pair_rates, tournament
from lightning_mics.errors import MiCSError

_POLL = 0.1
_AFTER_ERROR = 2.0  # seconds that the others have when a rank has failed
_LATE = 10.0  # seconds that a verdict may come later than time is up


class Examination:
    """One rank's part in looking at all of them.

    Args:
        launch: What the launcher told this rank.
        limit: Seconds after which rank 0 ends with what it knows.
        checkpoints: A folder for checkpoints to look at, too.
    """

    def __init__(self, launch: Launch, limit: float, checkpoints: Path | None = None) -> None:
        self.launch = launch
        self._limit, self._checkpoints = limit, checkpoints
        self._begin = time.monotonic()
        self._alone = dist.HashStore()
        self._meeting = self._connect(serve=launch.rank == 0)
        self._thread = threading.Thread(target=self._look, name="mics-doctor", daemon=True)
        self._thread.start()

    def _connect(self, *, serve: bool = False) -> Meeting:
        launch, patience = self.launch, self._limit + _LATE
        if not launch.is_launched:
            return Meeting(self._alone, 0, 1)
        try:
            return Meeting(launch.connect(patience, serve=serve), launch.rank, launch.world_size)
        except RuntimeError as error:
            raise MiCSError(
                f"Rank {launch.rank} on {socket.gethostname()} does not reach rank 0 at {launch.address} within "
                f"{patience:.0f} s ({error}). Look whether rank 0 was started there, and at firewalls "
                "between the nodes."
            ) from error

    @property
    def seconds(self) -> float:
        """Since when it runs."""
        return time.monotonic() - self._begin

    # On rank 0.

    def collect(self) -> Findings:
        """Waits until all ranks are done, one has failed, or time is up; returns what was found.

        A launcher that tells this process to end, as torchrun does when a rank failed, ends the waiting, too.
        """
        left, end = set(range(self.launch.world_size)), self._limit
        with suppress(SystemExit):
            while left and self.seconds < end:
                left = {rank for rank in left if not self._meeting.has("done", rank)}
                if any(self._meeting.has("error", rank) for rank in left):
                    end = min(end, self.seconds + _AFTER_ERROR)
                    left = {rank for rank in left if not self._meeting.has("error", rank)}
                time.sleep(_POLL)
        return self._findings(left)

    def _findings(self, left: set[int]) -> Findings:
        heard = self._meeting.heard
        facts = {rank: Facts.read(told) for rank, told in heard("facts").items()}
        hosts = list(dict.fromkeys(told.host for told in facts.values()))
        return Findings(
            world_size=self.launch.world_size,
            facts=facts,
            compute=heard("compute"),
            links=self._rates("links", lambda rank: hosts.index(facts[rank].host)),
            inside=self._rates("inside", lambda rank: rank),
            sees=heard("sees"),
            errors=heard("error"),
            places={rank: place for rank, place in heard("does").items() if rank in left},
            seconds=self.seconds,
        )

    def _rates(self, topic: str, place_of: Callable[[int], int]) -> dict[tuple[int, int], float]:
        return pair_rates({rank: Exchanges.read(told) for rank, told in self._meeting.heard(topic).items()}, place_of)

    def announce(self, code: int) -> None:
        """Tells the others how the command ends, and stays until they have heard it."""
        self._meeting.tell("verdict", code)
        ranks, end = set(range(1, self.launch.world_size)), time.monotonic() + _AFTER_ERROR
        there = {rank for rank in ranks if self._meeting.has("does", rank)}
        while time.monotonic() < end and not all(self._meeting.has("heard", rank) for rank in there):
            time.sleep(_POLL)

    # On the others.

    def verdict(self) -> int:
        """Returns how the command ends, as rank 0 tells.

        Raises:
            MiCSError: If it tells nothing.
        """
        with suppress(RuntimeError):  # the store is gone
            while self.seconds < self._limit + _LATE:
                if self._meeting.has("verdict", 0):
                    self._meeting.tell("heard", True)
                    return int(self._meeting.read("verdict", 0))
                time.sleep(_POLL)
        raise MiCSError(f"Rank {self.launch.rank} heard nothing of rank 0 within {self.seconds:.0f} s.")

    @property
    def hangs(self) -> bool:
        """Whether something of it still runs, which ends with the process only."""
        self._thread.join(timeout=1.0)
        return self._thread.is_alive()

    # In the thread.

    def _look(self) -> None:
        meeting = self._connect()

        def does(what: str) -> None:
            meeting.tell("does", what)

        try:
            self._measure(meeting, does)
        except Exception as error:
            words = str(error).strip().splitlines()
            doing = meeting.read("does", self.launch.rank)
            meeting.tell("error", f"{type(error).__name__} while it {doing}: {words[0] if words else ''}")
        else:
            meeting.tell("done", True)

    def _measure(self, meeting: Meeting, does: Callable[[str], None]) -> None:
        does("looks at its machine")
        launch = self.launch
        facts = Facts.collect(launch, self._checkpoints)
        meeting.tell("facts", dataclasses.asdict(facts))

        def meet(where: str) -> None:
            does("waits for other ranks")
            meeting.meet(where)
            does("computes")

        meet("facts")
        if facts.checkpoints is not None:
            does("looks into the folder of checkpoints")
            meeting.tell("sees", _sees(Path(facts.checkpoints.path), meeting, launch.rank))
        does("computes")
        device_type = "cpu" if facts.card is None else "cuda"
        device = communication_device(device_type)
        meeting.tell("compute", compute_rates(meet, device))
        if launch.world_size > 1:
            self._measure_links(meeting, device, does)

    def _measure_links(self, meeting: Meeting, device: torch.device, does: Callable[[str], None]) -> None:
        backend = "gloo" if device.type == "cpu" else "nccl"
        launch, patience = self.launch, timedelta(seconds=self._limit)
        if launch.rank == 0:
            meeting.tell("hosts", [meeting.read("facts", rank)["host"] for rank in range(launch.world_size)])
        hosts = meeting.read("hosts", 0)
        nodes = [[rank for rank, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)]
        if len({len(node) for node in nodes}) > 1:
            return  # that is broken already
        does(f"joins a process group of {backend}")
        store = launch.connect(self._limit)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=patience)
        mine = next(node for node in nodes if launch.rank in node)
        lane = mine.index(launch.rank)
        if len(nodes) > 1:
            others = opponents(tournament(len(nodes)), nodes.index(mine))
            peers = [None if node is None else nodes[node][lane] for node in others]
            meeting.tell("links", dataclasses.asdict(exchange(peers, device, does)))
        if len(mine) > 1 and device.type != "cpu":  # of CPUs it would be memory that is measured
            inside = opponents(tournament(len(mine)), lane)
            peers = [None if other is None else mine[other] for other in inside]
            meeting.tell("inside", dataclasses.asdict(exchange(peers, device, does)))
        does("leaves the process group")
        dist.destroy_process_group()


def _sees(folder: Path, meeting: Meeting, rank: int) -> bool:
    """Returns whether this rank sees a file that rank 0 writes."""
    if rank == 0:
        file = folder / f".mics-doctor-{socket.gethostname()}-{os.getpid()}"
        with suppress(OSError):  # told of the folder already
            file.write_bytes(b"mics")
        meeting.tell("file", str(file))
    file = Path(meeting.read("file", 0))
    found = file.exists()
    meeting.meet("file")
    if rank == 0:
        file.unlink(missing_ok=True)
    return found
