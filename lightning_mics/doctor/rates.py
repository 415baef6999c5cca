"""What ranks compute and links carry, measured by all ranks at the same time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_mics.core.timing import across_ranks

ROUNDS = 3
_WINDOW_SECONDS = 0.4
_SIZE = {"cpu": 512, "cuda": 8192}
_PRODUCTS = {"cpu": 1, "cuda": 4}  # between looks at the clock

_MOST_OPPONENTS = 31
# Exchanges go on until the two best of each pair agree, for loads on ranks and links come and go.
_SWEEPS, _AGREEMENT = (3, 12), 1.15
_EXCHANGE_SECONDS, _ALL_SECONDS = 0.2, 8.0
_SMALLEST, _LARGEST = 2**18, {"cpu": 2**26, "cuda": 2**30}
_GROWTH = (2, 16)

Pairs = list[tuple[int, int]]


# Compute.


def compute_rates(meet: Callable[[str], None], device: torch.device) -> list[float]:
    """Returns the FLOP/s of matrix products in each of some windows of time, which all ranks begin together."""
    size, count = _SIZE[device.type], _PRODUCTS[device.type]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    left, right, out = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))
    synchronize = torch.get_device_module(device.type).synchronize

    def work() -> None:
        for _ in range(count):
            multiply(left, right, out)
        synchronize()

    work()  # loads kernels
    rates = []
    for number in range(ROUNDS):
        meet(f"window {number}")
        begin, done = time.perf_counter(), 0
        while time.perf_counter() - begin < _WINDOW_SECONDS:
            work()
            done += count
        rates.append(2 * size**3 * done / (time.perf_counter() - begin))
    return rates


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """What is timed."""
    torch.mm(left, right, out=out)


# Links.


def tournament(count: int) -> list[Pairs]:
    """Returns rounds in which places meet in pairs, each one at most once a round, and all pairs in the end.

    Of very many places each meets some others only: its neighbours, and others far away.
    """
    even = count + count % 2
    places = list(range(even))
    rounds = []
    for _ in range(even - 1):
        pairs = zip(places[: even // 2], reversed(places[even // 2 :]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < count])
        places.insert(1, places.pop())
    if len(rounds) <= _MOST_OPPONENTS:
        return rounds
    return [rounds[number * len(rounds) // _MOST_OPPONENTS] for number in range(_MOST_OPPONENTS)]


def opponents(rounds: Iterable[Pairs], place: int) -> list[int | None]:
    """Returns whom a place meets in each round; ``None`` where it sits out."""
    met = []
    for pairs in rounds:
        mine = [pair for pair in pairs if place in pair]
        met.append(sum(mine[0]) - place if mine else None)
    return met


@dataclass(frozen=True)
class Exchanges:
    """Messages that a rank exchanged with others, of the same size with all.

    Attributes:
        size: Bytes that each of the two sent.
        times: Of each peer, when each exchange began and ended, in seconds of the machine's clock.
    """

    size: int
    times: dict[int, list[tuple[float, float]]]

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Exchanges:
        """Returns what another rank has told."""
        return cls(told["size"], {int(peer): times for peer, times in told["times"].items()})


def exchange(peers: list[int | None], device: torch.device, tell: Callable[[str], None]) -> Exchanges:
    """Exchanges messages with other ranks, of a size for which the slowest link takes a while.

    Collective over the world.

    Args:
        peers: A rank for each round; ``None`` where this rank sits out. All ranks have the same number.
        device: What messages lie on.
        tell: Told what this rank does.
    """
    longest = min(_EXCHANGE_SECONDS, _ALL_SECONDS / (_SWEEPS[0] * max(1, len(peers))))
    size = _SMALLEST
    list(_sweep(peers, size, device, tell))  # makes connections
    while True:
        sweep = list(_sweep(peers, size, device, tell))
        slowest = across_ranks([max((end - begin for _, begin, end in sweep), default=0.0)], device)[0]
        if slowest >= longest / 2 or size >= _LARGEST[device.type]:
            break
        growth = min(_GROWTH[1], max(_GROWTH[0], int(longest / max(slowest, 1e-6))))
        size = min(size * growth, _LARGEST[device.type])
    times: dict[int, list[tuple[float, float]]] = defaultdict(list)
    start = time.monotonic()
    for number in range(_SWEEPS[1]):
        for peer, begin, end in sweep:
            times[peer].append((begin, end))
        took, disagreement = across_ranks([time.monotonic() - start, _disagreement(times)], device)
        if number + 1 >= _SWEEPS[0] and (disagreement <= _AGREEMENT or took > _ALL_SECONDS):
            break
        sweep = list(_sweep(peers, size, device, tell))
    return Exchanges(size, dict(times))


def _disagreement(times: Mapping[int, list[tuple[float, float]]]) -> float:
    """Returns how many times as long as a peer's shortest exchange its second shortest took, at most."""
    shortest = [sorted(end - begin for begin, end in found)[:2] for found in times.values()]
    return max((found[-1] / found[0] for found in shortest), default=1.0)


def _sweep(
    peers: list[int | None], size: int, device: torch.device, tell: Callable[[str], None]
) -> Iterator[tuple[int, float, float]]:
    """Exchanges a message with each peer in turn; yields when that began and ended."""
    ours, theirs = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    synchronize = torch.get_device_module(device.type).synchronize
    for peer in peers:
        tell("waits for other ranks")
        dist.barrier()
        if peer is None:
            continue
        tell(f"exchanges messages with rank {peer}")
        synchronize()
        begin = time.monotonic()
        both = [dist.P2POp(dist.isend, ours, peer), dist.P2POp(dist.irecv, theirs, peer)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        synchronize()
        yield peer, begin, time.monotonic()


def pair_rates(told: Mapping[int, Exchanges], place_of: Callable[[int], int]) -> dict[tuple[int, int], float]:
    """Returns the bytes a second that each of two places sends to the other, in the best of their exchanges.

    Ranks of a place send at the same time, and it waits for the last of them.

    Args:
        told: What ranks have exchanged.
        place_of: The place of a rank.
    """
    lanes: dict[tuple[int, int], list[list[tuple[float, float]]]] = defaultdict(list)
    size = 0
    for rank, exchanges in told.items():
        size = exchanges.size
        for peer, times in exchanges.times.items():
            lanes[place_of(rank), place_of(peer)].append(times)
    rates: dict[tuple[int, int], float] = {}
    for (mine, other), found in lanes.items():
        spans = [
            max(end for _, end in attempt) - min(begin for begin, _ in attempt) for attempt in zip(*found, strict=True)
        ]
        rate = len(found) * size / max(min(spans), 1e-9)
        pair = min(mine, other), max(mine, other)
        rates[pair] = min(rate, rates.get(pair, rate))
    return rates
