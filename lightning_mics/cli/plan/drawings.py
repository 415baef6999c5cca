"""Drawings made of letters: the layout of the ranks, and the timeline of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from lightning_mics.plan.simulate import COMPUTE, GATHER, REDUCE, REPLICATE, STREAMS, Event, StepTime
from lightning_mics.topology import GroupLayout

_MOST_LAYOUT_NODES = 4
_HARDLY_BUSY = 0.05
# What a cell of the timeline shows, by stream and phase.
_LETTERS = {
    (COMPUTE, "forward"): "F",
    (COMPUTE, "backward"): "B",
    (COMPUTE, "step"): "O",
    GATHER: "G",
    REDUCE: "R",
    REPLICATE: "A",
}


def layout_lines(layout: GroupLayout, width: int) -> list[str]:
    """Returns the layout as it prints, shortened to a few nodes and to a width."""
    lines = str(layout).splitlines()
    num_nodes = layout.topology.num_nodes
    if num_nodes > _MOST_LAYOUT_NODES:
        nodes = lines[1 : num_nodes + 1]
        lines[1 : num_nodes + 1] = [*nodes[:2], f"  ... ({num_nodes - 3} more nodes)", nodes[-1]]
    return [line if len(line) <= width else line[: line.rindex(" ", 0, width - 3)] + " ..." for line in lines]


def last_microstep(time: StepTime) -> list[Event]:
    """Returns the events of the last microstep and of the optimizer."""
    last = max((event.microstep for event in time.events), default=0)
    return [event for event in time.events if event.microstep == last]


def timeline_lines(events: Sequence[Event], width: int) -> list[str]:
    """Draws events of a part of a step: for each stream a line of its name and letters, at most ``width`` wide."""
    if not events:
        return []
    begin, end = min(event.start for event in events), max(event.end for event in events)
    cells = max(10, width - 11)
    size = (end - begin) / cells
    by_stream = {stream: [event for event in events if event.stream == stream] for stream in STREAMS}
    return [
        f"{stream:<11}{_draw(chosen, begin, size, cells)}".rstrip() for stream, chosen in by_stream.items() if chosen
    ]


def _draw(events: Iterable[Event], begin: float, size: float, cells: int) -> str:
    shares: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(cells)]
    idle = " "
    for event in events:
        idle = "." if event.stream == COMPUTE else " "
        letter = _LETTERS.get(event.stream) or _LETTERS[event.stream, event.phase]
        first, last = (event.start - begin) / size, (event.end - begin) / size
        for cell in range(int(first), min(cells, int(last) + 1)):
            shares[cell][letter] += max(0.0, min(last, cell + 1) - max(first, cell))
    return "".join(_cell(share, idle) for share in shares)


def _cell(share: Mapping[str, float], idle: str) -> str:
    busy = sum(share.values())
    if busy < (_HARDLY_BUSY if idle == "." else 1e-9):
        return idle
    letter = max(share, key=lambda name: share[name])
    return letter if busy >= 0.5 else letter.lower()
