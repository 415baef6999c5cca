"""Where each of our ways to shard wins or loses, in sentences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_mics.bench.conditions import counted, own_conditions, shared_conditions
from lightning_mics.bench.records import Case, Contender
from lightning_mics.bench.summary import OURS, Failure, Summary, by_case, ratio, reference_of
from lightning_mics.text import format_bytes

MARGIN = 0.05
VERDICTS = {"loss": "Slower than", "draw": "About as fast as", "win": "Faster than"}


@dataclass(frozen=True)
class Finding:
    """One comparison in one case.

    Attributes:
        case: The conditions.
        ours: One of ours.
        other: What it is compared with: another way to shard, or for two-stage collectives the same with flat ones.
        times: Throughput of ours relative to the other's.
    """

    case: Case
    ours: Contender
    other: Contender
    times: float

    @property
    def verdict(self) -> str:
        """``"win"``, ``"draw"`` or ``"loss"`` of ours."""
        return "loss" if self.times < 1 - MARGIN else "win" if self.times > 1 + MARGIN else "draw"


def headlines(summaries: Iterable[Summary]) -> list[str]:
    """Returns for each case a sentence on our fastest contender and the reference."""
    sentences = []
    for case, group in by_case(summaries).items():
        ours = [summary for summary in group if summary.is_ours and summary.competes]
        reference = reference_of(group)
        if not ours or reference.is_ours:
            continue
        best = max(ours, key=lambda summary: summary.throughput)
        times = best.throughput / reference.throughput
        sentence = f"{best.contender.label} has {times:.2f} times the throughput of {reference.contender.label}"
        share = ratio(best.sent_bytes, reference.sent_bytes) if reference.minimum_bytes else None
        if share is not None:
            sentence += f" and sends {share:.1%} of its bytes out of a node"
        sentences.append(f"{sentence} ({shared_conditions([case], short=True)}).")
    return sentences


def wins_and_losses(summaries: Iterable[Summary]) -> list[Finding]:
    """Returns how each of ours compares with everything else, and two-stage collectives with flat ones.

    A difference of up to 5 % is a draw.
    """
    return [
        Finding(ours.case, ours.contender, other.contender, ours.throughput / other.throughput)
        for group in by_case(summaries).values()
        for other in group
        for ours in group
        if ours.is_ours and (not other.is_ours or _is_flat_of(ours.contender, other.contender))
    ]


def _is_flat_of(staged: Contender, flat: Contender) -> bool:
    return staged.hierarchical and not flat.hierarchical and flat.shard_size == staged.shard_size


def verdict_lines(group: list[Summary]) -> list[str]:
    """Returns a line for each verdict on ours against each other contender, losses first."""
    cases = list(by_case(group))
    lines: dict[tuple[str, str], dict[str, list[str]]] = {}
    findings = wins_and_losses(group)
    for finding in sorted(findings, key=lambda entry: list(VERDICTS).index(entry.verdict)):
        place = own_conditions(finding.case, cases)
        entry = f"{finding.times:.2f}{f' ({place})' if place else ''}"
        entries = lines.setdefault((finding.verdict, _opponent(finding)), {})
        entries.setdefault(finding.ours.label, []).append(entry)
    return [
        f"{VERDICTS[verdict]} {opponent}, in times its throughput: "
        + "; ".join(f"{label} {', '.join(entries)}" for label, entries in ours.items())
        for (verdict, opponent), ours in lines.items()
    ]


def _opponent(finding: Finding) -> str:
    label = finding.other.label
    return f"flat collectives, {label}" if finding.other.name == OURS else label


def limit_lines(summaries: Iterable[Summary]) -> list[str]:
    """Returns a line for each case with a limit of memory, on those who need more."""
    lines = []
    for case, group in by_case(summaries).items():
        over = [
            f"{each.contender.label} ({format_bytes(each.model_bytes or 0)})" for each in group if not each.competes
        ]
        if over:
            lines.append(
                f"* Over the limit of {format_bytes(case.memory or 0)} of model states a rank, out of competition: "
                f"{', '.join(over)}."
            )
    return lines


def failure_lines(experiment: str, failed: Iterable[Failure]) -> list[str]:
    """Returns a line for each contender of an experiment that could not be measured."""
    return [
        f"{failure.contender.label} {failure.status} in {counted(failure.rounds, 'round')} "
        f"({shared_conditions([failure.case], short=True)}): {failure.reason}"
        for failure in failed
        if failure.case.experiment == experiment
    ]
