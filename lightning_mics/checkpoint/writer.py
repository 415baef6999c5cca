"""What DCP writes, with size and checksum of each file as it was handed to the file system."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

from lightning_mics.checkpoint.manifest import Facts


class NotingFileSystem(FileSystem):
    """DCP's file system, which notes what was written, by its name in the folder."""

    def __init__(self) -> None:
        self.written: dict[str, Facts] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Opens a file; it counts as written when it was closed without an error."""
        with super().create_stream(path, mode) as raw:
            stream = _Counted(raw)
            yield stream  # type: ignore[misc]
        self.written[Path(path).name] = stream.facts

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Renames a file that was written."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _Counted:
    """A file that is written from its beginning to its end."""

    def __init__(self, raw: Any) -> None:
        self.facts = {"bytes": 0, "crc32": 0}
        self._raw = raw

    def write(self, data: Any) -> int:
        self.facts["crc32"] = zlib.crc32(data, self.facts["crc32"])
        self.facts["bytes"] += memoryview(data).nbytes
        return int(self._raw.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)
