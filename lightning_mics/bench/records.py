"""The results file of the benchmarks: one JSON line for each measurement of one contender in one round of one case.

Lines are only ever appended, so that a run that was killed can go on from what it has.
"""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_mics.bench.spec import ClusterSpec
from lightning_mics.errors import MiCSError
from lightning_mics.topology import ClusterTopology

FORMAT = 1
STATUSES = ("ok", "failed", "skipped")
DEVICES = ("cpu", "cuda")
LOOPBACK, SHAPED = "loopback", "shaped"

_Entry = TypeVar("_Entry", "Case", "Contender", "Record")


class ResultsError(MiCSError, ValueError):
    """A results file is missing or damaged, or nothing in it can be used."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The conditions of a measurement, the same for every contender.

    Attributes:
        num_nodes: Number of nodes.
        node_size: Ranks on each node.
        rate: Bits a second of each node's link, or ``None`` if it is not limited.
        accumulation: Microsteps of an optimizer step.
        compute: Emulated seconds of a block's forward and backward in a microstep; zeros for real compute only.
        model: What is trained: ``name``, ``num_layers``, ``width``, ``num_parameters`` and more.
        microbatch_size: Samples of a rank's microstep.
        num_blocks: Number of blocks that are sharded one by one.
        experiment: What the case is part of, for example ``"headline"`` or ``"weak-scaling"``.
        hardware: What ranks compute on and what joins them, see :class:`~lightning_mics.bench.site.Site`; nothing for
            CPUs of emulated nodes.
        memory: Bytes of model states that a rank may hold, or ``None`` if they are not limited.
    """

    num_nodes: int
    node_size: int
    rate: int | None
    accumulation: int
    compute: tuple[float, float]
    model: dict[str, Any]
    microbatch_size: int
    num_blocks: int
    experiment: str
    hardware: dict[str, Any] = field(default_factory=dict)
    memory: int | None = None

    def __post_init__(self) -> None:
        # JSON knows neither tuples nor the difference of 0 and 0.0; keys must not depend on them.
        forward, backward = self.compute
        object.__setattr__(self, "compute", (float(forward), float(backward)))

    def __hash__(self) -> int:
        return hash(self.key())

    @property
    def cluster(self) -> ClusterSpec:
        """The cluster that it needs."""
        return ClusterSpec(num_nodes=self.num_nodes, node_size=self.node_size, rate=self.rate)

    @property
    def is_loopback(self) -> bool:
        """Whether all its links are this machine's loopback, on which nobody counts what a node sends."""
        return self.hardware.get("links") == LOOPBACK

    @property
    def topology(self) -> ClusterTopology:
        """Its ranks and nodes."""
        return ClusterTopology(world_size=self.num_nodes * self.node_size, node_size=self.node_size)

    def key(self) -> str:
        """Returns a text that two cases share exactly if they are equal, before and after a round trip."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train; two are equal if they differ in nothing but the label.

    Attributes:
        name: Name for machines, for example ``"mics"`` or ``"full-sharding"``.
        label: Name for people.
        shard_size: Ranks that a model is sharded over.
        hierarchical: Whether partition collectives run in two stages.
        stack: What it runs on, for example ``"Lightning Trainer 2.6.6, ModelParallelStrategy"``.
        optimizer_shard_size: Ranks that divide optimizer states, or ``None`` if these are ``shard_size``.
        settings: What else of ours is set, for example ``{"reshard_after_forward": False}``.
    """

    name: str
    label: str = field(compare=False)
    shard_size: int
    hierarchical: bool
    stack: str
    optimizer_shard_size: int | None = None
    settings: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement; only ``status`` and ``error`` say something about one that failed or was skipped.

    Attributes:
        format: Version of these fields.
        run: Where and when: ``id``, ``date``, ``versions``, ``python``, ``num_cpus``, ``kernel``.
        case: The conditions.
        contender: What was measured.
        round: Number of the round.
        status: ``"ok"``, ``"failed"`` or ``"skipped"``.
        error: Why it failed or was skipped.
        step_seconds: Seconds of each measured optimizer step.
        losses: Loss of each optimizer step.
        sent_bytes: Bytes that left each node in an optimizer step, by the kernel's counters.
        ledger_bytes: The same for one node by our ledger, where the contender keeps one.
        ledger_calls: Collectives of an optimizer step by hop, where the contender keeps a ledger.
        minimum_bytes: Least bytes that have to leave a node in an optimizer step of this algorithm.
        hop_seconds: Exposed seconds of an optimizer step on rank 0: ``"compute"`` (emulated), the names of
            :class:`~lightning_mics.metrics.Hop`, and ``"other"``.
        gradient_bytes: Most bytes of gradients that a rank held during a step.
        state_bytes: Most bytes of parameters and optimizer states that a rank holds between steps.
        process_bytes: Most that the resident memory of a rank's process grew by; on a card, most memory that a rank
            had allocated there.
        samples: Samples of an optimizer step, from all ranks.
    """

    format: int = FORMAT
    run: dict[str, Any]
    case: Case
    contender: Contender
    round: int
    status: str
    error: str | None = None
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent_bytes: list[float] = field(default_factory=list)
    ledger_bytes: float | None = None
    ledger_calls: dict[str, float] | None = None
    minimum_bytes: float = 0.0
    hop_seconds: dict[str, float] = field(default_factory=dict)
    gradient_bytes: float = 0.0
    state_bytes: float = 0.0
    process_bytes: float = 0.0
    samples: int = 0

    def key(self) -> tuple[str, Contender, int]:
        """Returns what tells this measurement from all others, with which a resumed run finds what is done."""
        return self.case.key(), self.contender, self.round


@dataclass(frozen=True)
class Measurement:
    """One contender in one round of one case."""

    case: Case
    contender: Contender
    round: int

    @classmethod
    def of(cls, content: dict[str, Any]) -> Measurement:
        """Returns the measurement that :func:`dataclasses.asdict` was asked about."""
        return cls(Case(**content["case"]), Contender(**content["contender"]), content["round"])

    def record(self, run: dict[str, Any], status: str, **facts: Any) -> Record:
        """Returns the record of what came of it."""
        return Record(run=run, case=self.case, contender=self.contender, round=self.round, status=status, **facts)


def append(path: Path, record: Record) -> None:
    """Appends a record to a results file, and makes the file and its folder if they are missing.

    What a killed run left of a last line is removed first, so that the new line does not become a part of it.
    """
    line = json.dumps(asdict(record)).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        rest = content.rpartition(b"\n")[2]
        if rest and _is_json(rest):
            line = b"\n" + line
        elif rest:
            file.truncate(len(content) - len(rest))
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_results(path: Path) -> list[Record]:
    """Reads a results file.

    A last line that a killed run left half-written is ignored.

    Raises:
        ResultsError: If the file cannot be read, or a line is damaged; with the line's number.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ResultsError(f"{path}: the results cannot be read ({error}).") from error
    if not _is_json(lines[-1]):
        del lines[-1]
    return [_read_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _read_line(path: Path, number: int, line: bytes) -> Record:
    try:
        content = _table("the line", json.loads(line))
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')!r}, and this version reads format {FORMAT}")
        record = _build(Record, content)
        if record.status not in STATUSES:
            raise ValueError(f"status is {record.status!r}, not one of {', '.join(STATUSES)}")
    except ValueError as error:
        raise ResultsError(
            f"{path}, line {number}: the line is damaged: {error}. Delete the line to measure this round again."
        ) from error
    return record


def _table(name: str, content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object")
    return content


def _build(kind: type[_Entry], content: dict[str, Any]) -> _Entry:
    """Returns the dataclass that a JSON object stands for."""
    names = {entry.name for entry in fields(kind)}
    # Older files know nothing of what was added later.
    needed = {entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING}
    wrong = (needed - set(content)) | (set(content) - names)
    if wrong:
        raise ValueError(f"a {kind.__name__.lower()} has the wrong fields: {', '.join(sorted(wrong))} missing or new")
    values = {}
    for name, hint in get_type_hints(kind).items():
        if name not in content:
            continue
        value = content[name]
        if hint in (Case, Contender):
            values[name] = _build(hint, _table(name, value))
        elif _fits(value, hint):
            values[name] = value
        else:
            raise ValueError(f"{name} is {value!r}")
    return kind(**values)


def _fits(value: object, hint: Any) -> bool:
    """Says whether a value read from JSON has the type of a field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(entry, arguments[1]) for entry in value.values())
    if hint is Any:
        return True
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
