"""Where checkpoints lie: a local path, or a URL of object storage with those methods of a path that are needed here.

Object storage has no rename. What is written there is whole because the object that names it, the manifest, is put
last, in one step. URLs stay text until they come here: ``pathlib`` would take ``s3://bucket`` for ``s3:/bucket``.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fsspec.core import url_to_fs
from fsspec.registry import get_filesystem_class

from lightning_mics.checkpoint import ranks
from lightning_mics.checkpoint.manifest import MANIFEST
from lightning_mics.errors import CheckpointError

_PAUSES_SECONDS = (0.2, 0.5, 1.0, 2.0, 4.0)  # between tries
_PATIENCE_SECONDS = 20.0  # after which no other try begins: fsspec's file systems try again by themselves, too
_BLOCK_BYTES, _LARGEST_READ_BYTES = 1 << 22, 1 << 26
_CONNECTIONS = 8
_LOCAL = ("file", "local")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
_SECRET_VARIABLES = re.compile(r"(AWS|AZURE|GOOGLE|GCS|FSSPEC)_.*(KEY|SECRET|TOKEN|PASSWORD|CONNECTION)")
_SHORTEST_SECRET = 6
_NO_SECRETS = {"true", "false", "anon", "default"}

T = TypeVar("T")
Identity = tuple[Any, ...]


class Remote:
    """A checkpoint, or a file of one, in object storage.

    Args:
        url: Anything that fsspec knows.
        options: What its file system takes, such as credentials.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self._protocol, _, rest = url.partition("://")
        self._rest = rest.rstrip("/")
        self._options = dict(options or {})

    @property
    def url(self) -> str:
        """All of it; may hold credentials, which its text does not."""
        return f"{self._protocol}://{self._rest}"

    def __str__(self) -> str:
        return re.sub(r"://[^/@]*:[^/@]*@", "://***@", self.url.partition("?")[0])

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}", self._options)

    @property
    def name(self) -> str:
        """The last part."""
        return self._rest.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> Remote:
        """What it lies in."""
        return Remote(f"{self._protocol}://{self._rest.rpartition('/')[0]}", self._options)

    @property
    def is_of_process(self) -> bool:
        """Whether no other process sees it."""
        return self._protocol.rpartition("::")[2] == "memory"

    @property
    def is_bucket(self) -> bool:
        """Whether it is the root of a storage, which has no name there."""
        return "/" not in self._rest and not (self.is_of_process and self._rest)

    # What it is.

    def exists(self) -> bool:
        """Returns whether there is an object or a folder."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Returns whether there is an object."""
        info = self._info()
        return info is not None and info["type"] == "file"

    def is_dir(self) -> bool:
        """Returns whether there are objects whose names it begins."""
        info = self._info()
        return info is not None and info["type"] == "directory"

    def modified(self) -> float:
        """Returns when the object was written, in seconds since 1970; now if that is not known."""
        return _modified(self._info() or {})

    def _info(self) -> dict[str, Any] | None:
        def info(system: Any, key: str) -> dict[str, Any]:
            system.invalidate_cache()  # others write as well
            return dict(system.info(key))

        try:
            return self._call(info)
        except FileNotFoundError:
            return None

    def tree(self) -> dict[str, int]:
        """Returns the sizes of all objects whose names it begins, by the rest of those names."""
        return {name: info.get("size") or 0 for name, info in self._find().items()}

    def usage(self) -> tuple[int, float]:
        """Returns the size of all objects in it, or of the object, and when one was written last."""
        infos = list(self._find().values()) or [self._info() or {}]
        return sum(info.get("size") or 0 for info in infos), max(map(_modified, infos))

    def newest_change(self) -> float:
        """Returns when something in it was written last, in seconds since 1970; 0 if there is nothing."""
        return max(map(_modified, self._find().values()), default=0.0)

    def _find(self) -> dict[str, dict[str, Any]]:
        def find(system: Any, key: str) -> dict[str, dict[str, Any]]:
            system.invalidate_cache()
            root = key.rstrip("/") + "/"
            found = system.find(key, detail=True)
            return {name[len(root) :]: info for name, info in found.items() if len(name) > len(root)}

        return {name: info for name, info in self._call(find).items() if not name.endswith("/")}

    def iterdir(self) -> Iterator[Remote]:
        """Yields what lies in it."""

        def listed(system: Any, key: str) -> list[str]:
            system.invalidate_cache()
            return list(system.ls(key, detail=False))

        try:
            names = self._call(listed)
        except FileNotFoundError:
            return
        yield from (self / name for entry in names if (name := entry.rstrip("/").rpartition("/")[2]) != self.name)

    # Reading.

    def open(self, mode: str = "rb") -> BinaryIO:
        """Opens the object for reading, part by part.

        Raises:
            FileNotFoundError: If there is none.
        """
        assert mode == "rb"
        info = self._info()
        if info is None or info["type"] != "file":
            raise FileNotFoundError(f"there is no {self}")
        return io.BufferedReader(_Parts(self, info), _BLOCK_BYTES)

    def fetch(self) -> BinaryIO:
        """Returns a nameless local copy of the object, which is one version of it.

        Raises:
            FileNotFoundError: If there is none.
        """
        local = tempfile.TemporaryFile()  # noqa: SIM115
        while True:
            with self.open() as source:
                identity = identity_of(source)
                while block := source.read(_LARGEST_READ_BYTES):
                    local.write(block)
            if _identity(self._info() or {}) == identity:
                local.seek(0)
                return local
            local.seek(0)
            local.truncate()

    def read_bytes(self) -> bytes:
        """Returns the content of the object."""
        return bytes(self._call(lambda system, key: system.cat_file(key)))

    def read_part(self, start: int, end: int) -> bytes:
        """Returns some of the object's bytes."""

        def read(system: Any, key: str) -> bytes:
            part = bytes(system.cat_file(key, start=start, end=end))
            if len(part) != end - start:
                raise ConnectionError(f"{len(part)} of {end - start} bytes came")
            return part

        return self._call(read)

    # Writing.

    def write_bytes(self, content: bytes) -> None:
        """Puts an object, in one step."""
        self._put(lambda system, key: system.pipe_file(key, content))

    def upload(self, file: Path) -> None:
        """Puts a local file as an object, which is there when all of it is."""
        if self.is_of_process:  # fsspec would show what is there so far
            self.write_bytes(file.read_bytes())
            return
        self._put(lambda system, key: system.put_file(str(file), key))

    def _put(self, action: Callable[[Any, str], object]) -> None:
        try:
            self._call(action)
        except FileNotFoundError as error:
            raise CheckpointError(f"{error}: there is no such bucket. Create it, or check the URL.") from None

    def upload_all(self, local: Path) -> None:
        """Puts a local file, or each file of a folder."""
        if local.is_file():
            self.upload(local)
            return
        for file in sorted(file for file in local.rglob("*") if file.is_file()):
            (self / file.relative_to(local).as_posix()).upload(file)

    def unlink(self) -> None:
        """Deletes the object; nothing if there is none."""
        try:
            self._call(lambda system, key: system.rm_file(key))
        except FileNotFoundError:
            return

    # One way to the file system.

    def _call(self, action: Callable[[Any, str], T]) -> T:
        """Runs ``action``, several times where that may help.

        Raises:
            FileNotFoundError: If there is no such object.
            CheckpointError: If it fails for another reason; says what to do, and no credentials.
        """
        begin = time.monotonic()
        for pause in (*_PAUSES_SECONDS, None):
            try:
                system, key = url_to_fs(self.url, **self._options)
                return action(system, key)
            except FileNotFoundError as error:
                raise FileNotFoundError(self._without_secrets(f"{error} ({self})")) from None
            except Exception as error:
                if pause is None or not _may_pass(error) or time.monotonic() - begin > _PATIENCE_SECONDS:
                    raise self._explained(error) from None
                time.sleep(pause)
        raise AssertionError

    def _explained(self, error: Exception) -> CheckpointError:
        said = self._without_secrets(f"{type(error).__name__}: {' '.join(str(error).split()) or 'no more is known'}")
        return CheckpointError(f"{self} cannot be reached ({said}). {self._advice(error)}")

    def _advice(self, error: Exception) -> str:
        if isinstance(error, ImportError):
            return "Install what speaks to it: pip install 'lightning-mics[remote]'."
        if isinstance(error, PermissionError) or "redential" in type(error).__name__ + str(error):
            return (
                "Check the credentials (storage_options=, or the variables and files that the storage's own tools "
                "use) and their rights to list, read, write and delete there."
            )
        if isinstance(error, ValueError | TypeError):
            return "Check the URL and storage_options=."
        return (
            "It was tried several times. Check the network, the endpoint in storage_options= and whether the storage "
            "is up."
        )

    def _without_secrets(self, text: str) -> str:
        variables = (value for name, value in os.environ.items() if _SECRET_VARIABLES.search(name))
        for secret in sorted({*_texts(self._options), *variables, *self._credentials()}, key=len, reverse=True):
            if len(secret) >= _SHORTEST_SECRET and secret.lower() not in _NO_SECRETS and "://" not in secret:
                text = text.replace(secret, "***")
        return text

    def _credentials(self) -> list[str]:
        """Returns what a URL itself holds of them."""
        login, at, _ = self._rest.partition("@")
        return [*(login.split(":")[1:] if at else []), self._rest.partition("?")[2]]


Place = Path | Remote


class _Parts(io.RawIOBase):
    """An object that is read part by part."""

    def __init__(self, remote: Remote, info: Mapping[str, Any]) -> None:
        self.size = int(info["size"])
        self.identity = _identity(info)
        self._remote, self._position = remote, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + min(len(buffer), _LARGEST_READ_BYTES), self.size)
        if end <= self._position:
            return 0
        part = self._remote.read_part(self._position, end)
        buffer[: len(part)] = part
        self._position = end
        return len(part)


def place(path: str | os.PathLike[str] | Remote, options: Mapping[str, Any] | None = None) -> Place:
    """Returns where a checkpoint lies: a :class:`Path`, with ``~`` expanded, or a :class:`Remote`.

    Args:
        path: A local path or any URL of fsspec. A checkpoint may be named by its manifest, too.
        options: What the URL's file system takes.
    """
    if isinstance(path, Remote):
        return path
    text = os.fsdecode(path)
    if not isinstance(path, str):
        text = _with_both_slashes(text)
    protocol, is_url, rest = text.partition("://")
    if is_url and protocol not in _LOCAL:
        found = Remote(text, options)
        return found.parent if found.name == MANIFEST else found
    return Path(rest if is_url else text).expanduser()


def _with_both_slashes(text: str) -> str:
    """Mends a URL that went through ``pathlib``."""
    protocol, colon, rest = text.partition(":/")
    if not colon or rest.startswith("/") or not re.fullmatch(r"[a-z][a-z0-9+]+", protocol):
        return text
    try:
        get_filesystem_class(protocol)
    except ValueError:
        return text
    except ImportError:
        pass
    return f"{protocol}://{rest}"


def local_place(path: str | os.PathLike[str], writer: str) -> Path:
    """Returns where a local path leads.

    Args:
        path: The path.
        writer: What writes there, and takes no URL.

    Raises:
        CheckpointError: If it is a URL.
    """
    found = place(path)
    if isinstance(found, Path):
        return found
    raise CheckpointError(
        f"{found} is a URL, and {writer} writes to file systems only. Give a local path, and copy it."
    )


def staging() -> Path:
    """Returns what stands on this machine's disk for what is to be put elsewhere."""
    return Path(tempfile.gettempdir()) / "checkpoint"


def check_shared(path: Place) -> None:
    """Checks that all ranks can see what lies at ``path``.

    Raises:
        CheckpointError: If it is in the memory of a process, and there are several.
    """
    if isinstance(path, Remote) and path.is_of_process and ranks.world_size() > 1:
        raise CheckpointError(
            f"{path} lies in the memory of one process, and there are {ranks.world_size()} ranks, which cannot see it. "
            "Use a folder, or object storage such as s3://."
        )


def each(action: Callable[[T], None], items: list[T]) -> None:
    """Runs ``action`` on all items, several at a time; raises the first error."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(action, items))


def identity_of(handle: BinaryIO) -> Identity:
    """Returns what tells an open file from others, and from itself after a change."""
    if isinstance(parts := getattr(handle, "raw", None), _Parts):
        return parts.identity
    state = os.fstat(handle.fileno())
    return state.st_ino, state.st_size, state.st_mtime_ns


def size_of(handle: BinaryIO) -> int:
    """Returns the size of an open file, in bytes."""
    parts = getattr(handle, "raw", None)
    return parts.size if isinstance(parts, _Parts) else os.fstat(handle.fileno()).st_size


def _identity(info: Mapping[str, Any]) -> Identity:
    tag = next((info[name] for name in ("ETag", "etag", "md5Hash", "ino") if info.get(name)), None)
    return tag and str(tag), info.get("size"), next((str(info[name]) for name in _TIMES if name in info), None)


def _modified(info: Mapping[str, Any]) -> float:
    value = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            value = None
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if isinstance(value, int | float) else time.time()


def _may_pass(error: Exception) -> bool:
    """Returns whether it may help to try again."""
    lasting = (ImportError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
    lasting += (ValueError, TypeError, NotImplementedError, AssertionError, AttributeError)  # type: ignore[assignment]
    return not isinstance(error, lasting) and "redential" not in type(error).__name__


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, str):
        yield value
