"""What this package needs of PyTorch's insides: said in one sentence where it is gone."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# The versions that the tests run with; those of pyproject.toml.
SUPPORTED_TORCH = ">=2.11,<2.16"


def gone(name: object) -> ImportError:
    """Returns the error for a name that this PyTorch does not have; ``name`` may be the error of an import."""
    return ImportError(
        f"lightning-mics does not run with torch {torch.__version__}, which lacks a name that it needs ({name}): "
        f"install torch{SUPPORTED_TORCH}."
    )


def require(owner: Any, *names: str) -> None:
    """Checks that a module or class has attributes; a class also those that its methods give its objects.

    Raises:
        ImportError: Naming the first that is gone, the torch that is installed, and the versions that work.
    """
    known = {*dir(owner), *(_names_of_objects(owner) if isinstance(owner, type) else ())}
    for name in names:
        if name not in known:
            home = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
            raise gone(f"{home}.{name}")


def require_in_source(module: str, *names: str) -> None:
    """Checks that the source of one of PyTorch's modules has names, without importing it.

    Raises:
        ImportError: As in :func:`require`.
    """
    path = Path(torch.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    source = path.read_text() if path.is_file() else ""
    for name in names:
        if name not in source:
            raise gone(f"{module}.{name}")


def _names_of_objects(owner: type) -> Iterator[str]:
    for cls in owner.__mro__:
        yield from inspect.get_annotations(cls)
        for value in vars(cls).values():
            method: Any = value.fget if isinstance(value, property) else value
            if inspect.isfunction(method := inspect.unwrap(method)):
                yield from (step.argval for step in dis.get_instructions(method) if step.opname == "STORE_ATTR")
