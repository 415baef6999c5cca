"""Thin adapters that make Lightning's Trainer and Fabric drive the core."""

from __future__ import annotations
