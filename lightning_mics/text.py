"""Words and numbers as people write and read them: quantities, sizes, listings, and the nearest known name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence

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


def int_or_word(text: str) -> int | str:
    """Returns the whole number that a text is, else the text: what a setting such as a shard size may be."""
    return int(text) if text.lstrip("-").isdigit() else text


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


def format_bytes(count: float) -> str:
    """Returns a byte count as people read it, for example ``'1.5 MiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_number(value: float) -> str:
    """Returns a number with about three digits and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if value == int(value) and "." in text else text


def listing(values: Sequence[object]) -> str:
    """Returns values separated by commas; of many, the first eight and the last four."""
    if len(values) > 16:
        return ", ".join(map(str, values[:8])) + ", ..., " + ", ".join(map(str, values[-4:]))
    return ", ".join(map(str, values))


def first_of(values: Sequence[object], most: int) -> str:
    """Returns the first values separated by commas, and how many more there are, for example ``"1, 2 and 3 more"``."""
    more = len(values) - most
    return ", ".join(map(str, values[:most])) + (f" and {more} more" if more > 0 else "")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known word that looks most like another one; ``None`` if none does.

    Args:
        word: What was written.
        known: What could be meant.
        cutoff: How alike they must be, from 0 to 1, as :func:`difflib.get_close_matches` measures it.
    """
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(
    word: str,
    known: Iterable[str],
    otherwise: str = "",
    *,
    cutoff: float = 0.6,
    show: Callable[[str], str] = repr,
) -> str:
    """Returns the question for the known word that looks most like another one, for example ``"Did you mean 'a'?"``.

    Args:
        word: What was written.
        known: What could be meant.
        otherwise: What to say where nothing looks like it.
        cutoff: See :func:`nearest`.
        show: How to write the word that may be meant.
    """
    near = nearest(word, known, cutoff)
    return otherwise if near is None else f"Did you mean {show(near)}?"
