"""Verdicts of ``mics doctor`` on what ranks have told."""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from lightning_mics.doctor.checks import all_checks, slow_links
from lightning_mics.doctor.facts import Card, Facts, Folder, Network
from lightning_mics.doctor.findings import Check, Findings
from lightning_mics.doctor.meeting import Launch
from lightning_mics.doctor.rates import Exchanges, opponents, pair_rates, tournament
from lightning_mics.errors import MiCSConfigError

GIB = 2**30
NETWORK = Network(("lo", "eth0", "eth1"), "eth0", 9000, "10.0.0.1", has_infiniband=False)
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "lightning-mics": "0.1.0"}
ROOM = Folder("/somewhere", 100 * GIB, 50 * GIB)


def facts(rank: int, size: int = 2, **changes: Any) -> Facts:
    own = Facts(rank, f"node{rank // size}.site", size, VERSIONS, {}, NETWORK, None, ROOM, ROOM, ROOM)
    return dataclasses.replace(own, **changes)


def findings(nodes: int = 3, node_size: int = 2, **changes: Any) -> Findings:
    """Healthy ranks, but for the changes: of a field, or of facts by ``rank3=dict(...)``."""
    world = nodes * node_size
    told = {rank: facts(rank, node_size, **changes.pop(f"rank{rank}", {})) for rank in range(world)}
    compute = {rank: [1e12 * (1 + 0.01 * rank), 1e12, 1e12] for rank in range(world)}
    links = dict.fromkeys(itertools.combinations(range(nodes), 2), 1e9)
    return dataclasses.replace(Findings(world, told, compute, links), **changes)


def bad(found: Findings) -> dict[str, Check]:
    return {check.name: check for check in all_checks(found) if check.verdict != "ok"}


def card(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {"card": dataclasses.replace(Card("H100", f"uuid{number}", 80 * GIB, 0, 2), **changes)}


@pytest.mark.parametrize(("nodes", "node_size"), [(1, 1), (1, 4), (2, 1), (3, 2), (8, 8)])
def test_healthy_ranks_are_let_go(nodes: int, node_size: int) -> None:
    checks = all_checks(findings(nodes, node_size))
    assert {check.verdict for check in checks} == {"ok"} and not any(check.step for check in checks)


def test_facts_travel_as_json() -> None:
    own = facts(1, **card())
    assert Facts.read(json.loads(json.dumps(dataclasses.asdict(own)))) == dataclasses.replace(
        own,
        network=dataclasses.replace(NETWORK, interfaces=list(NETWORK.interfaces)),  # type: ignore[arg-type]
    )


def on(*ranks: int, **changes: Any) -> dict[str, Any]:
    return {f"rank{rank}": changes for rank in ranks}


def cards(**changes: Any) -> dict[str, Any]:
    """A card for each rank, with changes by rank."""
    return {f"rank{rank}": card(rank, **changes.get(f"rank{rank}", {})) for rank in range(6)}


ALL = range(6)
OTHER_TORCH = {**VERSIONS, "torch": "2.11.0"}
NO_TORCH = {"python": "3.11.7", "lightning-mics": "0.1.0"}
WAITS = {2: "exchanges messages with rank 9", 3: "exchanges messages with rank 9", 5: "waits for other ranks"}
CASES = [
    ("versions", "broken", "torch: rank 3 on node1: 2.11.0; others: 2.13.0", on(3, versions=OTHER_TORCH)),
    ("versions", "broken", "torch: node1: not installed; others: 2.13.0", on(2, 3, versions=NO_TORCH)),
    ("versions", "look at", "python: rank 0 on node0: 3.11.9", on(0, versions={**VERSIONS, "python": "3.11.9"})),
    (
        "environment",
        "look at",
        "NCCL_IB_HCA differs: rank 5 on node2: a; others: not set",
        on(5, variables={"NCCL_IB_HCA": "a"}),
    ),
    ("environment", "broken", "MICS_SHARD_SIZE differs", on(5, variables={"MICS_SHARD_SIZE": "4"})),
    ("environment", "look at", "NCCL_P2P_DISABLE=1: cards of a node", on(*ALL, variables={"NCCL_P2P_DISABLE": "1"})),
    (
        "interfaces",
        "broken",
        "GLOO_SOCKET_IFNAME=ib0 names no interface of node0, node1, node2",
        on(*ALL, variables={"GLOO_SOCKET_IFNAME": "ib0"}),
    ),
    ("interfaces", "broken", "leads to no other node", on(*ALL, variables={"NCCL_SOCKET_IFNAME": "lo"})),
    (
        "interfaces",
        "look at",
        "node2: eth0, MTU 1500; others: eth0, MTU 9000",
        on(4, 5, network=dataclasses.replace(NETWORK, mtu=1500)),
    ),
    (
        "interfaces",
        "look at",
        "127.0.1.1 on rank 1 on node0",
        on(1, network=dataclasses.replace(NETWORK, own_address="127.0.1.1")),
    ),
    ("cards", "broken", "ranks 0, 1 share a card", cards(rank1={"uuid": "uuid0"})),
    ("cards", "broken", "no card for rank 4", {**cards(), **on(4, card=None)}),
    ("cards", "look at", "rank 2 on node1: A100, 80.0 GiB", cards(rank2={"name": "A100"})),
    (
        "cards",
        "look at",
        "other processes hold up to 20.0 GiB of the cards of rank 3 on node1",
        cards(rank3={"taken": 20 * GIB}),
    ),
    (
        "compute",
        "broken",
        "rank 1 on node0: 30% of the median 1 TFLOP/s",
        {"compute": {r: [3e11 if r == 1 else 1e12] * 3 for r in ALL}},
    ),
    ("compute", "look at", "rank 1 on node0: 60%", {"compute": {r: [6e11 if r == 1 else 1e12] * 3 for r in ALL}}),
    (
        "places",
        "broken",
        "Ranks are not numbered node by node: rank 1",
        {f"rank{r}": {"host": f"node{r % 3}"} for r in ALL},
    ),
    ("places", "look at", "the launcher started 3 ranks a node, by the machines' names it is 2", on(*ALL, node_size=3)),
    (
        "shared memory",
        "broken",
        "1.0 MiB of 64.0 MiB free in /dev/shm (rank 2 on node1)",
        on(2, shared_memory=Folder("/dev/shm", 2**26, 2**20)),
    ),
    (
        "temporary files",
        "broken",
        "node2 cannot write: read only",
        on(4, 5, temporary=Folder("/tmp", 0, 0, "read only")),
    ),
    (
        "checkpoints",
        "broken",
        "node1, node2 cannot see in /somewhere what rank 0 wrote there",
        {"sees": {r: r < 2 for r in ALL}},
    ),
    (
        "checkpoints",
        "look at",
        "5.0 GiB of 100.0 GiB free in /full",
        on(0, checkpoints=Folder("/full", 100 * GIB, 5 * GIB)),
    ),
    ("ranks", "broken", "rank 4 on node2: OSError: no", {"errors": {4: "OSError: no"}}),
    (
        "ranks",
        "broken",
        "not done after 50 s: node1 exchanges messages with rank 9",
        {"places": WAITS, "seconds": 50.0},
    ),
]


@pytest.mark.parametrize(("name", "verdict", "words", "changes"), CASES)
def test_what_is_wrong_is_found_and_nothing_else(name: str, verdict: str, words: str, changes: dict[str, Any]) -> None:
    found = bad(findings(**changes))
    assert list(found) == [name]
    assert found[name].verdict == verdict and words in found[name].found and found[name].step


def test_harm_is_told_where_it_is_done() -> None:
    infiniband = dataclasses.replace(NETWORK, has_infiniband=True)
    off = {"variables": {"NCCL_IB_DISABLE": "1"}}
    assert bad(findings(**{f"rank{rank}": off for rank in range(6)})) == {}
    told = bad(findings(**{f"rank{rank}": {**off, "network": infiniband} for rank in range(6)}))["environment"]
    assert told.found == "NCCL_IB_DISABLE=1: InfiniBand adapters stay unused"


def test_missing_ranks_are_named_and_the_others_are_looked_at() -> None:
    whole = findings(rank0={"versions": {**VERSIONS, "torch": "2.11.0"}})
    told = {rank: found for rank, found in whole.facts.items() if rank != 3}
    found = bad(dataclasses.replace(whole, facts=told, compute={}, links={}))
    assert found["ranks"].found == "nothing was heard of rank 3 of 6"
    assert {name for name, check in found.items() if check.verdict == "broken"} == {"ranks", "versions"}
    assert found["compute"].found == found["links between nodes"].found == "not measured"


def test_a_load_that_passes_is_no_slow_card() -> None:
    passing = {rank: [1e12, 2e11 if rank == 1 else 1e12, 1e12] for rank in range(6)}
    assert bad(findings(compute=passing)) == {}
    kinds = {f"rank{rank}": card(rank, name="A100" if rank < 2 else "H100") for rank in range(6)}
    rates = {rank: [4e11 if rank < 2 else 1e12] * 3 for rank in range(6)}
    assert list(bad(findings(compute=rates, **kinds))) == ["cards"]  # different cards are not slow ones


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_slow_node_and_a_slow_pair_are_told_apart(count: int) -> None:
    pairs = list(itertools.combinations(range(count), 2))
    assert slow_links({pair: 1e9 * (1 + 0.02 * sum(pair)) for pair in pairs})[:2] == ({}, {})
    if count > 2:
        places, others, middle = slow_links({pair: 2e8 if 1 in pair else 1e9 for pair in pairs})
        assert (places, others, middle) == ({1: 0.2}, {}, 1e9)
        places, others, _ = slow_links({pair: 2e8 if pair == (0, 1) else 1e9 for pair in pairs})
        assert (places, others) == ({}, {(0, 1): 0.2})


def test_slow_links_are_told_by_node() -> None:
    told = bad(findings(links={(0, 1): 2e8, (1, 2): 2e8, (0, 2): 1e9}))["links between nodes"]
    assert told.verdict == "broken" and told.found == "node1: 20% of the median 1 GB/s"
    inside = {(0, 1): 1e11, (2, 3): 1e11, (4, 5): 2e10}
    assert bad(findings(inside=inside))["links in nodes"].found.startswith("rank 4 on node2: 20% of the median")


def test_a_node_is_as_fast_as_its_ranks_together() -> None:
    # Ranks 0 and 1 of one node with 2 and 3 of the other, whose clock is another one: first in turn, then together.
    own, other = [(0.0, 1.0), (9.0, 10.5)], [(1.0, 2.0), (9.0, 10.0)]
    theirs = [(50.0, 51.0), (59.0, 61.0)], [(51.0, 52.0), (59.0, 60.0)]
    times = [{2: own}, {3: other}, {0: theirs[0]}, {1: theirs[1]}]
    told = {rank: Exchanges(1000, dict(found)) for rank, found in enumerate(times)}
    assert pair_rates(told, lambda rank: rank // 2) == {(0, 1): 1000.0}
    assert pair_rates(told, lambda rank: rank)[0, 2] == 1000.0


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 200])
def test_everybody_meets_in_rounds(count: int) -> None:
    rounds = tournament(count)
    assert all(len({place for pair in pairs for place in pair}) == 2 * len(pairs) for pairs in rounds)
    met = [pair for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) and len(rounds) <= 31
    if count < 32:
        assert set(met) == set(itertools.combinations(range(count), 2))
    for place in range(count):
        assert [other for other in opponents(rounds, place) if other is not None] == [
            sum(pair) - place for pairs in rounds for pair in pairs if place in pair
        ]


def test_folders(tmp_path: Path) -> None:
    assert Folder.of(tmp_path / "new" / "folder").path == str(tmp_path)
    assert Folder.of(tmp_path).free > 0 and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert "Not a directory" in Folder.of(tmp_path / "file").problem


def test_launchers_that_say_half_of_it() -> None:
    assert not Launch.from_env({}).is_launched
    whole = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    assert Launch.from_env(whole) == Launch(1, 2, 0, 1, "a:5")
    with pytest.raises(MiCSConfigError, match=r"but not MASTER_ADDR, MASTER_PORT\. Start mics doctor by torchrun"):
        Launch.from_env({"RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(MiCSConfigError, match="no whole number"):
        Launch.from_env({**whole, "RANK": "x"})


def test_a_rank_that_does_not_reach_rank_0_is_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free, pytest.raises(RuntimeError, match="refused"):
        free.bind(("127.0.0.1", 0))  # nobody listens
        Launch(1, 2, 0, 1, f"127.0.0.1:{free.getsockname()[1]}").connect(0.0)
    assert capfd.readouterr() == ("", "")
