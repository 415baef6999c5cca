"""Object storage over a local folder, which all ranks see: objects are put whole, and there is no rename."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec import AbstractFileSystem


class Objects(AbstractFileSystem):
    """Takes ``root``, the folder. ``before`` is called with the name of each operation and the key."""

    protocol = "objects"
    cachable = False
    before: Callable[[str, str], None] = staticmethod(lambda operation, key: None)

    def __init__(self, root: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root or os.environ["OBJECTS_ROOT"])

    def _file(self, operation: str, key: str) -> Path:
        key = self._strip_protocol(key)
        type(self).before(operation, key)
        return self.root / quote(key, safe="")

    def _entry(self, file: Path) -> dict[str, Any]:
        state = file.stat()
        return {"name": unquote(file.name), "size": state.st_size, "type": "file", "mtime": state.st_mtime}

    def _keys(self, folder: str) -> dict[str, dict[str, Any]]:
        found = {}
        for file in self.root.iterdir():
            key = unquote(file.name)
            if not file.name.startswith(".put") and key.startswith(f"{folder}/"):
                with suppress(FileNotFoundError):
                    found[key] = self._entry(file)
        return found

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        file = self._file("info", path)
        if file.exists():
            return self._entry(file)
        key = self._strip_protocol(path)
        if self._keys(key):
            return {"name": key, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def find(
        self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **options: Any
    ) -> Any:
        self._file("find", path)
        found = self._keys(self._strip_protocol(path))
        return found if detail else sorted(found)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._file("ls", path)
        folder = self._strip_protocol(path)
        entries: dict[str, dict[str, Any]] = {}
        for key, entry in self._keys(folder).items():
            first, _, rest = key.removeprefix(f"{folder}/").partition("/")
            name = f"{folder}/{first}"
            entries[name] = {"name": name, "size": 0, "type": "directory"} if rest else entry
        if not entries:
            raise FileNotFoundError(path)
        return list(entries.values()) if detail else sorted(entries)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        with self._file("cat", path).open("rb") as file:
            file.seek(start or 0)
            return file.read(-1 if end is None else end - (start or 0))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._put("pipe", path, lambda part: part.write_bytes(value))

    def put_file(self, lpath: str, rpath: str, *args: Any, **options: Any) -> None:
        self._put("put", rpath, lambda part: shutil.copyfile(lpath, part))

    def _put(self, operation: str, path: str, write: Callable[[Path], object]) -> None:
        file = self._file(operation, path)
        part = self.root / f".put-{uuid.uuid4().hex}"
        write(part)
        os.replace(part, file)

    def rm_file(self, path: str) -> None:
        self._file("rm", path).unlink()

    def modified(self, path: str) -> float:
        return float(self._entry(self._file("info", path))["mtime"])

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return self._file("open", path).open(mode)


fsspec.register_implementation("objects", Objects, clobber=True)


def keys(root: Path) -> list[str]:
    """Returns the names of all objects, without the bucket and with one name for what each save chose."""
    named = sorted(unquote(file.name).removeprefix("bucket/") for file in root.iterdir())
    return [re_generation(name) for name in named]


def re_generation(name: str) -> str:
    return "/".join("mics-*" if part.startswith("mics-") else part for part in name.split("/"))
