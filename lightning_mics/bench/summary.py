"""What the records of a results file say together: medians of each contender in each case, and their ratios.

Step times are medians over all measured steps of all rounds. Contenders of different cases belong together (in scaling
tables and curves) if they share name and label, so a label must not depend on the number of nodes.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TypeVar

from lightning_mics.bench.records import Case, Contender, Record
from lightning_mics.metrics import Hop

REFERENCE = "full-sharding"
OURS = "mics"
_TIMED = (Hop.PARTITION_GATHER, Hop.PARTITION_REDUCE, Hop.REPLICATION_REDUCE)  # the last with what follows its step
HOPS = ("compute", *(hop.value for hop in _TIMED), "other")

_Item = TypeVar("_Item")
_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Returns the spread of at least one value."""
        lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
        return cls(lower, middle, upper)


@dataclass(frozen=True)
class Summary:
    """All rounds of one contender in one case.

    Attributes:
        case: The conditions.
        contender: What was measured.
        rounds: Number of rounds that were measured.
        step_seconds: Seconds of an optimizer step.
        samples: Samples of an optimizer step, from all ranks.
        sent_bytes: Median over nodes and rounds of the bytes that left a node in an optimizer step.
        minimum_bytes: Least bytes that have to leave a node in an optimizer step.
        ledger_bytes: Bytes that left a node by our ledger, where there is one.
        hop_seconds: Exposed seconds of an optimizer step by hop.
        hop_calls: Collectives of an optimizer step by hop, where there is a ledger.
        gradient_bytes: Most bytes of gradients that a rank held.
        state_bytes: Most bytes of parameters and optimizer states that a rank held; 0 if they were not counted.
        process_bytes: Most that a process grew by.
        losses: Losses of the first round.
        loss_difference: Largest relative difference from the losses of the case's first contender.
    """

    case: Case
    contender: Contender
    rounds: int
    step_seconds: Spread
    samples: int
    sent_bytes: float | None
    minimum_bytes: float
    ledger_bytes: float | None
    hop_seconds: dict[str, float]
    hop_calls: dict[str, float]
    gradient_bytes: float
    state_bytes: float
    process_bytes: float
    losses: list[float]
    loss_difference: float | None

    @property
    def throughput(self) -> float:
        """Samples a second."""
        return self.samples / self.step_seconds.median

    @property
    def of_minimum(self) -> float | None:
        """Bytes sent per byte that had to be."""
        return ratio(self.sent_bytes, self.minimum_bytes)

    @property
    def of_ledger(self) -> float | None:
        """Bytes sent per byte in the ledger."""
        return ratio(self.sent_bytes, self.ledger_bytes)

    @property
    def floor_seconds(self) -> float | None:
        """Seconds that a node's link needs for the least bytes, however well they overlap with compute."""
        return None if self.case.rate is None else self.minimum_bytes * 8 / self.case.rate

    @property
    def model_bytes(self) -> float | None:
        """Most bytes of parameters, gradients and optimizer states that a rank held, where they were counted."""
        return self.state_bytes + self.gradient_bytes if self.state_bytes else None

    @property
    def competes(self) -> bool:
        """Whether it keeps to the case's limit of memory, as far as that is known."""
        return self.case.memory is None or (self.model_bytes or 0) <= self.case.memory

    @property
    def is_ours(self) -> bool:
        """Whether it is this package."""
        return self.contender.name == OURS


@dataclass(frozen=True)
class Failure:
    """Rounds of a contender that were not measured, for one reason."""

    case: Case
    contender: Contender
    status: str
    reason: str
    rounds: int


def ratio(value: float | None, base: float | None) -> float | None:
    """Returns a share; ``None`` where there is nothing to share."""
    return None if value is None or not base else value / base


def summarise(records: Iterable[Record]) -> list[Summary]:
    """Returns a summary of each contender in each case, experiment by experiment.

    Of several measurements of the same round the last one counts. Contenders without a measured round have no summary;
    :func:`failures` returns those.
    """
    records = latest(records)
    experiments = list(dict.fromkeys(record.case.experiment for record in records))
    series = list(dict.fromkeys(_series(record.contender) for record in records))
    groups = grouped(filter(_is_measured, records), lambda record: (record.case, record.contender))
    order = sorted(
        groups,
        key=lambda pair: (experiments.index(pair[0].experiment), _case_order(pair[0]), series.index(_series(pair[1]))),
    )
    losses: dict[Case, list[float]] = {}
    for case, contender in order:
        losses.setdefault(case, groups[case, contender][0].losses)
    return [_summary(groups[pair], losses[pair[0]]) for pair in order]


def failures(records: Iterable[Record]) -> list[Failure]:
    """Returns what failed or was skipped and did not succeed later."""
    records = latest(records)
    # A package that was installed in between changes the stack, not who it is.
    measured = {(record.case, _series(record.contender)) for record in records if _is_measured(record)}
    counts = Counter(
        (record.case, record.contender, *_problem(record))
        for record in records
        if not _is_measured(record)
        and not (record.status == "skipped" and (record.case, _series(record.contender)) in measured)
    )
    return [Failure(*what, rounds=rounds) for what, rounds in counts.items()]


def _series(contender: Contender) -> tuple[str, str]:
    return contender.name, contender.label


def latest(records: Iterable[Record]) -> list[Record]:
    """Returns the last one of several measurements of the same round."""
    return list({record.key(): record for record in records}.values())


def _is_measured(record: Record) -> bool:
    return record.status == "ok" and bool(record.step_seconds)


def _problem(record: Record) -> tuple[str, str]:
    if record.status == "ok":
        return "failed", "no step was measured"
    return record.status, " ".join((record.error or "no reason given").split())


def _case_order(case: Case) -> tuple[object, ...]:
    rate = math.inf if case.rate is None else case.rate
    return case.num_nodes, case.node_size, rate, case.accumulation, case.key()


def _summary(records: list[Record], reference_losses: list[float]) -> Summary:
    first = records[0]
    sent = [count for record in records for count in record.sent_bytes]
    ledger = [record.ledger_bytes for record in records if record.ledger_bytes is not None]
    differences = [_loss_difference(record.losses, reference_losses) for record in records]
    return Summary(
        case=first.case,
        contender=first.contender,
        rounds=len(records),
        step_seconds=Spread.of([seconds for record in records for seconds in record.step_seconds]),
        samples=first.samples,
        sent_bytes=statistics.median(sent) if sent else None,
        minimum_bytes=first.minimum_bytes,
        ledger_bytes=statistics.median(ledger) if ledger else None,
        hop_seconds=_medians(record.hop_seconds for record in records),
        hop_calls=_medians(record.ledger_calls or {} for record in records),
        gradient_bytes=max(record.gradient_bytes for record in records),
        state_bytes=max(record.state_bytes for record in records),
        process_bytes=max(record.process_bytes for record in records),
        losses=first.losses,
        loss_difference=max((entry for entry in differences if entry is not None), default=None),
    )


def _medians(tables: Iterable[dict[str, float]]) -> dict[str, float]:
    values = grouped((entry for table in tables for entry in table.items()), lambda entry: entry[0])
    return {name: statistics.median(value for _, value in entries) for name, entries in values.items()}


def _loss_difference(losses: list[float], reference: list[float]) -> float | None:
    """Returns the largest relative difference over the steps that both have; infinite if a loss is not finite."""
    pairs = list(zip(losses, reference, strict=False))
    if not pairs:
        return None
    if not all(math.isfinite(loss) for pair in pairs for loss in pair):
        return math.inf
    return max(abs(loss - other) / (abs(other) or 1.0) for loss, other in pairs)


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Returns the items that have the same key together, in the order of the first ones."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_case(summaries: Iterable[Summary]) -> dict[Case, list[Summary]]:
    """Returns the summaries of each case."""
    return grouped(summaries, lambda summary: summary.case)


def by_experiment(summaries: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Returns the summaries of each experiment."""
    return grouped(summaries, lambda summary: summary.case.experiment)


def along(summaries: Iterable[Summary], axis: str) -> list[list[Summary]]:
    """Returns groups of summaries whose cases differ in one field only, in which they take several values."""
    groups = grouped(
        summaries, lambda summary: repr({name: value for name, value in asdict(summary.case).items() if name != axis})
    )
    return [group for group in groups.values() if len({getattr(summary.case, axis) for summary in group}) > 1]


def reference_of(summaries: list[Summary]) -> Summary:
    """Returns what the others of a case are compared with: full sharding if it is there, else the first."""
    return next((summary for summary in summaries if summary.contender.name == REFERENCE), summaries[0])


def communication_share(summary: Summary) -> float | None:
    """Returns the part of a step in which rank 0 waits for collectives; ``None`` if they were not timed."""
    hops = [summary.hop_seconds[hop.value] for hop in _TIMED if hop.value in summary.hop_seconds]
    return ratio(sum(hops), sum(summary.hop_seconds.values())) if hops else None


def efficiency(summaries: Iterable[Summary]) -> dict[str, dict[int, float]]:
    """Returns weak scaling of cases that differ in the number of nodes.

    Returns:
        For each contender's label, and each number of nodes: throughput per node relative to that on the smallest
        number of nodes on which the contender was measured.
    """
    result: dict[str, dict[int, float]] = {}
    for (_, label), curve in grouped(summaries, lambda summary: _series(summary.contender)).items():
        per_node = {summary.case.num_nodes: summary.throughput / summary.case.num_nodes for summary in curve}
        result[label] = {nodes: value / per_node[min(per_node)] for nodes, value in sorted(per_node.items())}
    return result
