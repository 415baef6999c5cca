"""Draws the pictures of the documentation: ``python docs/images/draw.py`` writes the SVG files beside itself.

Every picture brings its own light card as background, so that it reads the same on light and on dark pages.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

INK, MUTED, CARD, NODE, GRID = "#1f2933", "#5f6c7b", "#fbfbfa", "#eceff3", "#c3cad3"
FAST, SLOW = "#0f766e", "#c2410c"
FAST_FILL, SLOW_FILL = "#99d5cf", "#f8b48a"
SHARDS = ("#8ecae6", "#ffd166", "#b7d99a", "#d9b8e8", "#f4a6a0", "#9fd8cf", "#e6c9a8", "#b8c0f0")


class Picture:
    """An SVG under construction; lengths are in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="Helvetica, Arial, DejaVu Sans, sans-serif"><title>{escape(title)}</title>',
            f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="12" fill="{CARD}" stroke="{GRID}"/>',
        ]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "none",
        line: str = "none",
        *,
        radius: float = 6,
        dashed: bool = False,
        thick: float = 1.5,
    ) -> None:
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
            f'stroke="{line}" stroke-width="{thick:g}"{dash}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 14,
        color: str = INK,
        *,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, color: str, *, both: bool = False) -> None:
        """Draws a straight arrow; every line in these pictures is horizontal, vertical or a plain diagonal."""
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        dx, dy = (x2 - x1) / length, (y2 - y1) / length
        tips = [(x2, y2, dx, dy)] + ([(x1, y1, -dx, -dy)] if both else [])
        start = (x1 + 6 * dx, y1 + 6 * dy) if both else (x1, y1)
        self.parts.append(
            f'<path d="M{start[0]:.1f} {start[1]:.1f} L{x2 - 6 * dx:.1f} {y2 - 6 * dy:.1f}" stroke="{color}" '
            f'stroke-width="2.5" fill="none"/>'
        )
        for x, y, ux, uy in tips:
            left = (x - 10 * ux - 5 * uy, y - 10 * uy + 5 * ux)
            right = (x - 10 * ux + 5 * uy, y - 10 * uy - 5 * ux)
            self.parts.append(
                f'<path d="M{x:.1f} {y:.1f} L{left[0]:.1f} {left[1]:.1f} L{right[0]:.1f} {right[1]:.1f} Z" '
                f'fill="{color}"/>'
            )

    def save(self, name: str) -> None:
        path = Path(__file__).with_name(name)
        path.write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")


def draw_groups() -> None:
    """Partition and replication groups of 8 ranks on 2 nodes, for two shard sizes."""
    picture = Picture(900, 410, "Partition and replication groups of 2 nodes with 4 ranks each")
    for left, shard_size in ((24, 4), (466, 8)):
        picture.text(left + 205, 36, f"shard_size={shard_size}", 17, bold=True)
        words = "2 replicas, each inside a node" if shard_size == 4 else "1 replica over both nodes"
        picture.text(left + 205, 58, words, 14, MUTED)
        for node in (0, 1):
            top = 76 + 140 * node
            picture.box(left, top, 410, 118, NODE, GRID, radius=10)
            picture.text(left + 205, top + 22, f"node {node}", 13, MUTED)
            for local in range(4):
                rank = 4 * node + local
                shard = rank % shard_size
                picture.box(left + 23 + 94 * local, top + 40, 82, 58, SHARDS[shard], INK, thick=1)
                picture.text(left + 64 + 94 * local, top + 64, f"rank {rank}", 13)
                picture.text(left + 64 + 94 * local, top + 86, f"shard {shard}", 14, bold=True)
        if shard_size == 4:
            for node in (0, 1):
                picture.box(left + 12, 108 + 140 * node, 386, 74, "none", FAST, dashed=True, radius=10, thick=2.5)
            for local in range(4):
                picture.arrow(left + 64 + 94 * local, 176, left + 64 + 94 * local, 254, SLOW, both=True)
        else:
            picture.box(left + 12, 108, 386, 214, "none", FAST, dashed=True, radius=10, thick=2.5)
    picture.box(36, 362, 34, 20, "none", FAST, dashed=True, radius=6, thick=2.5)
    picture.text(80, 377, "partition group: holds one whole replica", 14, anchor="start")
    picture.arrow(452, 372, 492, 372, SLOW, both=True)
    picture.text(502, 377, "replication group: same shard, different replicas", 14, anchor="start")
    picture.save("groups.svg")


def _draw_ranks(picture: Picture, left: float, held: list[set[int]]) -> None:
    """Draws 2 nodes with 2 ranks each; ``held`` tells which of the 4 shards each rank has by now."""
    for node in (0, 1):
        picture.box(left, 84 + 150 * node, 256, 104, NODE, GRID, radius=10)
        picture.text(left + 128, 104 + 150 * node, f"node {node}", 13, MUTED)
    for rank, shards in enumerate(held):
        x, y = left + 18 + 124 * (rank % 2), 116 + 150 * (rank // 2)
        picture.box(x, y, 96, 60, "#ffffff", INK, thick=1)
        picture.text(x + 48, y + 21, f"rank {rank}", 13)
        for shard in range(4):
            fill = SHARDS[shard] if shard in shards else "none"
            picture.box(x + 8 + 20 * shard, y + 31, 20, 20, fill, GRID if fill == "none" else INK, radius=0, thick=1)


def draw_gather() -> None:
    """The flat all-gather beside the two stages of the hierarchical one."""
    picture = Picture(900, 440, "A flat all-gather beside a hierarchical one, 2 nodes with 2 ranks each")
    everything = set(range(4))
    lefts = (24, 322, 620)
    titles = ("flat ring", "hierarchical, stage 1", "hierarchical, stage 2")
    subtitles = ("one ring over all 4 ranks", "across nodes, in parallel", "inside each node")
    for left, title, subtitle in zip(lefts, titles, subtitles, strict=True):
        picture.text(left + 128, 36, title, 17, bold=True)
        picture.text(left + 128, 58, subtitle, 14, MUTED)
    _draw_ranks(picture, lefts[0], [everything] * 4)
    _draw_ranks(picture, lefts[1], [{0, 2}, {1, 3}, {0, 2}, {1, 3}])
    _draw_ranks(picture, lefts[2], [everything] * 4)

    first, second, third = lefts
    picture.arrow(first + 115, 146, first + 141, 146, FAST)
    picture.arrow(first + 141, 296, first + 115, 296, FAST)
    picture.arrow(first + 190, 178, first + 190, 264, SLOW)
    picture.arrow(first + 66, 264, first + 66, 178, SLOW)
    for x in (second + 66, second + 190):
        picture.arrow(x, 178, x, 264, SLOW, both=True)
    for y in (146, 296):
        picture.arrow(third + 115, y, third + 141, y, FAST, both=True)
    picture.text(first + 128, 366, "leaves a node: 3/4 of the message", 13, SLOW, bold=True)
    picture.text(second + 128, 366, "leaves a node: 2/4 of the message", 13, SLOW, bold=True)
    picture.text(third + 128, 366, "leaves a node: nothing", 13, FAST, bold=True)

    picture.arrow(110, 405, 146, 405, FAST)
    picture.text(156, 410, "inside a node (fast)", 14, anchor="start")
    picture.arrow(330, 405, 366, 405, SLOW)
    picture.text(376, 410, "between nodes (slow)", 14, anchor="start")
    for shard in range(4):
        picture.box(566 + 20 * shard, 395, 20, 20, SHARDS[shard], INK, radius=0, thick=1)
    picture.text(656, 410, "the 4 shards of the message", 14, anchor="start")
    picture.save("gather.svg")


def draw_window() -> None:
    """Gradient communication of an accumulation window of 4 microsteps under four schemes."""
    picture = Picture(900, 500, "Gradient communication in an accumulation window of 4 microsteps")
    left, step = 210, 128
    for index in range(4):
        x = left + step * index
        picture.text(x + step / 2, 40, f"microstep {index + 1}", 14, bold=True)
        if index:
            picture.parts.append(
                f'<path d="M{x} 52 V424" stroke="{GRID}" stroke-width="1.5" stroke-dasharray="3 4" fill="none"/>'
            )
    picture.text(806, 32, "gradient kept", 14, bold=True)
    picture.text(806, 50, "between microsteps", 14, bold=True)
    rows = (
        ("MiCS, two hops", "lightning-mics", "n n n nA", "1/p of the model", True),
        ("2-D mesh", "all-reduce every time", "nA nA nA nA", "1/p of the model", False),
        ("full sharding", "over the world", "w w w w", "1/N of the model", False),
        ("gradients unsharded", "until the last microstep", "- - - nA", "the whole model", False),
    )
    for row, (name, detail, schedule, kept, ours) in enumerate(rows):
        top = 62 + 92 * row
        if ours:
            picture.box(12, top, 876, 84, "#e3f3f1", "none", radius=8)
        picture.text(24, top + 38, name, 15, bold=ours, anchor="start")
        picture.text(24, top + 58, detail, 13, MUTED, anchor="start")
        picture.text(806, top + 48, kept, 14, bold=ours)
        for index, cell in enumerate(schedule.split()):
            x = left + step * index
            picture.box(x + 8, top + 14, step - 16, 24, "#d5dbe3", radius=4)
            picture.text(x + step / 2, top + 31, "compute", 12, MUTED)
            if "n" in cell:
                picture.box(x + 8, top + 44, 40, 26, FAST_FILL, FAST, radius=4)
                picture.text(x + 28, top + 62, "RS", 13, bold=True)
            if "A" in cell:
                picture.box(x + 54, top + 44, 66, 26, SLOW_FILL, SLOW, radius=4)
                picture.text(x + 87, top + 62, "AR", 13, bold=True)
            if "w" in cell:
                picture.box(x + 8, top + 44, step - 16, 26, SLOW_FILL, SLOW, radius=4)
                picture.text(x + step / 2, top + 62, "RS", 13, bold=True)
    picture.box(24, 450, 40, 24, FAST_FILL, FAST, radius=4)
    picture.text(72, 467, "inside the partition group", 14, anchor="start")
    picture.box(262, 450, 40, 24, SLOW_FILL, SLOW, radius=4)
    picture.text(310, 467, "across the cluster", 14, anchor="start")
    picture.text(470, 467, "RS: reduce-scatter; AR: all-reduce of replicas; not to scale", 13, MUTED, anchor="start")
    picture.save("window.svg")


if __name__ == "__main__":
    draw_groups()
    draw_gather()
    draw_window()
