"""What to measure: experiments as files, and their cases."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_mics.bench.contenders import parse_contender
from lightning_mics.bench.records import DEVICES, LOOPBACK, Case, Contender
from lightning_mics.bench.spec import ClusterSpec, parse_rate
from lightning_mics.errors import MiCSConfigError
from lightning_mics.yaml_text import parse_yaml

_FOLDER = "definitions"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A grid of cases, and who is compared in each.

    Attributes:
        name: What the results are called.
        about: What it shows, in one sentence.
        nodes: Numbers of nodes.
        ranks: Ranks a node.
        rate: Link rates, for example ``"100mbit"``; ``"none"`` for no limit.
        accumulation: Microsteps of an optimizer step.
        compute: Emulated seconds of a block's forward and backward; pairs.
        device: What ranks compute on: ``"cpu"``, or ``"cuda"`` for this machine's cards.
        contenders: Names, see :func:`~lightning_mics.bench.contenders.parse_contender`.
        layers: Blocks of the GPT-2.
        width: Its hidden size.
        sequence: Tokens of a sample.
        microbatch: Samples of a rank's microstep.
        rounds: How often each contender is measured, in turn with the others.
        steps: Optimizer steps measured in a round.
        warmup: Optimizer steps before them.
        memory: MiB of parameters, gradients and optimizer states that a rank may hold; who needs more is measured all
            the same, and said to be out of competition.
    """

    name: str
    about: str = ""
    nodes: Sequence[int] = (4,)
    ranks: int = 2
    rate: Sequence[str | int] = ("100mbit",)
    accumulation: Sequence[int] = (4,)
    compute: Sequence[Sequence[float]] = ((0.0, 0.0),)
    device: str = "cpu"
    contenders: Sequence[str] = field(default=("full-sharding", "mesh-2d", "mics:node"))
    layers: int = 8
    width: int = 192
    sequence: int = 16
    microbatch: int = 1
    rounds: int = 3
    steps: int = 2
    warmup: int = 1
    memory: float | None = None

    @property
    def most_ranks(self) -> int:
        """Ranks of its largest cluster."""
        return max(self.nodes) * self.ranks

    def cases(self, hardware: Mapping[str, Any] | None = None) -> list[Case]:
        """Returns all different combinations, those on one cluster side by side.

        Args:
            hardware: What there is beside CPUs of emulated nodes, see :class:`~lightning_mics.bench.site.Site`.
        """
        hardware = dict(hardware or {})
        has_links = hardware.get("links") != LOOPBACK
        combinations = itertools.product(self.nodes, self.rate, self.accumulation, self.compute)
        cases = (
            Case(
                num_nodes=nodes,
                node_size=self.ranks,
                rate=parse_rate(str(rate)) if nodes > 1 and has_links else None,
                accumulation=accumulation,
                compute=(compute[0], compute[1]),
                model=self._model(),
                microbatch_size=self.microbatch,
                num_blocks=self.layers,
                experiment=self.name,
                hardware=hardware,
                memory=None if self.memory is None else int(self.memory * 2**20),
            )
            for nodes, rate, accumulation, compute in combinations
        )
        return list(dict.fromkeys(cases))

    def _model(self) -> dict[str, Any]:
        width = self.width
        block = 12 * width**2 + 13 * width
        return {
            "name": "GPT-2",
            "num_layers": self.layers,
            "width": width,
            "sequence_length": self.sequence,
            "num_parameters": self.layers * block + (256 + self.sequence + 2) * width,
        }

    def contenders_of(self, case: Case) -> list[Contender]:
        """Returns who is compared in a case; without shard sizes that its cluster cannot hold."""
        parsed = (parse_contender(word, case.topology) for word in self.contenders)
        return list(dict.fromkeys(contender for contender in parsed if contender is not None))

    def check(self) -> None:
        """Checks what can be checked before anything runs.

        Raises:
            MiCSConfigError: If a value cannot work; names it.
        """
        if not isinstance(self.name, str):
            raise MiCSConfigError(f"name: {self.name!r} is not a text. Try name: '{self.name}'.")
        if self.device not in DEVICES:
            raise MiCSConfigError(f"device: {self.device!r} is unknown. Try one of {', '.join(DEVICES)}.")
        for name, least in _LEAST.items():
            _check_number(name, getattr(self, name), least)
        if self.width % 64 and self.width > 64:
            raise MiCSConfigError(f"width: {self.width} must be a multiple of 64. Try {self.width // 64 * 64}.")
        if self.memory is not None and not (_is_number(self.memory) and self.memory > 0):
            raise MiCSConfigError(f"memory: {self.memory!r} is not a number of MiB. Try memory: 100.")
        for name in ("nodes", "rate", "accumulation", "compute", "contenders"):
            value, example = getattr(self, name), list(_EXAMPLES[name])
            if isinstance(value, str) or not isinstance(value, Sequence) or not value:
                raise MiCSConfigError(f"{name}: {value!r} is not a list with something in it. Try {name}: {example}.")
        for name in ("nodes", "accumulation"):
            for value in getattr(self, name):
                _check_number(name, value, least=1)
        for pair in self.compute:
            if not _is_pair_of_seconds(pair):
                raise MiCSConfigError(f"compute: {pair!r} is not a pair of seconds. Try compute: [[0.01, 0.02]].")
            if self.device != "cpu" and any(pair):
                raise MiCSConfigError(f"compute: {pair!r} delays CPUs, not cards. Try compute: [[0, 0]].")
        for rate in self.rate:
            with _naming("rate"):
                parse_rate(str(rate))
        for nodes in self.nodes:
            with _naming("nodes"):
                ClusterSpec(num_nodes=nodes, node_size=self.ranks, rate=None)
        compared = [self.contenders_of(case) for case in self.cases()]
        if not any(compared):
            raise MiCSConfigError(f"contenders: none of {list(self.contenders)} fits a cluster. Try [mics:node].")


# A sample of one token would have nothing to predict.
_LEAST = {"ranks": 1, "layers": 1, "width": 1, "sequence": 2, "microbatch": 1, "rounds": 1, "steps": 1, "warmup": 0}
_EXAMPLES: dict[str, Sequence[Any]] = {
    "nodes": (2, 4),
    "rate": ("100mbit",),
    "accumulation": (1, 4),
    "compute": ([0.01, 0.02],),
    "contenders": ("full-sharding", "mics:node"),
}


def _check_number(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MiCSConfigError(f"{name}: {value!r} is not a whole number of at least {least}. Try 2.")


def _is_pair_of_seconds(pair: object) -> bool:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(_is_number(value) and value >= 0 for value in pair)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Puts a setting before the words of an error that knows it by another name."""
    try:
        yield
    except MiCSConfigError as error:
        raise MiCSConfigError(f"{setting}: {error}") from error


def built_in_names() -> list[str]:
    """Returns the names of the experiments that come with the package."""
    folder = importlib.resources.files("lightning_mics.bench") / _FOLDER
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_experiment(name_or_path: str) -> Experiment:
    """Reads an experiment, by the name of one that comes with the package or from a YAML file.

    Raises:
        MiCSConfigError: If there is none, or something in it cannot work.
    """
    path = Path(name_or_path)
    if name_or_path in built_in_names():
        text = (importlib.resources.files("lightning_mics.bench") / _FOLDER / f"{name_or_path}.yaml").read_text()
    elif path.is_file():
        text = path.read_text()
    else:
        raise MiCSConfigError(
            f"{name_or_path!r} is neither an experiment of ours nor a file. Ours: {', '.join(built_in_names())}."
        )
    values = parse_yaml(text, name_or_path, "'nodes: [2, 4]'")
    return parse_experiment(values, default_name=path.stem)


def parse_experiment(values: object, default_name: str) -> Experiment:
    """Builds and checks an experiment from a mapping of its settings."""
    known = [entry.name for entry in dataclasses.fields(Experiment)]
    if not isinstance(values, Mapping):
        raise MiCSConfigError("An experiment must hold lines like 'nodes: [2, 4]'.")
    for name in values:
        if name not in known:
            raise MiCSConfigError(f"Unknown setting {name!r} of an experiment. Known: {', '.join(known)}.")
    experiment = Experiment(**{"name": default_name, **values})
    experiment.check()
    return experiment
