"""Results files of the benchmarks and what is computed from them, against numbers worked out by hand."""

from __future__ import annotations

import io
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_mics.bench.conditions import own_conditions, shared_conditions
from lightning_mics.bench.findings import headlines, limit_lines, wins_and_losses
from lightning_mics.bench.records import Case, Contender, Record, ResultsError, append, read_results
from lightning_mics.bench.report import print_report, write_report
from lightning_mics.bench.summary import Spread, along, communication_share, efficiency, failures, summarise
from lightning_mics.bench.tables import comparison_grid, comparison_tables, efficiency_grid, loss_grid
from lightning_mics.errors import MiCSError

CASE = Case(
    num_nodes=2,
    node_size=2,
    rate=80_000_000,
    accumulation=4,
    compute=(0.0, 0.0),
    model={"name": "gpt", "num_layers": 2, "width": 64, "num_parameters": 1_500_000},
    microbatch_size=1,
    num_blocks=2,
    experiment="headline",
)
FULL = Contender(name="full-sharding", label="Full sharding", shard_size=4, hierarchical=False, stack="Trainer")
DDP = Contender(name="ddp", label="DDP", shard_size=1, hierarchical=False, stack="Trainer")
MICS = Contender(name="mics", label="MiCS p=2", shard_size=2, hierarchical=False, stack="Trainer")
FLAT = Contender(name="mics", label="MiCS p=4 flat", shard_size=4, hierarchical=False, stack="Trainer")
STAGED = Contender(name="mics", label="MiCS p=4", shard_size=4, hierarchical=True, stack="Trainer")
RUN = {"id": "a", "date": "2026-01-02T03:04:05", "versions": {"torch": "2.13.0"}, "python": "3.11", "num_cpus": 2}


def record(contender: Contender, *seconds: float, case: Case = CASE, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "run": RUN,
        "case": case,
        "contender": contender,
        "round": 0,
        "status": "ok",
        "step_seconds": list(seconds),
        "losses": [4.0, 2.0],
        "sent_bytes": [110.0, 130.0],
        "minimum_bytes": 100.0,
        "samples": 16,
    }
    return Record(**(values | changes))


def headline() -> list[Record]:
    """Flat is faster than two-stage, DDP faster than all, and one of ours only as good as full sharding."""
    return [
        record(FULL, 4.0, sent_bytes=[900.0, 900.0], minimum_bytes=880.0),
        record(DDP, 0.5),
        record(MICS, 1.0, sent_bytes=[90.0, 90.0], ledger_bytes=80.0),
        record(FLAT, 2.0),
        record(STAGED, 3.9),
    ]


class TestResultsFile:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "new" / "results.jsonl"
        for written in headline():
            append(path, written)
        return path

    def test_round_trip(self, path: Path):
        back = read_results(path)
        assert back == headline()
        assert {entry.key() for entry in back} == {entry.key() for entry in headline()}
        assert isinstance(back[0].case.compute, tuple)

    def test_a_line_that_a_killed_run_left_is_ignored_and_then_replaced(self, path: Path):
        path.write_bytes(path.read_bytes()[:-30])
        assert read_results(path) == headline()[:-1]
        append(path, headline()[-1])
        assert read_results(path) == headline()

    def test_a_whole_last_line_without_its_end_is_kept(self, path: Path):
        path.write_bytes(path.read_bytes()[:-1])
        assert read_results(path) == headline()
        append(path, headline()[0])
        assert read_results(path) == [*headline(), headline()[0]]

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            (b'{"format"', b'{"form', "Expecting|delimiter|Unterminated"),
            (b'"format": 1', b'"format": 2', "reads format 1"),
            (b'"status": "ok"', b'"status": "fine"', "status is 'fine', not one of ok, failed, skipped"),
            (b'"round": 0', b'"round": "zero"', "round is 'zero'"),
            (b'"round": 0', b'"lap": 0', "a record has the wrong fields: lap, round missing or new"),
            (b'"step_seconds": [0.5]', b'"step_seconds": [null]', r"step_seconds is \[None\]"),
            (b'"num_nodes": 2', b'"num_nodes": true', "num_nodes is True"),
        ],
    )
    def test_a_damaged_line_is_named(self, path: Path, old: bytes, new: bytes, message: str):
        lines = path.read_bytes().split(b"\n")
        assert old in lines[1]
        lines[1] = lines[1].replace(old, new)
        path.write_bytes(b"\n".join(lines))
        with pytest.raises(ResultsError, match=rf"line 2: the line is damaged: .*({message})"):
            read_results(path)

    def test_bytes_that_are_no_text_are_damage(self, path: Path):
        path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
        with pytest.raises(MiCSError, match="line 1: the line is damaged"):
            read_results(path)

    def test_missing_and_empty(self, tmp_path: Path):
        with pytest.raises(ResultsError, match="cannot be read"):
            read_results(tmp_path / "none")
        (tmp_path / "empty").touch()
        with pytest.raises(ResultsError, match="there is no measurement"):
            print_report(tmp_path / "empty", Console())

    def test_equality_is_what_a_resumed_run_needs(self):
        same = replace(CASE, compute=(0, 0), model=dict(reversed(CASE.model.items())))
        assert same == CASE and same.key() == CASE.key() and hash(same) == hash(CASE)
        assert replace(CASE, rate=None).key() != CASE.key()
        assert replace(MICS, label="another") == MICS
        assert replace(MICS, stack="another") != MICS


class TestAggregation:
    def test_numbers_worked_out_by_hand(self):
        (summary,) = summarise(
            [
                record(MICS, 1.0, 2.0, 4.0, hop_seconds={"compute": 3.0, "partition gather": 1.0}, gradient_bytes=5.0),
                record(MICS, 3.0, 10.0, round=1, hop_seconds={"compute": 5.0, "partition gather": 3.0}),
            ]
        )
        assert summary.rounds == 2
        assert summary.step_seconds == Spread(2.0, 3.0, 4.0)
        assert summary.throughput == pytest.approx(16 / 3)
        assert summary.sent_bytes == 120.0  # of 110, 130, 110, 130
        assert summary.of_minimum == pytest.approx(1.2)
        assert summary.of_ledger is None
        assert summary.floor_seconds == pytest.approx(100 * 8 / 80_000_000)
        assert summary.hop_seconds == {"compute": 4.0, "partition gather": 2.0}
        assert communication_share(summary) == pytest.approx(2 / 6)
        assert summary.gradient_bytes == 5.0

    def test_what_is_not_known_is_none(self):
        (summary,) = summarise(
            [record(DDP, 1.0, case=replace(CASE, rate=None), sent_bytes=[], hop_seconds={"other": 1})]
        )
        assert summary.step_seconds == Spread(1.0, 1.0, 1.0)
        assert summary.sent_bytes is summary.of_minimum is summary.floor_seconds is communication_share(summary) is None

    def test_the_last_measurement_of_a_round_counts(self):
        records = [record(MICS, status="failed", error="no\n  memory"), record(MICS, 7.0), record(MICS, 5.0)]
        assert [summary.step_seconds.median for summary in summarise(records)] == [5.0]
        assert failures(records) == []

    def test_failures(self):
        records = [record(DDP, status="failed", error="no\n  memory", round=number) for number in range(3)]
        (failure,) = failures([*records, record(FULL, 1.0)])
        assert (failure.contender, failure.status, failure.reason, failure.rounds) == (DDP, "failed", "no memory", 3)

    def test_losses(self):
        other, broken = record(DDP, 1.0, losses=[4.0, 2.01]), record(FLAT, 1.0, losses=[4.0, float("nan")])
        summaries = summarise([record(FULL, 1.0), other, broken, record(MICS, 1.0, losses=[4.00004, 2.0])])
        differences = {summary.contender.label: summary.loss_difference for summary in summaries}
        assert differences["Full sharding"] == 0
        assert differences["DDP"] == pytest.approx(0.005)
        assert [row[-1] for row in loss_grid(summaries).rows] == ["yes", "no", "no", "yes"]

    def test_contenders_keep_their_order_in_each_case(self):
        wider = replace(FULL, shard_size=8)
        large = replace(CASE, num_nodes=4)
        records = [record(wider, 1.0, case=large), record(MICS, 1.0, case=large), record(MICS, 1.0), record(FULL, 1.0)]
        labels = [(summary.case.num_nodes, summary.contender.label) for summary in summarise(records)]
        assert labels == [(2, "Full sharding"), (2, "MiCS p=2"), (4, "Full sharding"), (4, "MiCS p=2")]


class TestTables:
    def test_comparison(self):
        grid = comparison_grid(summarise(headline()))
        assert grid.header[4] == "x of Full sharding"
        rows = {row[0]: row[1:] for row in grid.rows}
        assert rows["MiCS p=2"][:8] == ["1", "1-1", "16", "4.00", "90 B", "0.90", "1.125", "0.0000100"]
        assert rows["DDP"][3] == "8.00"
        parts = [part.renderables for part in comparison_tables(summarise(headline()))]
        assert [[table.row_count for table in tables] for tables in parts] == [[5], [5], [5]]

    def test_numbers_stay_in_sight_at_80_columns(self):
        emulated = [replace(CASE, compute=(0.02, 0.04)), replace(CASE, compute=(0.1, 0.2), memory=10)]
        long = replace(STAGED, label="MiCS p=4 q=8 hierarchical")
        measured = {"sent_bytes": [123.4e6], "ledger_bytes": 101.2e6, "minimum_bytes": 1e8, "gradient_bytes": 12.3e6}
        measured |= {"state_bytes": 12.3e6, "process_bytes": 123.4e6}
        records = [record(each, 1.234, case=case, **measured) for case in emulated for each in (FULL, DDP, MICS, long)]
        console = Console(record=True, width=80, file=io.StringIO())
        for part in comparison_tables(summarise(records)):
            console.print(part)
        text = console.export_text()
        assert text.count(" 1.23-1.23 ") == 8 and "…" not in text and max(map(len, text.splitlines())) <= 80
        assert text.count("emulated compute of 20 ms forward and 40 ms backward a block and microstep") == 3
        first = [line for line in text.splitlines() if line.startswith("│")]
        assert len({tuple(place for place, sign in enumerate(line) if sign == "│") for line in first[:8]}) == 1

    def test_who_needs_more_than_the_limit_is_out_of_competition(self):
        limited = replace(CASE, memory=100)
        records = [
            record(FULL, 4.0, case=limited, state_bytes=40.0, gradient_bytes=20.0),
            record(STAGED, 2.0, case=limited, state_bytes=60.0, gradient_bytes=40.0),
            record(MICS, 1.0, case=limited, state_bytes=61.0, gradient_bytes=40.0),
            record(DDP, 1.5, case=limited),  # not counted
        ]
        summaries = summarise(records)
        assert [summary.competes for summary in summaries] == [True, True, False, True]
        assert headlines(summaries)[0].startswith("MiCS p=4 has 2.00 times the throughput of Full sharding")
        assert limit_lines(summaries) == [
            "* Over the limit of 100 B of model states a rank, out of competition: MiCS p=2 (101 B)."
        ]
        cells = [dict(zip(grid.header, row, strict=True)) for grid in [comparison_grid(summaries)] for row in grid.rows]
        assert [each["model states"] for each in cells] == ["60 B", "100 B", "101 B*", "-"]
        assert "at most 100 B of model states a rank" in headlines(summaries)[0]
        assert not limit_lines(summarise(headline()))

    def test_without_full_sharding_the_first_is_the_reference(self):
        assert [row[4] for row in comparison_grid(summarise(headline()[1:3])).rows] == ["1.00", "0.50"]

    def test_efficiency(self):
        cases = [replace(CASE, num_nodes=nodes, experiment="weak-scaling") for nodes in (1, 2, 4)]
        records = [
            record(replace(FULL, shard_size=2 * case.num_nodes), case.num_nodes, case=case, samples=8 * case.num_nodes)
            for case in cases
        ]
        records += [record(MICS, 1.25, case=case, samples=8 * case.num_nodes) for case in cases[1:]]
        (group,) = along(summarise(records), "num_nodes")
        assert efficiency(group) == {"Full sharding": {1: 1.0, 2: 0.5, 4: 0.25}, "MiCS p=2": {2: 1.0, 4: 1.0}}
        assert efficiency_grid(group).rows == [
            ["Full sharding", "100.0%", "50.0%", "25.0%"],
            ["MiCS p=2", "-", "100.0%", "100.0%"],
        ]

    def test_along_keeps_cases_apart_that_differ_in_more(self):
        cases = [CASE, replace(CASE, num_nodes=4), replace(CASE, num_nodes=8, accumulation=1)]
        (group,) = along(summarise([record(MICS, 1.0, case=case) for case in cases]), "num_nodes")
        assert [summary.case.num_nodes for summary in group] == [2, 4]

    def test_conditions(self):
        other = replace(CASE, rate=None)
        assert own_conditions(other, [CASE, other]) == "links not limited"
        assert own_conditions(CASE, [CASE]) == ""
        assert shared_conditions([CASE]).startswith(
            "2 nodes x 2 ranks, 80 Mbit/s a node, 4 microsteps a step, real compute only, "
            "gpt (2 layers, width 64, 1.50 M parameters)"
        )


class TestFindings:
    def test_wins_draws_and_losses(self):
        found = {
            (finding.ours.label, finding.other.label): (finding.verdict, finding.times)
            for finding in wins_and_losses(summarise(headline()))
        }
        assert found == {
            ("MiCS p=2", "Full sharding"): ("win", 4.0),
            ("MiCS p=4 flat", "Full sharding"): ("win", 2.0),
            ("MiCS p=4", "Full sharding"): ("draw", pytest.approx(4 / 3.9)),
            ("MiCS p=2", "DDP"): ("loss", 0.5),
            ("MiCS p=4 flat", "DDP"): ("loss", 0.25),
            ("MiCS p=4", "DDP"): ("loss", pytest.approx(0.5 / 3.9)),
            ("MiCS p=4", "MiCS p=4 flat"): ("loss", pytest.approx(2 / 3.9)),
        }

    def test_headline(self):
        assert headlines(summarise(headline())) == [
            "MiCS p=2 has 4.00 times the throughput of Full sharding and sends 10.0% of its bytes out of a node "
            "(2 nodes x 2 ranks, 80 Mbit/s a node, 4 microsteps a step, real compute)."
        ]
        assert headlines(summarise(headline()[2:])) == []


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    scaling = [replace(CASE, num_nodes=nodes, experiment="weak-scaling") for nodes in (1, 2)]
    records = [replace(entry, hop_seconds={"compute": 1.0, "partition gather": 0.5}) for entry in headline()]
    records += [record(MICS, 2.0, case=case, samples=8 * case.num_nodes) for case in scaling]
    skipped = replace(DDP, name="deepspeed-zero3", label="DeepSpeed")
    records.append(record(skipped, status="skipped", error="deepspeed is not installed"))
    for entry in records:
        append(path, entry)
    return path


def test_printed_report(results: Path):
    console = Console(width=250, record=True, file=io.StringIO())
    print_report(results, console)
    text = console.export_text()
    assert "Slower than flat collectives, MiCS p=4 flat, in times its throughput: MiCS p=4 0.51" in text
    assert "About as fast as Full sharding, in times its throughput: MiCS p=4 1.03" in text
    assert "Weak scaling" in text
    assert "DeepSpeed skipped in 1 round" in text and "deepspeed is not installed" in text


def test_written_report(results: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    page, *figures = write_report([results], tmp_path / "new" / "out")
    text = page.read_text()
    assert "| MiCS p=2 | 1 | 1-1 | 16 | 4.00 | 90 B | 0.90 | 1.125 |" in text
    assert "- Measured on 2026-01-02 with 2 CPUs, Python 3.11, torch 2.13.0." in text
    assert "- DeepSpeed skipped in 1 round" in text
    assert "| MiCS p=2 | 100.0% | 100.0% |" in text
    names = {figure.name for figure in figures if figure.suffix == ".svg"}
    assert names == {
        "headline-step-time.svg",
        "headline-bytes.svg",
        "headline-hops.svg",
        "headline-shard-size.svg",
        "weak-scaling-scaling.svg",
    }
    assert all(f"({name})" in text for name in names)
    assert all(figure.stat().st_size > 1000 for figure in figures) and len(figures) == 2 * len(names)


def test_svg_files_are_reproducible_and_keep_their_text(results: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    first, second = (write_report([results], tmp_path / name) for name in ("first", "second"))
    assert [path.read_bytes() for path in first if path.suffix == ".svg"] == [
        path.read_bytes() for path in second if path.suffix == ".svg"
    ]
    assert ">MiCS p=4 flat<" in (tmp_path / "first" / "headline-step-time.svg").read_text()


def test_without_matplotlib_nothing_is_written(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MiCSError, match=r"pip install 'lightning-mics\[bench\]'"):
        write_report([results], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_field_of_a_record_is_written():
    assert set(asdict(record(MICS, 1.0))) == set(Record.__dataclass_fields__)
