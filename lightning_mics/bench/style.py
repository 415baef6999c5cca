"""What all figures share: their style and colours, and matplotlib, which is loaded where one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mics.errors import MiCSError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def save(figure: Figure, path: Path) -> Path:
    """Saves a figure as PNG or SVG, without what would differ from one time to the next; returns the path."""
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})
    return path
