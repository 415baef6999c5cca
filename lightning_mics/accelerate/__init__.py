"""The way in for Hugging Face Accelerate: ``from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin``.

Names are imported when first used, so that launch files can be read and written without Accelerate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mics.accelerate.accelerator import MiCSAccelerator
    from lightning_mics.accelerate.plugin import MiCSPlugin

_HOMES = {"MiCSAccelerator": "accelerator", "MiCSPlugin": "plugin"}

__all__ = ["MiCSAccelerator", "MiCSPlugin"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
