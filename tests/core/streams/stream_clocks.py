"""Streams and events without a device: vector clocks tell what lies before what.

A clock says for each stream how many of its launches are known to be over. A stream's own clock counts its launches and
takes in, with each wait, what another stream had launched by then. The host has a clock as well: whatever it knows to
be over (after ``item()`` or ``synchronize()``) lies before everything that it launches later. What the host itself does
to host memory are launches of a stream of its own, which nobody has to wait for, as it comes before what is launched
next.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

import accelerate
import lightning
import torch

import lightning_mics

_TOOL = str(Path(__file__).parent)
_PACKAGE = str(Path(lightning_mics.__file__).parent)
_FSDP2 = str(Path(torch.__file__).parent / "distributed" / "fsdp" / "_fully_shard")
_OPTIMIZERS = str(Path(torch.__file__).parent / "optim")
_CLIPPING = str(Path(torch.__file__).parent / "nn" / "utils" / "clip_grad.py")
# Who answers for a wait, with what it calls.
_OWNERS = (_PACKAGE, *(str(Path(module.__file__ or "").parent) for module in (accelerate, lightning)))
# Calls of the dispatch mode and of contexts come through these.
_DYNAMO = str(Path(torch.__file__).parent / "_dynamo")
_BETWEEN = (contextlib.__file__, *(str(Path(torch.__file__).parent / name) for name in ("_compile.py", "_ops.py")))
# Modules whose functions wait for others of the package: their callers are who waits.
_HELPERS = ("_torch.py", "transport.py")

Clock = dict[int, int]


def merge(into: Clock, other: Clock) -> None:
    """Takes what ``other`` knows to be over into a clock."""
    for stream, time in other.items():
        if into.get(stream, 0) < time:
            into[stream] = time


@dataclass(frozen=True)
class Settings:
    """What a run leaves out, and how the device behaves.

    Attributes:
        left_out: Call sites whose waits do nothing (see :class:`Waits`).
        sync_on_current: Whether synchronous collectives run on the current stream, as with NCCL since torch 2.8, or on
            the group's own.
        host_waits: Whether ``item()`` and ``tolist()`` order what the host launches afterwards. They do; without it no
            other missing wait hides behind them.
    """

    left_out: frozenset[str] = frozenset()
    sync_on_current: bool = True
    host_waits: bool = True


class Waits:
    """The waits of a run by call site, and those to leave out.

    A site is the line that waits, or that calls a helper of ``_torch.py`` which does, and the line that called its
    function: ``"core/gradients/unit.py:203 (wait) < core/gradients/window.py:192 (synchronize) Work.wait"``.
    """

    def __init__(self, left_out: frozenset[str]) -> None:
        self.sites: Counter[str] = Counter()
        self._left_out = left_out

    def runs(self, kind: str) -> bool:
        """Notes a wait; returns whether it is not left out."""
        site = f"{_waiter()} {kind}"
        self.sites[site] += 1
        return site not in self._left_out

    @property
    def of_package(self) -> list[str]:
        """The sites inside lightning_mics."""
        return sorted(site for site in self.sites if not site.startswith("torch/"))


def _waiter() -> str:
    """Returns who waits: the line, and the one in the package that called its function."""
    frame = _outside(sys._getframe(1))
    caller = _caller(frame)
    while caller is not None and frame is not None and _is_helper(frame):
        frame, caller = caller, _caller(caller)
    while caller is not None and _is_helper(caller):
        caller = _caller(caller)
    waiters = [found for found in (frame, caller) if found is not None]
    return " < ".join(f"{_short(found.f_code)}:{found.f_lineno} ({found.f_code.co_name})" for found in waiters)


def _is_helper(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).name in _HELPERS


def _caller(frame: FrameType | None) -> FrameType | None:
    """Returns the frame that called one of the package, if it is of the package, too."""
    if frame is None or not _in_package(frame):
        return None
    caller = _outside(frame.f_back)
    return caller if caller is not None and _in_package(caller) else None


def _outside(frame: FrameType | None) -> FrameType | None:
    """Returns the innermost frame that is neither the checker's nor of what calls it."""
    while frame is not None and _is_between(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _in_package(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_PACKAGE)


def _short(code: CodeType) -> str:
    path = Path(code.co_filename)
    if path.is_relative_to(_PACKAGE):
        return str(path.relative_to(_PACKAGE))
    return f"torch/{path.name}" if _is_torch(code.co_filename) else path.name


def _is_torch(name: str) -> bool:
    return name.startswith(str(Path(torch.__file__).parent))


@functools.cache
def _is_between(name: str) -> bool:
    is_users = "windows" in Path(name).name or Path(name).name.startswith("test_")
    return name in _BETWEEN or name.startswith(_DYNAMO) or (name.startswith(_TOOL) and not is_users)


@functools.cache
def _is_interesting(name: str) -> bool:
    is_window = name.startswith(_TOOL) and "windows" in Path(name).name
    return is_window or name.startswith((_PACKAGE, _FSDP2, _OPTIMIZERS, _CLIPPING))


@functools.cache
def _is_test(name: str) -> bool:
    """Returns whether code is a test's, by its file: what called it is of no interest."""
    path = Path(name)
    return str(path.parent) == _TOOL and path.name.startswith("test_")


class Place:
    """Where something was launched: the frames of the package, FSDP2, the optimizer and the window, innermost first."""

    __slots__ = ("_frames",)

    def __init__(self, frames: tuple[tuple[CodeType, int], ...]) -> None:
        self._frames = frames

    @classmethod
    def here(cls, depth: int = 5) -> Place:
        """Returns the place that runs at the moment."""
        frames: list[tuple[CodeType, int]] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and len(frames) < depth and not _is_test(frame.f_code.co_filename):
            if _is_interesting(frame.f_code.co_filename):
                frames.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        return cls(tuple(frames))

    @property
    def innermost(self) -> str:
        """Only the innermost frame."""
        return str(Place(self._frames[:1]))

    def __str__(self) -> str:
        return " < ".join(f"{_short(code)}:{line} ({code.co_name})" for code, line in self._frames) or "the test"


@dataclass(frozen=True)
class HostWait:
    """A wait of the host for the device.

    Attributes:
        kind: What waits, such as ``"item"``.
        frames: The line that waits, and the innermost one of the package or of a front-end where this is another one.
        streams: Names of the streams whose work is waited for.
    """

    kind: str
    frames: tuple[tuple[CodeType, int], ...]
    streams: tuple[str, ...]

    @classmethod
    def here(cls, kind: str, streams: tuple[str, ...]) -> HostWait:
        """Returns a wait by what runs at the moment."""
        frame = inner = _outside(sys._getframe(1))
        while frame is not None and not frame.f_code.co_filename.startswith(_OWNERS):
            frame = _outside(frame.f_back)
        found = [inner] if frame is None or frame is inner else [inner, frame]
        return cls(kind, tuple((one.f_code, one.f_lineno) for one in found if one is not None), streams)

    @property
    def where(self) -> str:
        """The function, the package's or a front-end's if there is one: ``"core/gradients/agreement.py (agree)"``."""
        code, _ = self.frames[-1]
        return f"{_short(code)} ({code.co_name})"

    def __str__(self) -> str:
        return f"{self.kind}: {Place(self.frames)}"


class Timeline:
    """The host and the streams of one run.

    Attributes:
        host: What the host knows to be over when it launches something.
        host_stream: What the host does to its own memory.
        host_waits: The host's waits for the device, while the run is watched.
        is_watched: Whether what runs at the moment counts.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.waits = Waits(settings.left_out)
        self.host: Clock = {}
        self.host_waits: list[HostWait] = []
        self.is_watched = False
        self.streams: list[Stream] = []
        self.compute = Stream(self, "compute")
        self.host_stream = Stream(self, "host")
        self._stack = [self.compute]

    @property
    def current(self) -> Stream:
        """The stream on which operators are launched."""
        return self._stack[-1]

    @contextlib.contextmanager
    def use(self, stream: Stream | None) -> Iterator[None]:
        """Makes a stream the current one."""
        self._stack.append(stream or self.current)
        try:
            yield
        finally:
            self._stack.pop()

    def wait_on_host(self, kind: str, clock: Clock | None = None, *, is_asked_for: bool = False) -> None:
        """Makes the host wait for the device.

        Args:
            kind: What waits.
            clock: What for; by default the current stream.
            is_asked_for: Whether it is there to wait, as ``synchronize()`` is, and not to read a value.
        """
        clock = self.current.clock if clock is None else clock
        if self.is_watched:
            streams = tuple(stream.name for stream in self.streams if stream.id in clock)
            self.host_waits.append(HostWait.here(kind, streams))
        merge(self.host_stream.clock, clock)
        if is_asked_for or self.settings.host_waits:
            merge(self.host, clock)


class Stream:
    """A queue of launches; stands for ``torch.cuda.Stream``."""

    def __init__(self, timeline: Timeline, name: str | None = None) -> None:
        self.id = len(timeline.streams)
        self.name = name or f"stream {self.id}"
        self.clock: Clock = {}
        self._timeline = timeline
        timeline.streams.append(self)

    def __repr__(self) -> str:
        return self.name

    def follow_host(self) -> None:
        """Puts what the host knows to be over before whatever it launches now."""
        merge(self.clock, self._timeline.host)

    def tick(self) -> int:
        """Launches something; returns its number."""
        self.follow_host()
        self.clock[self.id] = time = self.clock.get(self.id, 0) + 1
        return time

    def is_after(self, stream: Stream, time: int) -> bool:
        """Returns whether what is launched here next runs after a launch on another stream.

        What the host did itself lies before whatever it launches next.
        """
        return stream is self._timeline.host_stream or self.clock.get(stream.id, 0) >= time

    def wait_event(self, event: Event) -> None:
        """Waits for what an event marks; one that was never recorded is over, as on CUDA."""
        if self._timeline.waits.runs("wait_event"):
            merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        """Waits for all that was launched on another stream."""
        if self._timeline.waits.runs("wait_stream"):
            other.follow_host()
            merge(self.clock, other.clock)

    def record_event(self, event: Event | None = None) -> Event:
        """Marks what was launched so far."""
        event = event or Event(self._timeline)
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Makes the host wait for all that was launched here."""
        if self._timeline.waits.runs("synchronize"):
            self._timeline.wait_on_host("synchronize", self.clock, is_asked_for=True)

    def query(self) -> bool:
        """Returns whether all is over; nobody can rely on it."""
        return False

    def is_capturing(self) -> bool:
        """Returns that no graph is captured."""
        return False


class Event:
    """A mark in a stream; stands for ``torch.cuda.Event``."""

    def __init__(self, timeline: Timeline) -> None:
        self.clock: Clock = {}
        self._timeline = timeline

    def record(self, stream: Stream | None = None) -> None:
        """Marks what was launched on a stream, the current one by default."""
        stream = stream or self._timeline.current
        stream.follow_host()
        self.clock = dict(stream.clock)

    def wait(self, stream: Stream | None = None) -> None:
        """Makes a stream wait."""
        (stream or self._timeline.current).wait_event(self)

    def synchronize(self) -> None:
        """Makes the host wait."""
        if self._timeline.waits.runs("synchronize"):
            self._timeline.wait_on_host("synchronize", self.clock, is_asked_for=True)

    def query(self) -> bool:
        """Returns whether it is over; nobody can rely on it."""
        return False
