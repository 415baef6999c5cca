"""YAML that people write: read into values, or an error that says where it is none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from lightning_mics.errors import MiCSConfigError


def read_yaml(path: str | os.PathLike[str], example: str) -> Any:
    """Returns what a YAML file holds; see :func:`parse_yaml`."""
    return parse_yaml(read_text(path, "Give a YAML file."), str(path), example)


def parse_yaml(text: str, where: str, example: str) -> Any:
    """Returns what YAML holds.

    Args:
        text: The YAML.
        where: What errors name: the file or the variable.
        example: How right lines look, for errors.

    Raises:
        MiCSConfigError: If it is not YAML, or a key stands twice in it, of which YAML would drop the first.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        _check_keys(root, where, set())
        return None if root is None else yaml.SafeLoader("").construct_document(root)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError is for dates such as 2020-13-45
        if isinstance(error, MiCSConfigError):
            raise
        raise MiCSConfigError(describe_error(text, where, error, example)) from error


def read_text(path: str | os.PathLike[str], advice: str) -> str:
    """Returns a text file's content.

    Args:
        path: The file.
        advice: What to do where it cannot be read.

    Raises:
        MiCSConfigError: If it cannot.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a ValueError is for a name that cannot be one
        reason = getattr(error, "strerror", None) or (
            "it is not text" if isinstance(error, UnicodeError) else str(error)
        )
        raise MiCSConfigError(f"{path} cannot be read ({reason}). {advice}") from error


def describe_error(text: str, where: str, error: Exception, example: str) -> str:
    """Returns a sentence about text that is not YAML: the line, what is wrong with it, and how it should look."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or (str(error).splitlines() or ["unreadable"])[0]
    lines = text.splitlines()
    if mark is None or len(lines) < 2:
        return f"{where}: this is not YAML ({problem}). It should look like {example}."
    line = f": {lines[mark.line].strip()}" if mark.line < len(lines) else " (the end of the file)"
    return (
        f"{where}, line {mark.line + 1}{line} is not YAML here ({problem}). Change it, or the line above, to the form "
        f"{example}."
    )


def _check_keys(node: yaml.Node | None, where: str, seen: set[int]) -> None:
    if node is None or id(node) in seen:  # an alias may hold itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _check_keys(entry, where, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and name != "<<":
                place = f"line {line}" if line == lines[name] else f"lines {lines[name]} and {line}"
                raise MiCSConfigError(f"{where}: {name!r} is there twice, in {place}. Remove one.", setting=name)
            lines[name] = line
            _check_keys(value, where, seen)
