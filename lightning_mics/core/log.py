"""What the package tells its users: one line each, on rank 0, through ``logging.getLogger("lightning_mics")``."""

from __future__ import annotations

import logging
import os
import sys

import torch.distributed as dist

logger = logging.getLogger("lightning_mics")


class _StandardError(logging.Handler):
    """Writes to whatever standard error is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def inform(message: str) -> None:
    """Logs a message on rank 0. Without a handler of the user's it goes to standard error.

    A level that the user gave the logger holds; left alone, it lets these messages through.
    """
    if _rank() != 0:
        return
    if not logger.hasHandlers():
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("lightning-mics: %(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:  # by default Python's root logger leaves out what is no warning
        logger.setLevel(logging.INFO)
    logger.info(message)


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))
