"""MiCS for PyTorch Lightning and plain PyTorch: shard within a partition group, replicate across groups.

Names are imported when first used, so that a user of one front-end does not pay for another.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from lightning_mics import _moved

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": "errors",
    "ClusterTopology": "topology",
    "CommLedger": "metrics",
    "GroupLayout": "topology",
    "Hop": "metrics",
    "JoinedLoader": "core.joined",
    "MiCSConfig": "config",
    "MiCSConfigError": "errors",
    "MiCSError": "errors",
    "MiCSMonitor": "lightning.monitor",
    "MiCSStrategy": "lightning.trainer",
    "SelfCheckError": "errors",
    "Traffic": "metrics",
    "UnsyncedGradientsError": "errors",
    "broadcast_buffers": "core.buffers",
    "clip_grad_norm_": "core.clipping",
    "communication_ledger": "core.runtime",
    "consolidate": "checkpoint",
    "defer_replication_sync": "core.accumulation",
    "exchanged_weights": "core.copies",
    "has_data": "core.joined",
    "load_checkpoint": "checkpoint",
    "load_pretrained": "pretrained",
    "mics_shard": "sharding",
    "register_forward_method": "core.runtime",
    "save_checkpoint": "checkpoint",
    "sync_gradients": "core.accumulation",
    "unequal_passes": "core.unequal",
    "wait_for_checkpoints": "checkpoint",
}

__all__ = sorted([*_HOMES, "__version__"])

if TYPE_CHECKING:
    from lightning_mics.checkpoint import consolidate, load_checkpoint, save_checkpoint, wait_for_checkpoints
    from lightning_mics.config import MiCSConfig
    from lightning_mics.core.accumulation import defer_replication_sync, sync_gradients
    from lightning_mics.core.buffers import broadcast_buffers
    from lightning_mics.core.clipping import clip_grad_norm_
    from lightning_mics.core.copies import exchanged_weights
    from lightning_mics.core.joined import JoinedLoader, has_data
    from lightning_mics.core.runtime import communication_ledger, register_forward_method
    from lightning_mics.core.unequal import unequal_passes
    from lightning_mics.errors import (
        CheckpointError,
        MiCSConfigError,
        MiCSError,
        SelfCheckError,
        UnsyncedGradientsError,
    )
    from lightning_mics.lightning.monitor import MiCSMonitor
    from lightning_mics.lightning.trainer import MiCSStrategy
    from lightning_mics.metrics import CommLedger, Hop, Traffic
    from lightning_mics.pretrained import load_pretrained
    from lightning_mics.sharding import mics_shard
    from lightning_mics.topology import ClusterTopology, GroupLayout


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def _register_strategies() -> None:
    """Makes ``strategy="mics"`` known to the parts of Lightning that are loaded; loads none itself."""
    for part, adapter in (("lightning.pytorch", "trainer"), ("lightning.fabric", "fabric")):
        if part in sys.modules:
            importlib.import_module(f"{__name__}.lightning.{adapter}")


_moved.install()
_register_strategies()
