"""The way in for Lightning Fabric: ``from lightning_mics.fabric import MiCSStrategy``."""

from __future__ import annotations

from lightning_mics.lightning.fabric import MiCSStrategy

__all__ = ["MiCSStrategy"]
