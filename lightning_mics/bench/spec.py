"""What an emulated cluster looks like, and the rates of its links as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_mics.errors import MiCSConfigError

_UNITS = {"": 1, "bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_RATES = (10**3, 10**11)
_MTUS = (576, 65535)
_MAX_NODES = 32


def parse_rate(text: str) -> int | None:
    """Reads the rate of a link.

    Args:
        text: Such as ``100mbit``, ``2.5gbit``, a plain number of bits per second, or ``none``.

    Returns:
        Bits per second, or None for a link without a limit.

    Raises:
        MiCSConfigError: If it is none of these.
    """
    words = text.strip().lower()
    if words == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", words)
    if found is None or found[2] not in _UNITS:
        raise MiCSConfigError(
            f"The rate {text!r} is not a number of bits per second. Write it with kbit, mbit or gbit (100mbit), as a "
            "plain number of bits per second (100000000), or none for no limit."
        )
    rate = round(float(found[1]) * _UNITS[found[2]])
    _check_rate(rate)
    return rate


def format_rate(rate: float | None) -> str:
    """Writes a rate for people, such as ``100 Mbit/s``; None is a link without a limit."""
    if rate is None:
        return "unlimited"
    for unit, size in (("Gbit/s", 10**9), ("Mbit/s", 10**6), ("kbit/s", 10**3)):
        if rate >= size:
            return f"{rate / size:.4g} {unit}"
    return f"{rate:.4g} bit/s"


def _check_rate(rate: int) -> None:
    if not _RATES[0] <= rate <= _RATES[1]:
        low, high = map(format_rate, _RATES)
        raise MiCSConfigError(
            f"A rate of {format_rate(rate)} must be from {low} to {high}. Try 100mbit, or none for no limit."
        )


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What an emulated cluster looks like.

    Attributes:
        num_nodes: Number of nodes.
        node_size: Ranks a node.
        rate: Bits per second of each node's link, in either direction; None for no limit.
        mtu: Largest packet of the links, in bytes.
        storage_rate: Bits per second of the link of a storage server, which nodes reach by links of their own; None for
            a cluster without one.
    """

    num_nodes: int
    node_size: int
    rate: int | None
    mtu: int = 9000
    storage_rate: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= _MAX_NODES:
            raise MiCSConfigError(f"num_nodes={self.num_nodes} must be from 1 to {_MAX_NODES}. Try num_nodes=2.")
        if self.node_size < 1:
            raise MiCSConfigError(f"node_size={self.node_size} must be at least 1. Try node_size=2.")
        for rate in (self.rate, self.storage_rate):
            if rate is not None:
                _check_rate(rate)
        if not _MTUS[0] <= self.mtu <= _MTUS[1]:
            raise MiCSConfigError(f"mtu={self.mtu} must be from {_MTUS[0]} to {_MTUS[1]} bytes. Try mtu=9000.")

    @property
    def world_size(self) -> int:
        """Ranks of all nodes together."""
        return self.num_nodes * self.node_size
