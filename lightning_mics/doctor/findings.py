"""What ranks have told, and who differs from the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_mics.doctor.facts import Facts
from lightning_mics.text import listing

Verdict = Literal["ok", "look at", "broken"]
_SHOWN = 3


@dataclass(frozen=True)
class Check:
    """What was found of one thing.

    Attributes:
        name: The thing.
        verdict: ``"ok"``, ``"look at"``, or ``"broken"`` where a job would fail or be held up by it.
        found: What was found, with ranks, nodes and numbers.
        step: What to do; empty where all is well.
    """

    name: str
    verdict: Verdict
    found: str
    step: str = ""


@dataclass(frozen=True)
class Findings:
    """What all ranks have told.

    Attributes:
        world_size: How many there are.
        facts: What ranks know of themselves.
        compute: Their FLOP/s, in each window of time.
        links: Bytes a second that two nodes send to each other, by their places among ``hosts``.
        inside: Bytes a second that two ranks of a node send to each other.
        sees: Whether a rank sees what rank 0 wrote into the folder of checkpoints.
        errors: By which error ranks ended.
        places: What ranks did that have not ended.
        seconds: How long it took.
    """

    world_size: int
    facts: dict[int, Facts]
    compute: dict[int, list[float]] = field(default_factory=dict)
    links: dict[tuple[int, int], float] = field(default_factory=dict)
    inside: dict[tuple[int, int], float] = field(default_factory=dict)
    sees: dict[int, bool] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    places: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def hosts(self) -> list[str]:
        """The machines, in the order of their first ranks."""
        return list(dict.fromkeys(facts.host for facts in self.facts.values()))

    def node(self, host: str) -> str:
        """Returns a machine's name, short where that is enough."""
        short = [name.partition(".")[0] for name in self.hosts]
        return host if len(set(short)) < len(short) else host.partition(".")[0]

    def named(self, ranks: Iterable[int]) -> str:
        """Returns where ranks are: machines of which all ranks are meant, and others with their machine."""
        chosen, words = set(ranks), []
        for host in self.hosts:
            there = [rank for rank, facts in self.facts.items() if facts.host == host]
            meant = [rank for rank in there if rank in chosen]
            if len(meant) == len(there) > 1 or (meant and len(self.facts) == len(self.hosts)):
                words.append(self.node(host))
            elif meant:
                words.append(f"{ranks_in_words(meant)} on {self.node(host)}")
        unknown = sorted(chosen - self.facts.keys())
        return listing([*words, *([ranks_in_words(unknown)] if unknown else [])])

    def differing(self, values: Mapping[int, str]) -> str:
        """Returns who differs from most ranks, and by what; empty if nobody does."""
        *others, (usual, _) = by_value(values)
        words = [f"{self.named(ranks)}: {value}" for value, ranks in others]
        return "; ".join([*words[:_SHOWN], f"others: {usual}"]) if words else ""


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Returns ranks, for example ``'ranks 0, 1'``."""
    return f"rank{'s' * (len(ranks) > 1)} {listing(ranks)}"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Returns the worst of some verdicts."""
    order: tuple[Verdict, ...] = ("ok", "look at", "broken")
    return max(verdicts, key=order.index, default="ok")


def by_value(values: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """Returns each value with its ranks, the value of most ranks last."""
    ranks = defaultdict(list)
    for rank, value in values.items():
        ranks[value].append(rank)
    return sorted(ranks.items(), key=lambda item: (len(item[1]), -item[1][0]))
