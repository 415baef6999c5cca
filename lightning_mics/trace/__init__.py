"""From a model to its profile: a pass on fake tensors that counts memory and operations and needs neither.

The model is copied without its values, sharded over one rank, and run forward and backward under PyTorch's own
trackers. Of layers that repeat, only three run; the others get the figures of the second.
"""

from __future__ import annotations

from lightning_mics.trace.leaks import LeakedTensorsError
from lightning_mics.trace.profile import profile_model
from lightning_mics.trace.steps import Sample

__all__ = ["LeakedTensorsError", "Sample", "profile_model"]
