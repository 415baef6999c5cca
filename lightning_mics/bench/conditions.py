"""The conditions of cases in words: what they have in common, and how one differs from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lightning_mics.bench.records import Case
from lightning_mics.bench.spec import format_rate
from lightning_mics.text import format_bytes, format_number


def counted(number: int, noun: str) -> str:
    """Returns a number of things, for example ``"2 nodes"``."""
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"


def _nodes(case: Case) -> str:
    return f"{counted(case.num_nodes, 'node')} x {counted(case.node_size, 'rank')}"


def _rate(case: Case) -> str:
    if case.is_loopback:
        return "all links loopback"
    return "links not limited" if case.rate is None else f"{format_rate(case.rate)} a node"


def _compute(case: Case) -> str:
    forward, backward = (format_number(seconds * 1e3) for seconds in case.compute)
    if not any(case.compute):
        return "real compute only"
    return f"emulated compute of {forward} ms forward and {backward} ms backward a block and microstep"


def _hardware(case: Case) -> str:
    if not case.hardware:
        return _CPUS
    hardware = case.hardware
    sharing, number = hardware["sharing"], hardware["cards"]
    words = f"NCCL on {hardware['card']}" if number == 1 else f"NCCL on {number} x {hardware['card']}"
    is_shared = case.cluster.world_size > number
    return f"{words}, shared by {counted(case.cluster.world_size, 'rank')} ({sharing})" if is_shared else words


def _memory(case: Case) -> str:
    return _UNLIMITED if case.memory is None else f"at most {format_bytes(case.memory)} of model states a rank"


def _model(case: Case) -> str:
    details = [f"{case.model['num_layers']} layers"] if "num_layers" in case.model else []
    details += [f"width {case.model['width']}"] if "width" in case.model else []
    if "num_parameters" in case.model:
        details.append(f"{format_number(case.model['num_parameters'] / 1e6)} M parameters")
    name = str(case.model.get("name", "unnamed model"))
    return f"{name} ({', '.join(details)})" if details else name


_FACTS: dict[str, Callable[[Case], str]] = {
    "nodes": _nodes,
    "rate": _rate,
    "hardware": _hardware,
    "accumulation": lambda case: f"{counted(case.accumulation, 'microstep')} a step",
    "compute": _compute,
    "model": _model,
    "microbatch": lambda case: f"{counted(case.microbatch_size, 'sample')} a rank and microstep",
    "memory": _memory,
    "blocks": lambda case: f"{counted(case.num_blocks, 'block')}",
}
_PLACE = ("nodes", "rate", "hardware", "accumulation", "memory")
_CPUS, _UNLIMITED = "CPUs", "memory not limited"  # said only where cases differ in them


def _is_shared(fact: str, cases: Iterable[Case]) -> bool:
    return len({_FACTS[fact](case) for case in cases}) <= 1


def shared_conditions(cases: Iterable[Case], *, short: bool = False) -> str:
    """Returns in words what all cases have in common; if ``short``, only what matters most."""
    cases = list(cases)
    facts = [name for name in (_PLACE if short else _FACTS) if _is_shared(name, cases)]
    words = [word for name in facts if (word := _FACTS[name](cases[0])) not in (_CPUS, _UNLIMITED)]
    if short and _is_shared("compute", cases):
        words.append("emulated compute" if any(cases[0].compute) else "real compute")
    return ", ".join(words)


def own_conditions(case: Case, cases: Iterable[Case]) -> str:
    """Returns in words how a case differs from the others; nothing, if it does not."""
    cases = list(cases)
    return ", ".join(fact(case) for name, fact in _FACTS.items() if not _is_shared(name, cases))
