"""Experiments as files, what their contenders have to send at least, and how a run finds what is left to do."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lightning_mics.bench import contenders as contenders_module
from lightning_mics.bench import runner
from lightning_mics.bench.contenders import least_bytes, parse_contender
from lightning_mics.bench.experiments import Experiment, built_in_names, load_experiment, parse_experiment
from lightning_mics.bench.launch import NodeFailedError
from lightning_mics.bench.records import Case, Contender, Measurement, Record, append, read_results
from lightning_mics.bench.site import Site
from lightning_mics.bench.spec import ClusterSpec, parse_rate
from lightning_mics.bench.workload import ModelSpec, blocks_of, build_model, emulate_compute, microbatch
from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import ClusterTopology

TOPOLOGY = ClusterTopology(world_size=8, node_size=2)


def experiment(**changes: Any) -> Experiment:
    return parse_experiment({"nodes": [2], "layers": 2, "width": 64, **changes}, default_name="test")


def case(num_nodes: int = 4, accumulation: int = 4) -> Case:
    return experiment(nodes=[num_nodes], accumulation=[accumulation]).cases()[0]


def contender(word: str, topology: ClusterTopology = TOPOLOGY) -> Contender:
    parsed = parse_contender(word, topology)
    assert parsed is not None
    return parsed


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_experiment_of_the_package_can_run() -> None:
    assert {"headline", "one-node", "smoke"} <= set(built_in_names())
    for name in built_in_names():
        loaded = load_experiment(name)
        assert loaded.name == name and loaded.about.endswith(".")
        assert all(loaded.contenders_of(each) for each in loaded.cases())


def test_an_experiment_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("nodes: [2]\nrate: [1gbit]\ncontenders: [ddp]\n")
    loaded = load_experiment(str(path))
    assert (loaded.name, loaded.nodes, loaded.ranks) == ("mine", [2], 2)
    path.write_text("nodes: [2")
    with pytest.raises(MiCSConfigError, match=r"mine\.yaml.*is not YAML"):
        load_experiment(str(path))
    with pytest.raises(MiCSConfigError, match=r"'nothing' is neither .* Ours: .*headline, .*smoke"):
        load_experiment("nothing")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "must hold lines like 'nodes: "),
        ({"node": [2]}, r"Unknown setting 'node' .* Known: name, about, nodes,"),
        ({"name": 3}, r"name: 3 is not a text\. Try name: '3'"),
        ({"nodes": 2}, r"nodes: 2 is not a list .* Try nodes: \[2, 4\]"),
        ({"nodes": []}, r"nodes: \[\] is not a list with something in it"),
        ({"nodes": ["two"]}, r"nodes: 'two' is not a whole number of at least 1\. Try 2"),
        ({"nodes": [40]}, r"nodes: .*=40 must be from 1 to 32"),
        ({"ranks": 0}, r"ranks: 0 is not a whole number of at least 1\. Try 2"),
        ({"rounds": True}, "rounds: True is not a whole number"),
        ({"sequence": 1}, "sequence: 1 is not a whole number of at least 2"),
        ({"warmup": -1}, "warmup: -1 is not a whole number of at least 0"),
        ({"width": 100}, r"width: 100 must be a multiple of 64\. Try 64"),
        ({"rate": ["fast"]}, "rate: The rate 'fast' is not .*100mbit"),
        ({"rate": [5]}, "rate: A rate of 5 bit/s .* Try 100mbit"),
        ({"accumulation": [0]}, "accumulation: 0 is not a whole number"),
        ({"compute": [0.1, 0.2]}, r"compute: 0\.1 is not a pair .* \[\[0\.01, 0\.02\]\]"),
        ({"compute": [["a", "b"]]}, r"compute: \['a', 'b'\] is not a pair"),
        ({"compute": [[-1, 0]]}, r"compute: \[-1, 0\] is not a pair"),
        ({"device": "gpu"}, r"device: 'gpu' is unknown\. Try one of cpu, cuda"),
        ({"device": "cuda", "compute": [[0, 1]]}, r"compute: \[0, 1\] delays CPUs, .* Try compute: \[\[0, 0\]\]"),
        ({"contenders": "ddp"}, r"contenders: 'ddp' is not a list .* \['full-sharding', 'mics:node'\]"),
        ({"contenders": ["fsdp"]}, "contenders: 'fsdp' is unknown. Values that work: full-sharding, .*mics:N:flat"),
        ({"contenders": ["mics:3"]}, "contenders: 'mics:3' cannot work: .* Values that work on this cluster: 1, 2, 4"),
        ({"contenders": ["mics:99"]}, r"contenders: none of \['mics:99'\] fits .*mics:node"),
    ],
)
def test_errors_name_the_setting_and_a_value_that_works(values: object, message: str) -> None:
    with pytest.raises(MiCSConfigError, match=message):
        parse_experiment(values, default_name="test")


def test_an_experiment_is_a_grid_of_cases() -> None:
    rates = ["none", "100mbit"]
    cases = experiment(nodes=[1, 2], rate=rates, accumulation=[1, 4], compute=[[0, 0], [1, 2]]).cases()
    assert len(cases) == len(set(cases)) == 12  # one node has no links that could differ
    assert {(each.num_nodes, each.rate) for each in cases} == {(1, None), (2, None), (2, parse_rate("100mbit"))}
    assert {each.compute for each in cases} == {(0.0, 0.0), (1.0, 2.0)}
    clusters = [(each.num_nodes, each.rate) for each in cases]
    assert clusters == sorted(clusters, key=clusters.index)  # one cluster after another


# --- contenders -------------------------------------------------------------------------------------------------------


def test_contenders_that_a_cluster_cannot_hold_are_left_out() -> None:
    names = ["ddp", "mics:4:hierarchical", "mics:8", "mics:2:hierarchical", "mics:node", "mics:2"]
    grid = experiment(nodes=[1, 2, 4], contenders=names)
    labels = [[each.label for each in grid.contenders_of(each_case)] for each_case in grid.cases()]
    hierarchical = "MiCS p=4 hierarchical"
    assert labels == [
        ["DDP", "MiCS p=node"],
        ["DDP", hierarchical, "MiCS p=node"],
        ["DDP", hierarchical, "MiCS p=8 hierarchical", "MiCS p=node"],
    ]


@pytest.mark.parametrize(
    ("word", "shard_size", "hierarchical", "label"),
    [
        ("full-sharding", 8, False, "Full sharding"),
        ("mesh-2d", 2, False, "2-D mesh"),
        ("mesh-2d-no-sync", 2, False, "2-D mesh, no_sync"),
        ("ddp", 1, False, "DDP"),
        ("deepspeed-zero3", 8, False, "DeepSpeed ZeRO-3"),
        ("mics:1", 1, False, "MiCS p=1"),
        ("mics:node", 2, False, "MiCS p=node"),
        ("mics:2:flat", 2, False, "MiCS p=2"),
        ("mics:4", 4, True, "MiCS p=4 hierarchical"),
        ("mics:4:flat", 4, False, "MiCS p=4 flat"),
        ("mics:world", 8, True, "MiCS p=world hierarchical"),
        ("mics:node+world", 2, False, "MiCS p=node q=world"),
        ("mics:4+8:flat", 4, False, "MiCS p=4 q=8 flat"),
        ("full-sharding-node", 8, False, "Full sharding, hpZ"),
        ("ddp-zero1", 1, False, "DDP with ZeRO-1"),
        ("mics:4:flat:reshard_after_forward=false", 4, False, "MiCS p=4 flat, not resharded"),
        ("mics:2+8:replication_reduce_dtype=bfloat16", 2, False, "MiCS p=2 q=8, hop two in 16 bits"),
    ],
)
def test_words_for_contenders(word: str, shard_size: int, hierarchical: bool, label: str) -> None:
    parsed = contender(word)
    assert (parsed.name, parsed.shard_size) == (word.partition(":")[0], shard_size)
    assert (parsed.hierarchical, parsed.label) == (hierarchical, label)


@pytest.mark.parametrize(
    ("word", "size"), [("mics:2", None), ("mics:node+world", 8), ("mics:2+4", 4), ("mics:2+2", None), ("ddp-zero1", 8)]
)
def test_who_divides_optimizer_states(word: str, size: int | None) -> None:
    assert contender(word).optimizer_shard_size == size


def test_other_settings_are_those_of_the_strategy() -> None:
    parsed = contender("mics:2:reshard_after_forward=false:activation_checkpointing=true")
    assert parsed.settings == {"reshard_after_forward": False, "activation_checkpointing": True}
    assert parsed != contender("mics:2") and contender("mics:2").settings == {}
    for word in ("mics:2:reshard_after_forward=true", "mics:2:wrap=Block"):
        with pytest.raises(MiCSConfigError, match=r"no setting that is compared\. Values that work: mics:2:reshard"):
            contender(word)


def test_states_that_cannot_be_divided_so_are_named() -> None:
    with pytest.raises(MiCSConfigError, match=r"contenders: 'mics:4\+6' cannot work: .*optimizer_shard_size=6"):
        contender("mics:4+6")


@pytest.mark.parametrize(
    "word",
    [
        "mics:2+",
        "mics:2+4+8",
        "mics:+8",
        "mics",
        "mics:",
        "mics:x",
        "mics:4:ring",
        "mics:4:flat:x",
        "mics:reshard_after_forward=false",
        "ddp:2",
        "MICS:2",
        "",
    ],
)
def test_words_that_name_no_contender(word: str) -> None:
    with pytest.raises(MiCSConfigError, match=r"contenders: .* is unknown\. .*mics:"):
        parse_contender(word, TOPOLOGY)


# Four nodes of two ranks, 8000 bytes of blocks and 800 around them, four microsteps: a step gathers
# 4 * (2 * 8000 + 800) = 67200 bytes, and reduces 8800 bytes each time.
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("full-sharding", (67200 + 4 * 8800) * 7 / 8),
        ("mesh-2d", 4 * 2 * (2 * 3 / 4 * 4400)),  # on each node two rings of four replicas, every microstep
        ("mesh-2d-no-sync", 2 * (2 * 3 / 4 * 4400)),
        ("ddp", 2 * 7 / 8 * 8800),  # one ring of eight, with one link out of each node
        ("mics:2", 2 * (2 * 3 / 4 * 4400)),
        ("mics:4:flat", (67200 + 4 * 8800) * 3 / 4 + 2 * (2 * 1 / 2 * 2200)),
        ("mics:4:hierarchical", (67200 + 4 * 8800) * 2 / 4 + 2 * (2 * 1 / 2 * 2200)),
        ("mics:2+8", 2 * (2 * 3 / 4 * 4400)),  # a reduce-scatter and a gather are an all-reduce
        ("full-sharding-node", (4 * (8000 + 800) + 4 * 8800) * 7 / 8),  # gathered out of a node once
        ("ddp-zero1", 3 * 7 / 8 * 8800),
        ("mics:4:flat:reshard_after_forward=false", (4 * (8000 + 800) + 4 * 8800) * 3 / 4 + 2 * (2 * 1 / 2 * 2200)),
        ("mics:2+8:replication_reduce_dtype=bfloat16", 2 * (1.5 * 3 / 4 * 4400)),  # the gather is in 32 bits
    ],
)
def test_the_least_bytes_that_leave_a_node(word: str, expected: float) -> None:
    assert least_bytes(case(), contender(word), block_bytes=8000, root_bytes=800) == expected


@pytest.mark.parametrize("word", ["full-sharding", "mesh-2d", "mesh-2d-no-sync", "ddp", "mics:2", "mics:1"])
def test_nothing_has_to_leave_the_only_node(word: str) -> None:
    alone = contender(word, ClusterTopology(world_size=2, node_size=2))
    assert least_bytes(case(num_nodes=1), alone, block_bytes=8000, root_bytes=800) == 0


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "width", "sequence"), [(1, 64, 16), (3, 128, 8), (2, 48, 32)])
def test_the_parameters_of_a_case_are_those_of_its_model(layers: int, width: int, sequence: int) -> None:
    model = build_model(ModelSpec(layers=layers, width=width, sequence=sequence))
    (found,) = experiment(layers=layers, width=width, sequence=sequence).cases()
    assert found.model["num_parameters"] == sum(param.numel() for param in model.parameters())
    assert blocks_of(model) == list(model.transformer.h) and found.num_blocks == layers


def test_ranks_and_microsteps_see_different_text() -> None:
    spec = ModelSpec(sequence=16)
    batches = [microbatch(spec, 2, number, rank, world_size=4) for number in range(3) for rank in range(4)]
    assert all(batch.shape == (2, 16) for batch in batches)
    assert len({tuple(row.tolist()) for batch in batches for row in batch}) == 24


def gradients(seconds: tuple[float, float] | None, note: Callable[[float], None]) -> list[torch.Tensor]:
    spec = ModelSpec(layers=3, width=64)
    model = build_model(spec)
    if seconds is not None:
        emulate_compute(model, lambda: seconds, note)
    batch = microbatch(spec, 1, 0, 0, 1)
    model(input_ids=batch, labels=batch).loss.backward()
    return [param.grad for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("seconds", [(0.0, 0.0), (0.01, 0.03)])
def test_emulated_compute_waits_in_each_block_and_changes_no_gradient(seconds: tuple[float, float]) -> None:
    waits: list[float] = []
    emulated, plain = gradients(seconds, waits.append), gradients(None, waits.append)
    assert len(waits) == 6
    assert all(wait >= seconds[0] for wait in waits[:3]) and all(wait >= seconds[1] for wait in waits[3:])
    assert len(emulated) == len(plain)
    assert all(torch.equal(one, other) for one, other in zip(emulated, plain, strict=True))


# --- running ----------------------------------------------------------------------------------------------------------


def record(item: Measurement, status: str = "ok") -> Record:
    return item.record({}, status)


def screen() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_goes_on_with_what_its_results_lack(tmp_path: Path) -> None:
    asked, results = experiment(contenders=["ddp", "mics:2"], rounds=2), tmp_path / "results.jsonl"
    everything = runner._remaining(asked, Site(), [])
    assert [(item.contender.name, item.round) for item in everything] == [
        ("ddp", 0),
        ("mics", 0),
        ("ddp", 1),
        ("mics", 1),
    ]
    append(results, record(everything[0]))
    append(results, record(everything[1], "failed"))
    append(results, record(everything[2], "skipped"))
    with results.open("a") as file:
        file.write('{"format": 1, "ru')  # what a killed run leaves
    assert runner._remaining(asked, Site(), read_results(results)) == [everything[1], everything[3]]
    # More rounds add to those that are there, and so do other conditions; the number of steps is none.
    assert len(runner._remaining(experiment(contenders=["ddp"], rounds=2, steps=1), Site(), read_results(results))) == 0
    assert len(runner._remaining(experiment(contenders=["ddp"], width=128), Site(), read_results(results))) == 3
    assert len(runner._remaining(experiment(contenders=["ddp"], rounds=3), Site(), read_results(results))) == 1


def test_a_contender_without_its_package_is_skipped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = contenders_module._version
    missing = "(not installed)"
    monkeypatch.setattr(contenders_module, "_version", lambda name: missing if name == "deepspeed" else real(name))
    asked, results = experiment(contenders=["deepspeed-zero3"], rounds=2), tmp_path / "new" / "results.jsonl"
    runner.run_experiment(asked, results, screen())
    written = read_results(results)
    assert [(each.status, each.round) for each in written] == [("skipped", 0), ("skipped", 1)]
    assert all("pip install" in str(each.error) for each in written)
    console = screen()
    runner.run_experiment(asked, results, console)
    assert "has all of it already. --fresh measures again." in shown(console)
    assert len(read_results(results)) == 2
    runner.run_experiment(asked, results, screen(), fresh=True)
    assert len(read_results(results)) == 4


class FakeCluster:
    """Stands for an emulated cluster, whose folder is all that the runner uses itself."""

    folder = Path()

    def __init__(self, spec: ClusterSpec, shared_memory: bool) -> None:
        assert not shared_memory
        self.spec = spec

    def __enter__(self) -> FakeCluster:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@contextmanager
def failing_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *attempts: int | None) -> Iterator[list[Path]]:
    """Makes each attempt fail where it is told to, or get to its end with -1; yields the folders of the logs."""
    left, logs = list(attempts), []

    def run_on_cluster(cluster: FakeCluster, arguments: list[str], log_dir: Path, on_poll: Any, **_: Any) -> None:
        logs.append(log_dir)
        place = left.pop(0)
        if place == -1:
            return
        if place is not None:
            (tmp_path / "current").write_text(str(place))
            on_poll()
        raise NodeFailedError("Rank 1 on node 0 failed. Logs: somewhere")

    monkeypatch.setattr(FakeCluster, "folder", tmp_path)
    monkeypatch.setattr(runner, "EmulatedCluster", FakeCluster)
    monkeypatch.setattr(runner, "run_on_cluster", run_on_cluster)
    yield logs
    assert not left


def test_who_fails_is_recorded_and_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, results = experiment(contenders=["full-sharding", "ddp", "mics:2"]), tmp_path / "results.jsonl"
    console = screen()
    with failing_at(monkeypatch, tmp_path, 1, 3, -1) as logs:
        runner.run_experiment(asked, results, console)
    # After DDP in the first round come MiCS, full sharding, MiCS, full sharding (which fails), MiCS.
    failed = [(each.contender.name, each.round, each.status) for each in read_results(results)]
    assert failed == [("ddp", 0, "failed"), ("full-sharding", 2, "failed")]
    assert all(str(each.error).endswith("name a folder with --log-dir)") for each in read_results(results))
    assert [path.relative_to(tmp_path).parts for path in logs] == [("logs", "0"), ("logs", "1"), ("logs", "2")]


def test_logs_are_left_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, results = experiment(contenders=["ddp"], rounds=1), tmp_path / "results.jsonl"
    with failing_at(monkeypatch, tmp_path, 0) as logs:
        runner.run_experiment(asked, results, screen(), log_dir=tmp_path / "mine")
    assert logs == [tmp_path / "mine" / "test-0" / "0"]
    assert "--log-dir" not in str(read_results(results)[0].error)


@pytest.mark.parametrize("place", [None, 3], ids=["before the first", "after the last"])
def test_a_failure_that_is_nobodys_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int | None
) -> None:
    asked, results = experiment(contenders=["ddp"]), tmp_path / "results.jsonl"
    with (
        failing_at(monkeypatch, tmp_path, place),
        pytest.raises(NodeFailedError, match="Rank 1 on node 0 failed"),
    ):
        runner.run_experiment(asked, results, screen())
    assert not results.exists()
