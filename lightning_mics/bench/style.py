"""What all figures share: their style and colours, and matplotlib, which is loaded where one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mics.errors import MiCSError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Ours are blues; the others are the colours of Okabe and Ito, which colour-blind people can tell apart, without blue.
OUR_COLOURS = ("#08519c", "#3d8fd1", "#08306b", "#7fb8e6", "#9ecae1")
COLOURS = {
    "full-sharding": "#d55e00",
    "deepspeed-zero3": "#cc79a7",
    "mesh-2d": "#e69f00",
    "mesh-2d-no-sync": "#a67c00",
    "fsdp2-flat": "#009e73",
    "ddp": "#6f6f6f",
}
# Ours are solid, the others dashed above them, so that both show where they meet.
OUR_CURVE: Any = {"ls": "-", "lw": 2.6, "ms": 6, "zorder": 2}
OTHER_CURVE: Any = {"ls": (0, (4, 2)), "lw": 1.5, "ms": 8, "mfc": "none", "mew": 1.5, "zorder": 3}
LEGEND_BELOW: Any = {"loc": "outside lower center", "handlelength": 1.2, "columnspacing": 1.2, "fontsize": 8.5}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning-mics",
}


def require_matplotlib(advice: str) -> None:
    """Raises an error in words if matplotlib is not installed.

    Args:
        advice: What needs it, and how to install it.

    Raises:
        MiCSError: With the advice.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MiCSError(advice) from error


def start(figure: Figure | SubFigure, height: float, title: str, conditions: str) -> Axes:
    """Returns the axes of a figure (its height in inches) below a title and the conditions."""
    axes: Axes = figure.subplots()
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes.set_title(" ", fontsize=9)  # room for the conditions, which begin where the title does
    figure.text(0.01, 1 - 0.33 / height, conditions, va="top", fontsize=9, color="#555555")
    return axes


def save(figure: Figure, path: Path) -> Path:
    """Saves a figure as PNG or SVG, without what would differ from one time to the next; returns the path."""
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})
    return path
