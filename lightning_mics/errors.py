"""The errors a user can meet.

Each message names the setting, the numbers involved, and a value or a step that would work.
"""

from __future__ import annotations


class MiCSError(Exception):
    """Base class of every error that lightning-mics raises on purpose.

    Args:
        message: What is wrong, and what would work.
        setting: The field of :class:`~lightning_mics.MiCSConfig` (or of a front-end's settings) that it is about, so
            that whoever read the value from a file can name the line.

    Attributes:
        setting: See above; ``None`` where the error is about no single setting.
    """

    def __init__(self, message: str = "", *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class MiCSConfigError(MiCSError, ValueError):
    """A setting cannot work on this cluster or with this model."""


class CheckpointError(MiCSError, ValueError):
    """A checkpoint is missing, half-written, corrupt or not ours, or cannot be written.

    Attributes:
        rank: Where it happened, once all ranks have been told.
        is_content: Whether something that was to be saved cannot be written, wherever it is to go.
    """

    rank: int | None = None
    is_content: bool = False


class SelfCheckError(MiCSError, RuntimeError):
    """Training did not do what the configuration asked for."""


class UnsyncedGradientsError(MiCSError, RuntimeError):
    """An optimizer was about to step on gradients that the replicas have not exchanged yet."""
