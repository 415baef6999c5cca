"""What libraries log of a checkpoint that is written under a temporary name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_mics.checkpoint.storage import Place


@contextmanager
def final_name_in_logs(temporary: Path, path: Place) -> Iterator[None]:
    """Makes every log line that names the folder ``temporary`` name ``path``, which it is going to be."""
    before, now = str(temporary), str(path)
    make = logging.getLogRecordFactory()

    def make_with_final_name(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if before in (text := record.getMessage()):
            record.msg, record.args = text.replace(before, now), ()
        return record

    logging.setLogRecordFactory(make_with_final_name)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
