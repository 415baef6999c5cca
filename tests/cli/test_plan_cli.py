"""``mics plan`` from its words to its screen, its files and its exit code."""

import argparse
import dataclasses
import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from plan_examples import make_cluster, make_profile

from lightning_mics.accelerate.launch_file import check_launch_file
from lightning_mics.bench.calibration import Calibration
from lightning_mics.cli import main
from lightning_mics.cli.plan import answer, configure
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.hardware import Host, find_instance, load_cluster
from lightning_mics.trace.links import LinkFit, Measurement

HARDWARE = ["--instance", "p4d.24xlarge", "--nodes", "2"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_trace(monkeypatch):
    """Plans with a profile made by hand, whatever the name of the model."""
    monkeypatch.setattr("lightning_mics.trace.planning.profile_of", lambda *_: make_profile())


def run(capsys, *words, model="gpt2", hardware=HARDWARE):
    code = main(["plan", *(["--model", model] if model else []), *hardware, *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Runs as a user would start them.


def test_a_known_model_on_a_known_instance(capsys):
    code, out, err = run(capsys, "--global-batch", 64, "--top", 3, "--accumulation", 4, "--write")
    assert code == 0, err
    assert "gpt2: 124 M parameters, 12 blocks" in out and "2 nodes x 8 A100-40GB (p4d.24xlarge)" in out
    assert "1,024 tokens each (assumed" in out and out.count("assumed") == 1
    assert max(map(len, out.partition("trainer =")[0].splitlines())) <= 80
    settings = check_launch_file("mics.yaml")
    assert (settings.num_machines, settings.num_processes) == (2, 16)
    variables = "MICS_OPTIMIZER_SHARD_SIZE=world MICS_MASTER_WEIGHTS=owners"
    assert f"Wrote mics.yaml. Start a script with it: {variables} accelerate launch" in out


def test_an_own_model_on_an_own_cluster_as_json(capsys):
    Path("own_model.py").write_text("from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(8, 8))\n")
    Path("my.yaml").write_text("instance: g5.48xlarge\nnum_nodes: 3\n")
    code, out, err = run(capsys, "--json", model="own_model:build", hardware=["--cluster", "my.yaml"])
    assert code == 0, err
    answer = json.loads(out)
    assert answer["cluster"]["num_nodes"] == 3 and answer["profile"]["numel"] == 72
    code, out, err = run(capsys, "--json", model="own_model:build", hardware=["--cluster", "my.yaml", "--nodes", "2"])
    assert json.loads(out)["cluster"]["num_nodes"] == 2


def test_a_command_of_its_own_and_of_the_module():
    done = subprocess.run(
        [sys.executable, "-m", "lightning_mics", "plan", "--model", "gpt2"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mics: The hardware is missing.") and done.stderr.count("\n") == 1


def test_the_list_of_commands_does_not_load_torch():
    code = (
        "import sys\nfrom lightning_mics.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "plan" in done.stdout


def test_the_help_is_in_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for words in ("what to train:", "hardware:", "settings to fix:", "output:", "examples:", "--reshard-after-forward"):
        assert words in out


def test_what_is_known_is_listed(capsys):
    assert main(["plan", "--list"]) == 0
    out = capsys.readouterr().out
    for words in ("gpt2-xl", "p4d.24xlarge", "8 x A100-40GB", "A100-80GB", "efa-400"):
        assert words in out


# Outputs.


@pytest.mark.usefixtures("no_trace")
def test_json_on_the_screen_is_alone(capsys):
    code, out, err = run(capsys, "--json", "-", "--write", "a.yaml")
    assert code == 0
    assert json.loads(out)["profile"]["name"] == "stack"
    assert "Wrote a.yaml" in err


@pytest.mark.usefixtures("no_trace")
def test_json_in_a_file_comes_beside_the_screen(capsys):
    code, out, _ = run(capsys, "--json", "all.json", "--events")
    assert code == 0 and "What fits" in out and "Wrote all.json" in out
    assert json.loads(Path("all.json").read_text())["plans"][0]["time"]["events"]


@pytest.mark.usefixtures("no_trace")
def test_several_files_of_several_formats(capsys):
    words = ["--write", "a.yaml", "--format", "lightning", "--write", "b.yaml", "--format", "mics"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "trainer:" in Path("a.yaml").read_text() and "\nshard_size: " in Path("b.yaml").read_text()
    assert "fit --config a.yaml" in out and "MiCSConfig.from_yaml('b.yaml')" in out


@pytest.mark.usefixtures("no_trace")
def test_figures_go_where_they_are_asked_for(capsys):
    pytest.importorskip("matplotlib")
    code, out, _ = run(capsys, "--plot", "figures")
    assert code == 0 and "Drew figures/scaling.png, figures/sensitivity.png, figures/timeline.png, f" in out
    code, out, _ = run(capsys, "--plot", "plan.svg")
    assert code == 0 and Path("plan.svg").read_text().startswith("<?xml")


@pytest.mark.usefixtures("no_trace")
def test_what_differs_from_a_model_is_said_written_and_asked_for_again(capsys):
    words = ["--loss-chunks", 8, "--lora-rank", 16, "--lora-targets", "q_proj", "v_proj", "--optimizer", "AdamW8bit"]
    words += ["--compile-gain", 1.2, "--no-hold-outputs", "--activation-checkpointing", "selective"]
    code, out, err = run(
        capsys, *words, "--report", "--write", "--write", "my.yaml", "--format", "accelerate", "--format", "mics"
    )
    assert code == 0, err
    said = (
        "bf16-mixed, AdamW8bit, LoRA of rank 16, loss in 8 chunks, blocks compiled, 1.2 times as fast, outputs dropped"
    )
    assert said in " ".join(out.split())
    asked = (
        "--loss-chunks 8 --lora-rank 16 --lora-targets q_proj v_proj --compile-gain 1.2 --no-hold-outputs --instance"
    )
    page = Path("plan.html").read_text()
    assert asked in page and "--activation-checkpointing selective" in page
    assert "MICS_ACTIVATION_CHECKPOINTING=selective" in out
    assert yaml.safe_load(Path("my.yaml").read_text())["activation_checkpointing"] == "selective"


@pytest.mark.usefixtures("no_trace")
def test_a_base_of_few_bits_is_said_written_and_asked_for_again(capsys):
    words = ["--lora-rank", 16, "--base-bits", 4, "--double-quantization"]
    code, out, err = run(capsys, *words, "--report", "--json", "plan.json")
    assert code == 0, err
    assert "AdamW, LoRA of rank 16, a base of 4 bits (scales quantized, too)" in " ".join(out.split())
    page = Path("plan.html").read_text()
    assert "NF4, and for each 64 weights a scale of 8 bits, of which 256 share one of 32; gathered as stored" in page
    assert "--lora-rank 16 --base-bits 4 --double-quantization --instance" in page
    variant = json.loads(Path("plan.json").read_text())["training"]["variant"]
    assert (variant["base_bits"], variant["double_quantization"]) == (4, True)


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--base-bits", 4], "weights that are not trained, and all are. Add lora_rank=16"),
        (["--base-bits", 3, "--freeze", "h"], "base_bits=3 is not one of None, 4, 8"),
        (["--double-quantization", "--lora-rank", 4], "base_bits=None. Set base_bits=4, or leave it out"),
    ],
)
def test_a_base_of_few_bits_that_cannot_be_is_refused(words, says, capsys):
    code, _, err = run(capsys, *words)
    assert code == 2 and says in " ".join(err.split())


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize("how", ["some", "0", "-2"])
def test_recomputation_is_refused_by_name(how, capsys):
    code, _, err = run(capsys, f"--activation-checkpointing={how}")
    assert code == 2 and f"--activation-checkpointing {how} is unknown. Values that work: all, selective, none" in err


@pytest.mark.usefixtures("no_trace")
def test_a_page_is_written_with_the_command_that_asked_for_it(capsys):
    words = ["--global-batch", 64, "--shard-size", "node", "--no-reshard-after-forward", "--rank", "throughput"]
    code, out, _ = run(capsys, *words, "--report")
    assert code == 0 and "Wrote plan.html: open it in a browser." in out
    page = Path("plan.html").read_text()
    asked = "mics plan --model gpt2 --global-batch 64 --instance p4d.24xlarge --nodes 2 --shard-size node"
    assert f"{asked} --no-reshard-after-forward --rank throughput --report plan.html" in page
    assert "--shard-size 8 --no-activation-checkpointing --no-reshard-after-forward --rank throughput --write" in page
    code, _, err = run(capsys, "--memory-limit", "100 MiB", "--report", "none.html")
    assert code == 2 and "does not fit" in err and "too much" in Path("none.html").read_text()


def test_the_command_of_a_page_asks_the_same():
    parser = argparse.ArgumentParser()
    asked = configure(parser).args[0]
    given = {"lora_targets": ["q", "v*"], "freeze": ["a b"], "activation_checkpointing": "selective"}
    words = ["--no-reshard-after-forward", "--no-hold-outputs"]
    choices = {"master_weights": "owners", "hierarchical": "true", "rank": "throughput"}
    measuring = {"list", "measure", "calibrate", "save_cluster"}
    beside = {*measuring, "reshard_after_forward", "hold_outputs"}
    for name in asked.keys() - beside:
        value = (choices | given).get(name, 7)
        values = value if isinstance(value, list) else [] if asked[name] is False else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    options = parser.parse_args(words)
    assert all(getattr(options, name) != asked[name] for name in asked.keys() - measuring)
    again = shlex.split(answer._command(options, asked))
    assert again[:2] == ["mics", "plan"] and vars(parser.parse_args(again[2:])) == vars(options)
    options.save_cluster = Path("c.yaml")
    for options.measure, options.calibrate in ((True, False), (False, True)):
        measured = parser.parse_args(shlex.split(answer._command(options, asked, shard_size=2))[2:])
        assert (measured.cluster, measured.shard_size) == (Path("c.yaml"), 2)
        assert not any((measured.instance, measured.host, measured.measure, measured.calibrate))


@pytest.mark.usefixtures("no_trace")
def test_fixed_settings_reach_the_search(capsys):
    words = ["--shard-size", "world", "--hierarchical", "true", "--activation-checkpointing"]
    code, out, _ = run(capsys, *words, "--no-reshard-after-forward", "--memory-limit", "36 GiB", "--json")
    (plan,) = json.loads(out)["plans"]
    assert code == 0 and plan["memory_limit"] == 36 * 2**30
    assert plan["candidate"]["shard_size"] == 16 and plan["candidate"]["hierarchical"]
    assert plan["candidate"]["activation_checkpointing"] and not plan["candidate"]["reshard_after_forward"]


@pytest.mark.usefixtures("no_trace")
def test_where_nothing_fits_the_tables_come_before_the_error(capsys):
    code, out, err = run(capsys, "--memory-limit", "1 GiB", "--write", "--json", "all.json")
    assert code == 2
    assert "What does not fit into 1.0 GiB" in out and "MiB too much (" in out
    assert err.startswith("mics: stack does not fit into 1.0 GiB a rank") and err.count("\n") == 1
    assert not Path("mics.yaml").exists()
    assert json.loads(Path("all.json").read_text())["plans"] == []


# Mistakes.


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--shard-size", "3"], ["shard_size=3", "16 ranks", "1, 2, 4, 8, 16"]),
        (["--shard-size", "nod"], ["shard_size='nod'", "'node'"]),
        (["--nodes", "0"], ["--nodes=0", "--nodes=2"]),
        (["--top", "0"], ["--top=0"]),
        (["--global-batch", "100"], ["16 ranks", "100 / 16 = 6.25", "global_batch=96"]),
        (
            ["--global-batch", "64", "--micro-batch", "3", "--accumulation", "2"],
            ["16 ranks x micro_batch=3 x accumulation=2 = 96"],
        ),
        (["--micro-batch", "0"], ["--micro-batch=0"]),
        (["--precision", "bf16-mixd"], ["Did you mean 'bf16-mixed'?"]),
        (["--optimizer", "AdmW"], ["Did you mean 'AdamW'?"]),
        (["--memory-limit", "lots"], ["--memory-limit", "'lots'"]),
        (["--cluster", "my.yaml"], ["--instance and --cluster"]),
        (["--plot", "plan.pdf"], [".pdf is not known", "plan.png"]),
        (["--plot", "missing/plan.png"], ["no folder missing"]),
        (["--plot", "taken.yaml/figures"], ["taken.yaml is a file"]),
        (["--write", "taken.yaml"], ["taken.yaml exists", "--force"]),
        (["--write", "missing/mics.yaml"], ["no folder missing"]),
        (["--json", "taken.yaml"], ["taken.yaml exists", "--json"]),
        (["--report", "taken.yaml"], ["taken.yaml exists", "--report"]),
        (["--write", "a.yaml", "--json", "a.yaml"], ["a.yaml is to be written twice"]),
        (["--format", "mics"], ["--format", "--write mics.yaml"]),
        (["--write", "--format", "mics", "--format", "mics"], ["2 x --format for 1 x --write"]),
        (["--events"], ["--events", "--json"]),
        (["--save-cluster", "c.yaml"], ["--save-cluster", "--measure"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_message(capsys, words, expected):
    Path("taken.yaml").write_text("mine")
    code, out, err = run(capsys, *words)
    assert code == 2 and out == ""
    assert err.startswith("mics: ") and err.count("\n") == 1
    for part in expected:
        assert part in err
    assert Path("taken.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "hardware", "expected"),
    [
        ("gpt2-xxl", HARDWARE, "Did you mean 'gpt2-xl'?"),
        ("missing.json", HARDWARE, "missing.json"),
        ("missing_module:build", HARDWARE, "missing_module"),
        ("gpt2", ["--instance", "p4d.24xlrge"], "'p4d.24xlarge'"),
        ("gpt2", ["--cluster", "missing.yaml"], "missing.yaml"),
        ("gpt2", ["--cluster", "wrong.yaml"], "Did you mean 'instance'"),
        ("gpt2", [], "The hardware is missing"),
        (None, HARDWARE, "--model is missing"),
    ],
)
def test_unknown_names_and_files_are_refused_in_one_message(capsys, model, hardware, expected):
    Path("wrong.yaml").write_text("instanc: p4d.24xlarge\n")
    code, out, err = run(capsys, model=model, hardware=hardware)
    assert code == 2 and out == ""
    assert expected in err and err.startswith("mics: ") and err.count("\n") == 1


def test_mistyped_options_are_refused_with_the_nearest_one(capsys):
    for words, expected in (("--micro-batchs=2", "Did you mean --micro-batch?"), ("--zzzzz", "mics plan --help")):
        with pytest.raises(SystemExit) as ending:
            run(capsys, words)
        err = capsys.readouterr().err
        assert ending.value.code == 2 and f"unrecognized arguments: {words}. {expected}" in err


@pytest.mark.usefixtures("no_trace")
def test_force_replaces_files(capsys):
    Path("mics.yaml").write_text("mine")
    assert run(capsys, "--write", "--force")[0] == 0
    check_launch_file("mics.yaml")


# Measured links.


def test_measuring_needs_a_launcher(capsys):
    code, out, err = run(capsys, "--measure", hardware=[])
    assert code == 2 and out == ""
    assert "torchrun" in err and "-m lightning_mics plan --measure --model gpt2" in err


def test_ranks_but_the_first_are_silent_about_mistakes(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run(capsys, "--measure", "--top", 0, hardware=[])
    assert (code, out, err) == (2, "", "")


@pytest.fixture
def one_rank(monkeypatch):
    """The variables that a launcher sets for a process alone, and links that need no measuring."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fit = LinkFit(latency=1e-5, rate=10e9, error=0.02, points=())
    measured = Mock(return_value=Measurement(cluster=make_cluster(2, 4), intra=None, inter=fit))
    monkeypatch.setattr("lightning_mics.trace.links.measure_cluster", measured)
    return measured


@pytest.mark.usefixtures("no_trace")
def test_measured_links_are_shown_saved_and_planned_with(capsys, one_rank):
    code, out, err = run(capsys, "--measure", "--save-cluster", "c.yaml", hardware=[])
    assert code == 0, err
    assert not torch.distributed.is_initialized()
    assert out.startswith("Measured on 2 nodes x 4 test")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "between nodes, of a node 10 GB/s 10 us 2%" in rows
    assert "inside a node, of a rank 100 GB/s 1 us assumed" in rows
    assert "Wrote c.yaml" in out and "2 nodes x 4 test" in out
    assert load_cluster("c.yaml") == make_cluster(2, 4)
    assert one_rank.call_args.kwargs["assumed"] is None and one_rank.call_args.kwargs["dtype"] == "bfloat16"


@pytest.mark.usefixtures("no_trace")
def test_what_cannot_be_measured_is_assumed(capsys, one_rank):
    code, out, err = run(capsys, "--measure", "--json")
    assert code == 0 and json.loads(out)["cluster"]["num_nodes"] == 2
    assert "Measured on 2 nodes" in err and Path("cluster.yaml").exists()
    assert one_rank.call_args.kwargs["assumed"] == find_instance("p4d.24xlarge", 2)


def test_the_group_ends_where_measuring_fails(capsys, one_rank):
    one_rank.side_effect = MiCSConfigError("no links")
    code, out, err = run(capsys, "--measure", hardware=[])
    assert (code, out, err) == (2, "", "mics: no links\n")
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("one_rank")
def test_the_file_with_measured_links_is_not_replaced_by_accident(capsys):
    Path("cluster.yaml").write_text("mine")
    code, _, err = run(capsys, "--measure", hardware=[])
    assert code == 2 and "cluster.yaml exists" in err and "--save-cluster" in err
    assert Path("cluster.yaml").read_text() == "mine"


# Calibrating.


CPUS = """
accelerator: {name: CPU, memory: 8 GiB, peak_flops: {float32: 60 GFLOP/s}, memory_bandwidth: 10 GB/s,
  compute_efficiency: 0.8, device_type: cpu}
num_accelerators: 2
num_nodes: 2
intra: {bandwidth: 1 GB/s, efficiency: 1, latency: 50 us}
inter: {bandwidth: 1 Gbit/s, efficiency: 0.9, latency: 100 us}
"""


def test_what_is_calibrated_is_shown_beside_the_assumption_saved_and_used(capsys, no_trace, monkeypatch):
    Path("cpus.yaml").write_text(CPUS)
    unit = dataclasses.replace(make_profile().blocks[0], name="block.1", forward_launches=10, backward_launches=20)
    found = Calibration(
        **{"device": "CPU", "micro_batch": 2, "forward_rate": 30e9, "backward_rate": 20e9, "unit": unit},
        **{"host": Host(launch=12e-6, unit=1e-3, name="calibrated"), "host_seconds": 4e-3},
        **{"kept": 3 * 2**20, "predicted": 2 * 2**20, "optimizer_rate": 5e9},
    )
    calibrate = Mock(return_value=found)
    monkeypatch.setattr("lightning_mics.cli.plan.calibrate.calibrate", calibrate)
    words = ("--precision", "32-true", "--micro-batch", 2)
    code, out, err = run(capsys, "--calibrate", *words, hardware=["--cluster", "cpus.yaml"])
    assert code == 0, err
    assert calibrate.call_args.kwargs["micro_batch"] == 2 and calibrate.call_args.kwargs["device_type"] == "cpu"
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "both passes, a second 48 GFLOP 22.5 GFLOP" in rows and "host: an operation 10 us 12 us" in rows
    assert "kept for the backward pass 2.0 MiB 3.0 MiB" in rows
    accelerator = load_cluster("calibrated.yaml").node.accelerator
    assert accelerator.peak_in("float32") * accelerator.compute_efficiency == pytest.approx(found.rate)
    assert accelerator.optimizer_efficiency == 0.5 and load_cluster("calibrated.yaml").node.host == found.host
    code, later, err = run(capsys, *words, hardware=["--cluster", "calibrated.yaml"])
    assert code == 0 and later.strip() in out
    words = (*words, "--lora-rank", 4, "--base-bits", 8, "--save-cluster", "again.yaml")
    code, out, err = run(capsys, "--calibrate", *words, hardware=["--cluster", "cpus.yaml"])
    assert code == 0 and "A block (block.1), LoRA of rank 4 on CPU, 2 samples" in out, err
    assert "What unpacking its 8 bits takes is planned by" in out


def test_calibrating_needs_the_device_that_is_planned_for(capsys, monkeypatch):
    assert "is a card, of which none is here" in run(capsys, "--calibrate")[2]
    assert "Measure first, then --calibrate --cluster cluster.yaml" in run(capsys, "--calibrate", "--measure")[2]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "Start it without torchrun" in run(capsys, "--calibrate")[2]
