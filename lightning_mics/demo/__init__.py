"""``mics demo``: MiCS at work on this machine alone."""

from __future__ import annotations
