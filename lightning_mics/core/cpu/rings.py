"""Ring collectives of CPU tensors over gloo, from point-to-point messages.

gloo's own reduce-scatter is an all-reduce that keeps a part, which sends twice the bytes; its all-gather passes through
a copy of the whole message. These rings send ``(size - 1) / size`` of the message from each rank to the next one, the
least a ring can, out of and into the caller's memory.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics.core.failures import explained
from lightning_mics.core.places import THREAD, Call, here, waiting
from lightning_mics.errors import MiCSError

# Users may send messages of their own over the same group.
_GATHER_TAG, _REDUCE_TAG, _EXCHANGE_TAG = 19_781, 19_782, 19_783
# How long the end of a process waits for a collective whose peers may be gone.
_PATIENCE_SECONDS = 2.0


def _nothing(piece: int) -> None:
    pass


# A message counts once it is launched: a rank that waits in a ring of all ranks must not seem to lack a collective of
# the user's that is behind it.


def _receive(tensor: Tensor, peer: int, group: dist.ProcessGroup, tag: int) -> dist.Work:
    work = group.recv([tensor], peer, tag)
    here.launched[id(group)] += 1
    return work


def _send(tensor: Tensor, peer: int, group: dist.ProcessGroup, tag: int) -> dist.Work:
    work = group.send([tensor], peer, tag)
    here.launched[id(group)] += 1
    return work


def ring_all_gather(
    pieces: Sequence[Sequence[Tensor]],
    group: dist.ProcessGroup,
    arrived: Callable[[int], None] = _nothing,
    tag: int = _GATHER_TAG,
) -> None:
    """Fills in what the other ranks of a group contribute.

    Args:
        pieces: Contiguous tensors for each rank of the group, of equal sizes; this rank's own hold their values.
        group: Who takes part.
        arrived: Called for each piece, this rank's own first, while the next one is under way.
        tag: Rings of different tags never meet.
    """
    size, rank = group.size(), group.rank()
    following, preceding = (rank + 1) % size, (rank - 1) % size
    arriving = [(rank - step) % size for step in range(1, size)]
    # A fast neighbour's messages find their places waiting.
    receives = [[_receive(part, preceding, group, tag) for part in pieces[piece]] for piece in arriving]
    sends = [_send(part, following, group, tag) for part in pieces[rank] if size > 1]
    arrived(rank)
    for step, piece in enumerate(arriving):
        for part, receive in zip(pieces[piece], receives[step], strict=True):
            receive.wait()
            if step + 2 < size:
                sends.append(_send(part, following, group, tag))
        arrived(piece)
    for send in sends:
        send.wait()


def ring_reduce_scatter(
    output: Tensor,
    part_of: Callable[[int], Tensor],
    group: dist.ProcessGroup,
    op: object,
    tag: int = _REDUCE_TAG,
) -> None:
    """Sums (or averages) the parts that all ranks of a group hold for this one.

    Args:
        output: Where the result goes; contiguous.
        part_of: Returns what this rank contributes to a rank of the group, in the shape of ``output``; left as it is.
            Called once for each, in the order in which parts are sent, the later ones while another is under way.
        group: Who takes part.
        op: ``SUM`` or ``AVG``.
        tag: Rings of different tags never meet.
    """
    size, rank = group.size(), group.rank()
    following, preceding = (rank + 1) % size, (rank - 1) % size
    if size == 1:
        output.copy_(part_of(0))
        return
    spare = [torch.empty_like(output) for _ in range(min(2, size - 2))]
    outgoing = part_of(preceding).contiguous()
    for step in range(size - 1):
        incoming = output if step == size - 2 else spare[step % 2]
        receive = _receive(incoming, preceding, group, tag)
        send = _send(outgoing, following, group, tag)
        part = part_of((rank - 2 - step) % size)
        receive.wait()
        incoming += part
        send.wait()
        outgoing = incoming
    if op == dist.ReduceOp.AVG:
        output /= size


def exchange(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    """Sends a part to each rank of a group, and receives one from each.

    Args:
        received: Where parts go, of shape ``[size, n]``.
        sent: What goes to each rank, of the same shape; both are contiguous.
        group: Who takes part.
    """
    size, rank = group.size(), group.rank()
    others = [(rank + step) % size for step in range(1, size)]
    works = [_receive(received[peer], peer, group, _EXCHANGE_TAG) for peer in reversed(others)]
    works += [_send(sent[peer], peer, group, _EXCHANGE_TAG) for peer in others]
    received[rank] = sent[rank]
    for work in works:
        work.wait()


_Task = tuple[Callable[[], None], "Future[None]", Call | None]


class ThreadedWork(dist.Work):
    """Handle of a collective that the communication thread runs. FSDP2 only waits on a ``dist.Work``."""

    def __init__(self, future: Future[None]) -> None:
        super().__init__()
        self._future = future

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Waits for the collective, and raises what it raised."""
        if not self._future.done():
            here.turn += 1
            here.waits = THREAD
        try:
            self._future.result(timeout.total_seconds() or None)
        except RuntimeError as problem:
            error = explained(problem)
        else:
            return True
        finally:
            here.waits = None
        raise error

    def is_completed(self) -> bool:
        """Returns whether the collective has ended, well or not."""
        return self._future.done()


class CommunicationThread:
    """Runs collectives one after another, in the order of their submission, beside the thread that computes.

    One order for all groups keeps ranks that belong to several of them from waiting for each other.
    """

    def __init__(self) -> None:
        self._start_afresh()
        os.register_at_fork(after_in_child=self._start_afresh)  # a thread does not survive a fork

    def _start_afresh(self) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._open: deque[Future[None]] = deque()

    def run(self, collective: Callable[[], None], async_op: bool, call: Call | None = None) -> dist.Work | None:
        """Runs a collective behind those submitted before.

        Args:
            collective: The collective.
            async_op: Whether to return at once.
            call: Which one it is, for others that wait.

        Returns:
            A handle with ``async_op``; otherwise ``None``, and the collective is done.
        """
        if not self._open and not async_op:
            self._run_here(collective, call)
            return None
        future: Future[None] = Future()
        self._open.append(future)
        self._tasks.put((collective, future, call))
        if self._thread is None:
            # A daemon: a collective whose peers are gone must not keep the process alive.
            self._thread = threading.Thread(target=self._work, name="mics-communication", daemon=True)
            self._thread.start()
            atexit.register(self._end)
        work = ThreadedWork(future)
        if async_op:
            return work
        work.wait()
        return None

    def _run_here(self, collective: Callable[[], None], call: Call | None) -> None:
        if call is None:
            collective()
            return
        try:
            with waiting(call):
                collective()
        except RuntimeError as problem:
            error = explained(problem)
        else:
            return
        raise error

    def fail(self, error: MiCSError) -> None:
        """Ends with an error what was submitted and is not done."""
        for future in list(self._open):
            with suppress(InvalidStateError):  # it has ended meanwhile
                future.set_exception(error)

    def _end(self) -> None:
        """Ends the thread before Python does, which would abort the process where the thread is in foreign code."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(_PATIENCE_SECONDS)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            collective, future, call = task
            del task
            error = None
            if call is not None:
                call.begun += 1
                here.runs = call
            try:
                with torch.no_grad():
                    if not future.done():
                        collective()
            except BaseException as problem:
                error = problem
            if call is not None:
                here.runs = None
            self._open.popleft()
            with suppress(InvalidStateError):  # somebody has ended it
                future.set_exception(error) if error is not None else future.set_result(None)
            del collective, future, error


communication_thread = CommunicationThread()
# What crosses slow links must not keep partitions waiting. Each thread has an order of its own, the same on all ranks.
replication_thread = CommunicationThread()
here.breakers += [communication_thread.fail, replication_thread.fail]
