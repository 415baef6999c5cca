"""Whether a file from elsewhere may do what a checkpoint need not do."""

from __future__ import annotations

import os


def is_trusted(weights_only: bool | None) -> bool:
    """Returns whether a user trusts a file: by ``weights_only=False``, or where nobody asked by PyTorch's variable."""
    if weights_only is None:
        forced = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
        return forced.lower() in ("1", "y", "yes", "true")
    return not weights_only
