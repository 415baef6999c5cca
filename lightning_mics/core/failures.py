"""How a job ends in which a rank fails: all ranks within seconds, and the error that began it is what is told last.

A rank that ends with an error leaves it in the world's store. The others lose their connections and fail in turn, or
hang in a collective: they look into the store, tell in one line whom they follow, and end. ``torchrun`` and
``accelerate launch`` print a table last, with the error that a rank wrote into a file for it; where a rank has started
the others itself, it is this rank that ends last.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from lightning_mics.core._torch import default_store
from lightning_mics.core.apart import Watch, announce_end, ended_ranks, left_behind, told_to_all
from lightning_mics.core.places import here
from lightning_mics.errors import MiCSError

_GRACE = 3.0  # seconds that a rank has for ending by itself
_LAST = 10  # seconds that it has for destroying its groups, and for its destructors
_POLL = 1.0
_TICK = 0.2
_KEY = "mics/first_error"
# How backends tell that a peer is gone; most have no class of errors for that.
_PEER_IS_GONE = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|connection was|timed out|timeout|aborted|"
    r"remote process exited|nccl|gloo",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Failure:
    """What ended a rank.

    Attributes:
        rank: The rank.
        error: The error without its traceback.
        report: The error with its traceback.
    """

    rank: int
    error: str
    report: str


class _State:
    """What this process knows of failures: whether it failed itself, and which ranks it has started."""

    failed = False
    children: tuple[subprocess.Popen[Any], ...] = ()
    ending = threading.Event()


def has_failed() -> bool:
    """Returns whether this process ends with an error."""
    return _State.failed


def watch() -> None:
    """Makes this process end as described above, and with a rank that fails. A process group must be there.

    The thread that calls it is the one that trains.
    """
    here.script = threading.get_ident()
    _take_over_hook()
    if dist.is_initialized() and dist.get_world_size() > 1:
        _follow_in_background()


@functools.cache
def _take_over_hook() -> None:
    sys.excepthook = functools.partial(_end_with_error, sys.excepthook, os.getpid())


@functools.cache
def _follow_in_background() -> None:
    threading.Thread(target=_follow, name="mics-failures", daemon=True).start()


def stop_watching() -> None:
    """Ends the watch, before the process group is destroyed; whoever still waits for this rank can say why."""
    _State.ending.set()
    with suppress(Exception):  # the group or its store is going
        if dist.is_initialized() and not _State.failed and default_store() is not None and _store_answers():
            announce_end()


def adopt(children: list[subprocess.Popen[Any]]) -> None:
    """Takes over processes that this one has started as ranks: it ends after them, and with them."""
    _State.children = tuple(children)
    threading.Thread(target=_follow_children, name="mics-children", daemon=True).start()


def _end_with_error(tell: Any, pid: int, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Takes the place of ``sys.excepthook``."""
    if os.getpid() != pid or not issubclass(kind, Exception):
        tell(kind, error, trace)
        return
    _State.failed = True
    report = "".join(traceback.format_exception(kind, error, trace))
    told = "".join(traceback.format_exception_only(error)).strip()
    mine = _Failure(_rank(), told, report)
    follows = _tells_of_a_peer(error)  # also where the watch has ended what this rank waited for
    first = _first_failure(mine, patience=2.0 if follows else 0.0)
    if first == mine:
        write_error_file(report, earlier=1)
        _end_children(0.0)
        tell(kind, error, trace)
        return
    write_error_file(_whom_it_follows(first), earlier=-1)
    if not follows and mine.error != first.error:  # an error of its own
        tell(kind, error, trace)
    _end_behind(first)


def _end_behind(first: _Failure) -> None:
    """Says whom this rank follows; with ranks that it has started, ends last, and repeats the error."""
    _say(_whom_it_follows(first))
    if _State.children:
        _end_children(_GRACE)
        _say(first.report)


def _whom_it_follows(first: _Failure) -> str:
    return f"rank {_rank()} ended after rank {first.rank} had failed: {first.error.splitlines()[0]}"


@contextmanager
def limited_after_error() -> Iterator[None]:
    """Has the kernel end this process if it failed and what is done inside, such as destroying groups, waits."""
    _set_alarm(_LAST)
    yield
    _set_alarm(0)


@atexit.register
def _limit_destructors() -> None:
    """Limits those of communicators, too. Registered first, so that what users do at exit has all its time."""
    _set_alarm(_LAST)


def _set_alarm(seconds: int) -> None:
    if _State.failed and hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)


def _tells_of_a_peer(error: BaseException) -> bool:
    """Returns whether an error, or one that led to it, says that another rank is gone."""
    return not isinstance(error, MiCSError) and any(
        isinstance(link, dist.DistError) or (isinstance(link, RuntimeError) and _PEER_IS_GONE.search(str(link)))
        for link in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:  # "raise error from error" makes a circle
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def explained(error: BaseException) -> BaseException:
    """Returns what to raise for an error of a collective: one that says why, if another rank's place tells."""
    if here.verdict is not None:
        return here.verdict
    if not _tells_of_a_peer(error) or not dist.is_initialized():
        return error
    end = time.monotonic() + 2.0
    with suppress(Exception):  # the group or its store is going
        while default_store() is None or _store_answers():
            if (verdict := told_to_all()) is not None:
                return verdict
            if _look() is not None or default_store() is None or time.monotonic() > end:
                break
            if ended := ended_ranks():
                return left_behind(ended)
            time.sleep(0.1)
    return error


@contextmanager
def explaining() -> Iterator[None]:
    """Raises, for an error of a collective inside, one that says why."""
    try:
        yield
    except RuntimeError as problem:
        error = problem
    else:
        return
    raise explained(error)


def _first_failure(mine: _Failure, patience: float) -> _Failure:
    """Returns the failure that began it all; this rank's own one if nobody has told of an earlier one."""
    end = time.monotonic() + patience
    while (found := _look()) is None and time.monotonic() < end:
        time.sleep(0.1)
    if found is not None:
        return found
    store = default_store()
    if store is None:
        return mine
    with suppress(Exception):  # the store is gone with the rank that had it
        told = json.dumps(asdict(mine))
        return _Failure(**json.loads(store.compare_set(_KEY, "", told)))
    return mine


def _look() -> _Failure | None:
    """Returns what a rank has told before it ended."""
    with suppress(Exception):  # the group or its store is going
        store = default_store()
        if store is not None and store.check([_KEY]):
            return _Failure(**json.loads(store.get(_KEY)))
    return None


def _store_answers() -> bool:
    """Returns whether the store's server is there: where its rank has ended, a look prints pages of C++ frames."""
    with suppress(Exception):  # no server, or no group
        inner: Any = default_store()
        while isinstance(inner, dist.PrefixStore):
            inner = inner.underlying_store
        socket.create_connection((inner.host, inner.port), timeout=_POLL).close()
        return True
    return False


def write_error_file(message: str, *, earlier: int) -> None:
    """Tells torchrun, and with it ``accelerate launch``, which error to print.

    Args:
        message: The error.
        earlier: Seconds. Their agent takes the earliest error for the first, in whole seconds, and within one that of
            the lowest rank.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):  # there is one if the script's main function is @record
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()) - earlier)}
    with suppress(OSError), open(path, "w") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def _follow() -> None:
    """Ends this process some seconds after another rank has failed, also from within a collective that hangs.

    In between it looks whether such a collective can never end.
    """
    watch, looked = Watch(), 0.0
    while not _State.ending.wait(_TICK):
        with suppress(Exception):  # the group or its store is going
            watch.tick()
        if time.monotonic() - looked < _POLL or default_store() is None:
            continue
        looked = time.monotonic()
        first = _look() if _store_answers() else None
        if first is None or first.rank == _rank():
            continue
        if _State.ending.wait(_GRACE) or _State.failed:
            return
        write_error_file(_whom_it_follows(first), earlier=-1)
        _end_behind(first)
        _exit()


def _follow_children() -> None:
    """Ends this process with a child that failed, if neither its error nor a lost connection does."""
    while not _State.ending.wait(_POLL):
        failed = [child for child in _State.children if child.poll()]
        if not failed:
            continue
        if _State.ending.wait(2 * _GRACE) or _State.failed:
            return
        _end_children(0.0)
        codes = ", ".join(f"{child.pid}: {child.returncode}" for child in failed)
        _say(f"rank {_rank()} ended, because ranks that it had started did (process and exit code {codes})")
        _exit()


def _end_children(patience: float) -> None:
    """Waits until the ranks that this process has started are gone, and ends those that stay."""
    end = time.monotonic() + patience
    for child in _State.children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=max(0.0, end - time.monotonic()))
        child.kill()
        child.wait()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def _exit() -> None:
    """Ends this process from a thread, with what it has printed."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(1)


def _say(text: str) -> None:
    print(text, file=sys.__stderr__, flush=True)
