"""Verdicts on what ranks have told: which of them differ from the others, by which numbers, and what to do."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from lightning_mics.doctor.facts import Folder
from lightning_mics.doctor.findings import Check, Findings, Verdict, by_value, ranks_in_words, worst
from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import format_bytes, format_number, listing
from lightning_mics.topology import ClusterTopology

_GIB, _MIB = 2**30, 2**20
# Shares of the median under which a rank or a link is worth a look, and under which it holds up all others. Processes
# on CPUs share them with others.
_CARD_LIMITS, _CPU_LIMITS, _LINK_LIMITS = (0.9, 0.7), (0.7, 0.5), (0.7, 0.4)
_SHARED_MEMORY, _TEMPORARY, _CHECKPOINTS = (64 * _MIB, _GIB), (64 * _MIB, _GIB), (_GIB, 20 * _GIB)
_TAKEN = _GIB
_SHOWN = 3

_LOOPBACK = re.compile(r"127\.|lo$|=?lo(,|$)")
# Variables by which jobs become slow or hang, where they have a value that matches.
_HARMFUL = {
    "CUDA_LAUNCH_BLOCKING": ("1", "no communication runs beside computing"),
    "CUDA_DEVICE_MAX_CONNECTIONS": ("1", "gathers queue behind computing"),
    "NCCL_P2P_DISABLE": ("1", "cards of a node talk through host memory"),
    "NCCL_SHM_DISABLE": ("1", "ranks of a node talk through the network"),
    "NCCL_DEBUG": ("INFO|TRACE", "logs take time"),
    "NCCL_ALGO": (".+", "NCCL may not choose the fastest algorithm"),
    "NCCL_PROTO": (".+", "NCCL may not choose the fastest protocol"),
    "NCCL_BLOCKING_WAIT": ("1", "the host waits for every collective"),
    "TORCH_NCCL_BLOCKING_WAIT": ("1", "the host waits for every collective"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "ranks wait for ever for one that failed"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is checked by another one"),
}
_HARMFUL_TO_INFINIBAND = {
    "NCCL_IB_DISABLE": ("1", "InfiniBand adapters stay unused"),
    "NCCL_NET": ("Socket", "InfiniBand adapters stay unused"),
}


def all_checks(findings: Findings) -> list[Check]:
    """Returns a verdict on each thing."""
    checks = [_presence(findings)]
    if findings.facts:
        makers = (_placement, _versions, _environment, _network, _cards, _compute, _links, _inside)
        checks += [check for maker in makers if (check := maker(findings)) is not None]
        checks += _storage(findings)
    return checks


# Who is there.


def _presence(findings: Findings) -> Check:
    world = findings.world_size
    missing = [rank for rank in range(world) if rank not in findings.facts and rank not in findings.errors]
    if missing:
        step = "Look whether they were started, and whether their nodes reach MASTER_ADDR:MASTER_PORT of rank 0."
        return Check("ranks", "broken", f"nothing was heard of {ranks_in_words(missing)} of {world}", step)
    if findings.errors:
        words = "; ".join(f"{findings.named(ranks)}: {error}" for error, ranks in by_value(findings.errors)[:_SHOWN])
        return Check("ranks", "broken", words, "Mend what the first of these errors says, and look again.")
    if findings.places:
        busy = {rank: place for rank, place in findings.places.items() if not place.startswith("waits")}
        places = by_value(busy or findings.places)
        words = "; ".join(f"{findings.named(ranks)} {place}" for place, ranks in places[:_SHOWN])
        step = "Look at the nodes that are named, and at the links between them."
        return Check("ranks", "broken", f"not done after {findings.seconds:.0f} s: {words}", step)
    nodes = len(findings.hosts)
    return Check("ranks", "ok", f"{world} on {nodes} node{'s' * (nodes > 1)}, in {findings.seconds:.0f} s")


def _placement(findings: Findings) -> Check | None:
    if findings.world_size == 1 or len(findings.facts) < findings.world_size:
        return None
    step = "Start the same number of ranks on each node, numbered node by node, as torchrun does."
    try:
        found = ClusterTopology.from_hostnames([findings.facts[rank].host for rank in range(findings.world_size)])
    except MiCSConfigError as error:
        return Check("places", "broken", str(error), step)
    sizes = {facts.node_size for facts in findings.facts.values()}
    if sizes != {found.node_size}:
        words = f"the launcher started {listing(sorted(sizes))} ranks a node, by the machines' names it is"
        step = "Give machines names of their own; where nodes are pretended (node_size=), this is as it should be."
        return Check("places", "look at", f"{words} {found.node_size}", step)
    return Check("places", "ok", f"{found.num_nodes} x {found.node_size} ranks, node by node")


# What they run, and by which settings.


def _versions(findings: Findings) -> Check:
    names = dict.fromkeys(name for facts in findings.facts.values() for name in facts.versions)
    by_name = {
        name: {rank: facts.versions.get(name, "not installed") for rank, facts in findings.facts.items()}
        for name in names
    }
    differing = {name: words for name, values in by_name.items() if (words := findings.differing(values))}
    if differing:
        found = ". ".join(f"{name}: {words}" for name, words in differing.items())
        is_small = all(name == "python" and len({_minor(v) for v in by_name[name].values()}) == 1 for name in differing)
        verdict: Verdict = "look at" if is_small else "broken"
        return Check("versions", verdict, found, "Install the same on all nodes: ranks would run different code.")
    first = next(iter(findings.facts.values())).versions
    shown = [f"{name} {version}" for name, version in first.items() if "files" not in name]
    return Check("versions", "ok", ", ".join(shown))


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _environment(findings: Findings) -> Check:
    words: list[tuple[Verdict, str]] = []
    steps = []
    names = sorted({name for facts in findings.facts.values() for name in facts.variables})
    for name in names:
        values = {rank: facts.variables.get(name, "not set") for rank, facts in findings.facts.items()}
        if differs := findings.differing(values):
            words.append(("broken" if name.startswith("MICS_") else "look at", f"{name} differs: {differs}"))
    if words:
        steps.append("Set the same on all ranks; names of adapters may differ where machines do.")
    harmful = []
    for rank, facts in findings.facts.items():
        known = {**_HARMFUL, **(_HARMFUL_TO_INFINIBAND if facts.network.has_infiniband else {})}
        for name, (pattern, effect) in known.items():
            value = facts.variables.get(name)
            if value is not None and re.fullmatch(pattern, value, re.IGNORECASE):
                harmful.append((rank, f"{name}={value}: {effect}"))
    if harmful:
        steps.append("Unset what slows down, unless it is there for a reason.")
    for effect in dict.fromkeys(effect for _, effect in harmful):
        ranks = [rank for rank, told in harmful if told == effect]
        where = "" if len(ranks) == findings.world_size else f" ({findings.named(ranks)})"
        words.append(("look at", f"{effect}{where}"))
    return _summed_up("environment", words, steps, "the same on all ranks, and nothing that slows down")


def _network(findings: Findings) -> Check | None:
    if len(findings.hosts) == 1:
        return None
    words: list[tuple[Verdict, str]] = []
    steps = []
    if unknown := _unknown_interfaces(findings):
        words += unknown
        steps.append("Name interfaces that each node has: ip address shows them.")
    alone = [
        rank
        for rank, facts in findings.facts.items()
        if _LOOPBACK.match(facts.network.own_address) and "GLOO_SOCKET_IFNAME" not in facts.variables
    ]
    if alone:
        address = findings.facts[alone[0]].network.own_address
        told = f"their names stand for {address} on {findings.named(alone)}: gloo would talk to itself"
        words.append(("look at", told))
        steps.append("Set GLOO_SOCKET_IFNAME, or mend /etc/hosts.")
    used = {
        rank: f"{facts.network.used}, MTU {facts.network.mtu}"
        for rank, facts in findings.facts.items()
        if facts.network.used
    }
    if used and (differs := findings.differing(used)):
        words.append(("look at", f"the way to rank 0 differs: {differs}"))
        steps.append("Let all nodes use the same network (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and the same MTU.")
    return _summed_up("interfaces", words, steps, listing(sorted(set(used.values()))) or "no way to rank 0 by IPv4")


def _unknown_interfaces(findings: Findings) -> list[tuple[Verdict, str]]:
    """Returns what is wrong with interfaces that variables name: no such one, or one that leads nowhere."""
    wrong = defaultdict(list)
    for rank, facts in findings.facts.items():
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            value = facts.variables.get(name, "")
            if not value or value.startswith("^"):
                continue
            begin_with = name.startswith("NCCL") and not value.startswith("=")
            wanted = value.lstrip("=").split(",")
            found = [
                there
                for there in facts.network.interfaces
                if any(there.startswith(word) if begin_with else there == word for word in wanted)
            ]
            if not found:
                wrong[f"{name}={value} names no interface of {{}}"].append(rank)
            elif found == ["lo"]:
                wrong[f"{name}={value} leads to no other node from {{}}"].append(rank)
    return [("broken", words.format(findings.named(ranks))) for words, ranks in wrong.items()]


def _summed_up(name: str, words: Sequence[tuple[Verdict, str]], steps: Sequence[str], fine: str) -> Check:
    """Returns what was found of one thing, which is ``fine`` if that is nothing."""
    if not words:
        return Check(name, "ok", fine)
    verdict = worst(verdict for verdict, _ in words)
    return Check(name, verdict, ". ".join(text for _, text in words), " ".join(steps))


# What they compute and send.


def _cards(findings: Findings) -> Check | None:
    cards = {rank: facts.card for rank, facts in findings.facts.items() if facts.card is not None}
    if not cards:
        return None
    words: list[tuple[Verdict, str]] = []
    steps = []
    without = [rank for rank in findings.facts if rank not in cards or cards[rank].name == "none"]
    if without:
        words.append(("broken", f"no card for {findings.named(without)}"))
        steps.append("Start as many ranks on a node as it has cards (nvidia-smi, CUDA_VISIBLE_DEVICES).")
    owners = defaultdict(list)
    for rank, card in cards.items():
        if card.uuid and "NCCL_HOSTID" not in findings.facts[rank].variables:
            owners[card.uuid].append(rank)
    shared = [ranks for ranks in owners.values() if len(ranks) > 1]
    if shared:
        words.append(("broken", "; ".join(f"{ranks_in_words(ranks)} share a card" for ranks in shared[:_SHOWN])))
        steps.append("Give each rank a card of its own: NCCL refuses to share one.")
    kinds = {rank: f"{card.name}, {format_bytes(card.memory)}" for rank, card in cards.items() if card.memory}
    if kinds and (differs := findings.differing(kinds)):
        words.append(("look at", f"cards differ: {differs}"))
        steps.append("The slowest kind sets the pace, the smallest one the memory.")
    taken = {rank: card.taken for rank, card in cards.items() if card.taken > _TAKEN}
    if taken:
        most = format_bytes(max(taken.values()))
        words.append(("look at", f"other processes hold up to {most} of the cards of {findings.named(taken)}"))
        steps.append("End what is left of earlier jobs (nvidia-smi).")
    return _summed_up("cards", words, steps, listing(sorted(set(kinds.values()))))


def _compute(findings: Findings) -> Check:
    if len(findings.compute) < len(findings.facts):
        return Check("compute", "look at", "not measured", "See what is said of ranks.")
    groups = defaultdict(list)  # only equals are compared
    for rank, facts in findings.facts.items():
        groups[facts.card and facts.card.name].append(rank)
    slow: dict[int, float] = {}
    for ranks in groups.values():
        shares = _shares({rank: findings.compute[rank] for rank in ranks})
        slow |= {rank: share for rank, share in shares.items() if share < _limits(findings, rank)[0]}
    middle = statistics.median(rate for rates in findings.compute.values() for rate in rates)
    shown = f"{format_number(middle / 1e12)} TFLOP/s" if middle > 1e11 else f"{format_number(middle / 1e9)} GFLOP/s"
    if not slow:
        return Check("compute", "ok", f"{shown} a rank, in matrix products")
    words = [f"{findings.named([rank])}: {share:.0%}" for rank, share in sorted(slow.items(), key=lambda i: i[1])]
    verdict = worst("broken" if share < _limits(findings, rank)[1] else "look at" for rank, share in slow.items())
    step = "Look for other processes there, at temperature and clocks (nvidia-smi -q -d PERFORMANCE): all wait for it."
    return Check("compute", verdict, f"{listing(words)} of the median {shown}", step)


def _limits(findings: Findings, rank: int) -> tuple[float, float]:
    return _CPU_LIMITS if findings.facts[rank].card is None else _CARD_LIMITS


def _shares(rates: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Returns each rank's share of the median in that window of time in which it did best: passing loads go by."""
    middles = [statistics.median_high(window) for window in zip(*rates.values(), strict=True)]
    return {rank: max(map(_divide, mine, middles)) for rank, mine in rates.items()}


def _divide(value: float, by: float) -> float:
    return value / by if by else 0.0


def slow_links(rates: Mapping[tuple[int, int], float]) -> tuple[dict[int, float], dict[tuple[int, int], float], float]:
    """Returns which places are slow whomever they talk to, which pairs beside these, and the median of places.

    Shares are those of the median, and of what both places of a pair reach with others.
    """
    best: dict[int, float] = defaultdict(float)
    for pair, rate in rates.items():
        for place in pair:
            best[place] = max(best[place], rate)
    middle = statistics.median_high(best.values())
    places = {place: rate / middle for place, rate in best.items() if rate < _LINK_LIMITS[0] * middle}
    expected = {pair: min(best[place] for place in pair) for pair in rates}
    shares = {pair: rate / expected[pair] for pair, rate in rates.items() if not places.keys() & set(pair)}
    pairs = {pair: share for pair, share in shares.items() if share < _LINK_LIMITS[0]}
    return places, pairs, middle


def _links(findings: Findings) -> Check | None:
    hosts = findings.hosts
    if len(hosts) == 1:
        return None
    return _link_check("links between nodes", findings.links, lambda place: findings.node(hosts[place]))


def _inside(findings: Findings) -> Check | None:
    if not findings.inside:
        return None
    return _link_check("links in nodes", findings.inside, lambda rank: findings.named([rank]))


def _link_check(name: str, rates: Mapping[tuple[int, int], float], show: Callable[[int], str]) -> Check:
    if not rates:
        return Check(name, "look at", "not measured", "See what is said of ranks.")
    places, pairs, middle = slow_links(rates)
    if not places and not pairs:
        count = len(rates)
        alone = " (nothing to compare it with)" if count == 1 else ""
        return Check(name, "ok", f"{_rate(middle)} each way, {count} pair{'s' * (count > 1)}{alone}")
    words = [f"{show(place)}: {share:.0%} of the median {_rate(middle)}" for place, share in places.items()]
    words += [
        f"{show(pair[0])} with {show(pair[1])}: {_rate(rates[pair])}, {share:.0%} of what each has with others"
        for pair, share in pairs.items()
    ]
    verdict = worst("broken" if share < _LINK_LIMITS[1] else "look at" for share in (*places.values(), *pairs.values()))
    step = (
        "Look at cables, switch ports and adapters there (ethtool, ibstat, nvidia-smi topo -m), and at other traffic."
    )
    return Check(name, verdict, "; ".join(words[:_SHOWN]) + "; ..." * (len(words) > _SHOWN), step)


def _rate(bytes_per_second: float) -> str:
    unit, size = ("GB/s", 1e9) if bytes_per_second >= 1e9 else ("MB/s", 1e6)
    return f"{format_number(bytes_per_second / size)} {unit}"


# Where they write.


def _storage(findings: Findings) -> list[Check]:
    checks = []
    steps = {
        "shared memory": "Give containers more of it (docker run --shm-size 16g): NCCL and workers of loaders need it.",
        "temporary files": "Make room, or set TMPDIR.",
        "checkpoints": "Name a folder that all ranks can write to, with room for what a run saves.",
    }
    folders: dict[str, tuple[dict[int, Folder | None], tuple[int, int]]] = {
        "shared memory": ({rank: facts.shared_memory for rank, facts in findings.facts.items()}, _SHARED_MEMORY),
        "temporary files": ({rank: facts.temporary for rank, facts in findings.facts.items()}, _TEMPORARY),
        "checkpoints": ({rank: facts.checkpoints for rank, facts in findings.facts.items()}, _CHECKPOINTS),
    }
    for name, (found, limits) in folders.items():
        here = {rank: folder for rank, folder in found.items() if folder is not None}
        if here:
            unseen = [rank for rank, sees in findings.sees.items() if not sees] if name == "checkpoints" else []
            checks.append(_folder_check(findings, name, here, limits, steps[name], unseen))
    return checks


def _folder_check(
    findings: Findings,
    name: str,
    folders: Mapping[int, Folder],
    limits: tuple[int, int],
    step: str,
    unseen: Sequence[int],
) -> Check:
    problems = {rank: folder.problem for rank, folder in folders.items() if folder.problem}
    if problems:
        problem, ranks = by_value(problems)[0]
        return Check(name, "broken", f"{findings.named(ranks)} cannot write: {problem}", step)
    if unseen:
        path = folders[unseen[0]].path
        words = f"{findings.named(unseen)} cannot see in {path} what rank 0 wrote there"
        return Check(name, "broken", words, "Name a folder of a file system that all nodes share.")
    least = min(folders.values(), key=lambda folder: folder.free)
    full = [rank for rank, folder in folders.items() if folder.free < limits[1]]
    words = f"{format_bytes(least.free)} of {format_bytes(least.size)} free in {least.path}"
    if not full:
        return Check(name, "ok", f"{'at least ' * (len(findings.hosts) > 1)}{words}")
    verdict: Verdict = "broken" if least.free < limits[0] else "look at"
    return Check(name, verdict, f"{words} ({findings.named(full)})", step)
