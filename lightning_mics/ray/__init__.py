"""The way in for Ray Train: ``TorchTrainer`` with a bare loop, Lightning, Accelerate or transformers.

What Ray has for Lightning and transformers is in :mod:`lightning_mics.ray.lightning` and
:mod:`lightning_mics.ray.transformers`, under the same names as there.
"""

from __future__ import annotations

from lightning_mics.ray.storage import last_checkpoint, path_of, report, run_path

__all__ = ["last_checkpoint", "path_of", "report", "run_path"]
