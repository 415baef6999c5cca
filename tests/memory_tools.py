"""What tests of memory share: the bytes that are there at the peak of a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def most_allocated(run: Callable[[], object]) -> int:
    """Returns the most bytes on the CPU at a time that a run allocates, from those that it begins with."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    sizes: dict[int, int] = {}  # by address: what another thread frees is not on record, and its place is taken again
    most = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        sizes[event["args"]["Addr"]] = max(0, event["args"]["Bytes"])
        most = max(most, sum(sizes.values()))
    return most
