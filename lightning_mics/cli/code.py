"""Lines of Python for the screen, and files that are not overwritten by accident."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mics.errors import MiCSConfigError


class Code(str):
    """A Python expression; printed as it is, not as a string."""

    __slots__ = ()


def call(function: str, arguments: Mapping[str, Any]) -> Code:
    """Returns a call on one line; an argument without a name is positional."""
    return Code(f"{function}({', '.join(_sources(arguments))})")


def layout_call(function: str, arguments: Mapping[str, Any], width: int = 76) -> Code:
    """Returns a call on one line if it fits, else with an argument a line."""
    line = call(function, arguments)
    if len(line) <= width:
        return line
    lines = textwrap.indent("".join(f"{source},\n" for source in _sources(arguments)), "    ")
    return Code(f"{function}(\n{lines})")


def _sources(arguments: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_literal(value)}" if name else _literal(value) for name, value in arguments.items()]


def _literal(value: Any) -> str:
    if isinstance(value, str) and not isinstance(value, Code):
        return json.dumps(value, ensure_ascii=False)
    return str(value) if isinstance(value, Code) else repr(value)


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """Writes a file that must not exist yet, unless told otherwise.

    Raises:
        MiCSConfigError: If it exists, or cannot be written.
    """
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise MiCSConfigError(f"{path} exists. Choose another --output, or replace it with --force.") from error
    except OSError as error:
        raise MiCSConfigError(f"{path} cannot be written ({error.strerror}). Choose another --output.") from error
