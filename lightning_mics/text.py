"""Numbers with units, as people write them."""

from __future__ import annotations

import re

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def parse_quantity(text: str, unit: str) -> float | None:
    """Returns what a text such as ``"36 GiB"`` means in a base unit, or ``None`` if it means nothing in it.

    Args:
        text: A number, with a unit or without.
        unit: ``"B"``, ``"B/s"`` (bits a second count, too), ``"FLOP/s"``, ``"s"``, or ``""`` for a plain number.
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([a-zA-Zµ/]*)\s*", text)
    if match is None:
        return None
    try:
        number = float(match[1])
    except ValueError:
        return None
    factor = _factor(match[2], unit)
    return None if factor is None else number * factor


def _factor(word: str, unit: str) -> float | None:
    """Returns what one of a unit is in the base unit, for example 1.25e8 for ``Gbit/s`` in ``B/s``."""
    if not word:
        return 1.0
    if unit == "s":
        return _SECONDS.get(word)
    lower = word.lower()
    if unit == "FLOP/s":
        stem = re.fullmatch(r"([kmgtp]?)flops?(?:/s)?", lower)
        return _PREFIXES[stem[1]] if stem else None
    stem = re.fullmatch(r"([kmgt]?i?)(b|bit|bytes?)(/s|ps)?", lower)
    if stem is None or unit not in ("B", "B/s") or (unit == "B" and stem[3]):
        return None
    factor = _BINARY.get(stem[1], _PREFIXES.get(stem[1]))
    if factor is None:
        return None
    # "GB" are bytes; a lower-case b after a prefix means bits.
    is_bits = stem[2] == "bit" or (unit == "B/s" and (stem[2] == "b" and word.rstrip("/sp")[-1:] == "b"))
    return factor / 8 if is_bits else factor
