"""Where this process is: what it does together with other ranks, and what it waits for.

Whoever is about to wait says so here, in two assignments; the watch (``apart``) reads it from its thread, and only
where a wait is long. What users call by themselves, such as a barrier, it finds on the stack.
"""

from __future__ import annotations

import sys
import threading
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from lightning_mics.core._torch import collective_of, launched_by_group
from lightning_mics.errors import MiCSError

_PACKAGE = str(Path(__file__).parents[1])
_FOREIGN = ("site-packages", "dist-packages", f"{Path(threading.__file__).parent}", "<frozen")


class Call:
    """Something that some ranks do together, any number of times.

    Args:
        kind: ``"unit"`` for a unit's collective, ``"window"`` for the end of a window, ``"entry"`` for a call outside
            of a step.
        what: In words, as it goes on after "waits in". Equal on ranks that can meet, like ``number``.
        ranks: Who takes part.
        groups: What carries it, and is broken when it can never end.
        number: Tells apart models whose calls have the same words.

    Attributes:
        begun: How often this rank has begun it.
        tag: What marks its messages.
    """

    def __init__(
        self,
        kind: str,
        what: str,
        ranks: Sequence[int],
        groups: Sequence[dist.ProcessGroup] = (),
        number: int = 0,
    ) -> None:
        self.kind, self.what, self.ranks, self.groups = kind, what, tuple(ranks), tuple(groups)
        self.key = f"{number}/{what}/{self.ranks[0] if kind == 'unit' else ''}"
        self.tag = zlib.crc32(self.key.encode()) >> 1  # a message's tag is a positive number of 32 bits
        self.begun = 0
        of_world().calls.add(self)


class _World:
    """What belongs to one world, and ends with it."""

    def __init__(self) -> None:
        self.calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self.entries: dict[str, Call] = {}
        self.models = 0


class _Here:
    """What is known of this process; the names are short, as they stand where time counts.

    Attributes:
        waits: What the script's thread waits for: a call, ``THREAD`` for the thread of communication, or nothing.
        turn: Changes with each wait.
        runs: What the thread of communication is in.
        windows: How many windows have ended.
        verdict: Why what this rank waits for can never end.
        breakers: Told of a verdict; they end what is waited for in Python.
        launched: How many messages and collectives in each group are ours, of passes and ends of windows.
        script: The thread that trains; launchers such as Ray Train's run the script beside the main one.
    """

    def __init__(self) -> None:
        self.waits: Call | object | None = None
        self.turn = self.windows = 0
        self.runs: Call | None = None
        self.verdict: MiCSError | None = None
        self.breakers: list[Callable[[MiCSError], None]] = []
        self.launched: Counter[int] = Counter()
        self.depth = threading.local()
        self.script = threading.main_thread().ident


THREAD = object()
here = _Here()
_worlds: weakref.WeakKeyDictionary[Any, _World] = weakref.WeakKeyDictionary()


def of_world() -> _World:
    """Returns what belongs to the world of the moment; a new one knows of no verdict."""
    world = dist.group.WORLD
    assert world is not None
    if world not in _worlds:
        here.verdict, here.windows = None, 0
        here.launched.clear()
        _worlds[world] = _World()
    return _worlds[world]


@contextmanager
def waiting(call: Call) -> Iterator[None]:
    """Says that the script's thread is in a call until the context ends."""
    call.begun += 1
    here.turn += 1
    here.waits = call
    try:
        yield
    finally:
        here.waits = None


@dataclass(frozen=True)
class Waiting:
    """One wait, as it travels between ranks.

    Attributes:
        key: The call; ranks that wait for one key can meet.
        turn: The how manieth time.
        ranks: Who must come.
        kind: As :class:`Call` has it; ``"shard"`` for what asks the ranks of a partition for the whole of a shard;
            ``"foreign"`` for other collectives that are not ours.
        what: The call in words.
    """

    key: str
    turn: int
    ranks: tuple[int, ...]
    kind: str
    what: str

    @classmethod
    def of(cls, call: Call) -> Waiting:
        """Returns this rank's wait in a call."""
        return cls(call.key, call.begun, call.ranks, call.kind, call.what)


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        rank: The rank.
        beat: Counts how often it has told; who tells is alive.
        serial: Changes with what it waits for.
        line: The user's line.
        windows: How many windows it has ended.
        main: What its script waits for.
        thread: What its thread of communication waits for.
        on_thread: Whether the script waits for that thread.
        counts: How often it has begun each call, and how many collectives that are not ours in each group.
        has_ended: Whether its process ends.
    """

    rank: int
    beat: int = 0
    serial: str = ""
    line: str = ""
    windows: int = 0
    main: Waiting | None = None
    thread: Waiting | None = None
    on_thread: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    has_ended: bool = False

    @property
    def waits(self) -> Waiting | None:
        """What keeps the script."""
        return self.thread if self.on_thread else self.main

    @classmethod
    def read(cls, told: dict[str, Any]) -> Place:
        """Returns what another rank has told."""
        waits = {name: told[name] and Waiting(**{**told[name], "ranks": tuple(told[name]["ranks"])}) for name in _WAITS}
        return cls(**{**told, **waits})


_WAITS = ("main", "thread")


def look_around(beat: int = 0, has_ended: bool = False) -> Place:
    """Returns where this rank is, from any thread."""
    waits, turn, runs = here.waits, here.turn, here.runs
    world, frame = of_world(), sys._current_frames().get(here.script or 0)
    groups = launched_by_group()
    counts = {call.key: call.begun for call in list(world.calls) if call.begun}
    counts |= {name: number - here.launched[id(group)] for name, (group, number) in groups.items()}
    main = Waiting.of(waits) if isinstance(waits, Call) else None
    if waits is None:
        main = _foreign(frame, counts)
        turn = -1 if main is None else main.turn
    return Place(
        dist.get_rank(),
        beat,
        f"{turn} {main and main.key} {runs and (runs.key, runs.begun)} {waits is THREAD}",
        "" if frame is None else _line(frame),
        here.windows,
        main,
        None if runs is None else Waiting.of(runs),
        waits is THREAD,
        counts,
        has_ended,
    )


def _foreign(frame: FrameType | None, counts: dict[str, int]) -> Waiting | None:
    """Returns the collective that is not ours, and that a stack waits in."""
    while frame is not None:
        found = collective_of(frame)
        if found is not None:
            name, group = found
            ranks = tuple(dist.get_process_group_ranks(group))
            key = group.group_name
            of_shard = name == "full_tensor"
            kind, what = ("shard", name) if of_shard else ("foreign", f"torch.distributed.{name}")
            return Waiting(key, counts.get(key, 0), ranks, kind, what)
        frame = frame.f_back
    return None


def _line(frame: FrameType | None) -> str:
    """Returns the innermost line of a stack that is the user's."""
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_PACKAGE) and not any(mark in path for mark in _FOREIGN):
            return f"{Path(path).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
