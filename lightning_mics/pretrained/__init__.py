"""Pretrained weights, of which each rank reads its own rows."""

from __future__ import annotations

from lightning_mics.pretrained.loading import load_pretrained

__all__ = ["load_pretrained"]
