"""The stand-in for the module ``torch.cuda``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from stream_clocks import Clock, Event, Stream, Timeline, merge


class StandInDevice:
    """Stands for the module ``torch.cuda``.

    Args:
        timeline: Where its streams run.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def Stream(self, *args: Any, **kwargs: Any) -> Stream:
        """Makes a stream, of any priority."""
        return Stream(self._timeline)

    def Event(self, *args: Any, **kwargs: Any) -> Event:
        """Makes an event."""
        return Event(self._timeline)

    def current_stream(self, device: object = None) -> Stream:
        """Returns the current stream."""
        return self._timeline.current

    def default_stream(self, device: object = None) -> Stream:
        """Returns the stream on which computation starts."""
        return self._timeline.compute

    @property
    def stream(self) -> Callable[[Stream | None], contextlib.AbstractContextManager[None]]:
        """Makes a stream the current one in a context."""
        return self._timeline.use

    def current_device(self) -> int:
        """Returns the device's index."""
        return 0

    def device_count(self) -> int:
        """Returns that there is one."""
        return 1

    def set_device(self, device: object) -> None:
        """Does nothing: there is one."""

    def is_available(self) -> bool:
        """Returns that it is there."""
        return True

    def is_initialized(self) -> bool:
        """Returns that it is ready."""
        return True

    def _lazy_init(self) -> None:
        """Does nothing: it is ready."""

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        """Returns what an activation checkpoint keeps."""
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        """Does nothing: nobody looks at the values."""

    def _sleep(self, cycles: int) -> None:
        """Does nothing: the clocks do not know how long anything takes."""

    def get_device_capability(self, device: object = None) -> tuple[int, int]:
        """Returns that of a card with bfloat16."""
        return 8, 0

    def get_device_name(self, device: object = None) -> str:
        """Returns a name."""
        return "stand-in"

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        """Returns that there is bfloat16."""
        return True

    def is_current_stream_capturing(self) -> bool:
        """Returns that no graph is captured."""
        return False

    def empty_cache(self) -> None:
        """Does nothing."""

    class device(contextlib.nullcontext[None]):
        """Changes nothing: there is one."""

    def synchronize(self, device: object = None) -> None:
        """Makes the host wait for everything."""
        clock: Clock = {}
        for stream in self._timeline.streams:
            merge(clock, stream.clock)
        if self._timeline.waits.runs("synchronize"):
            self._timeline.wait_on_host("synchronize", clock, is_asked_for=True)
