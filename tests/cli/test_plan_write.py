import json

import pytest
import yaml
from plan_examples import make_cluster, make_profile

from lightning_mics.accelerate.launch_file import check_launch_file
from lightning_mics.cli.plan import FORMATS
from lightning_mics.cli.plan.write import MACHINE_0, accelerate_code, mics_settings, to_json, trainer_code, write_plan
from lightning_mics.config import MiCSConfig
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.scaling import weak_scaling
from lightning_mics.plan.search import Choices, search
from lightning_mics.plan.settings import Training


def find(num_nodes=2, node_size=4, *, precision="bf16-mixed", device_type="cuda", batch=(2, 4), **choices):
    cluster = make_cluster(num_nodes, node_size, device_type=device_type)
    return search(
        make_profile(), cluster, Training.in_precision(precision, "AdamW"), Choices(batches=[batch], **choices)
    )


FIXED = {
    "shard_sizes": [4],
    "activation_checkpointing": True,
    "reshard_after_forward": False,
    "optimizer_shard_size": "partition",
}


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_precision_is_found_by_its_dtypes(name):
    assert Training.in_precision(name, "AdamW").precision == name


# Settings and code.


def test_settings_are_those_that_differ_from_the_defaults():
    plain = FIXED | {"activation_checkpointing": False, "reshard_after_forward": True}
    assert mics_settings(find(**plain)) == {"shard_size": 4}
    owners = {"shard_size": 4, "optimizer_shard_size": "world", "master_weights": "owners"}
    assert mics_settings(find(**plain | {"optimizer_shard_size": "world"})) == owners
    assert mics_settings(find(**plain | {"optimizer_shard_size": None})) == owners  # it sends less
    assert mics_settings(find(**plain | {"optimizer_shard_size": None}, precision="32-true")) == {"shard_size": 4}
    expected = {"shard_size": 4, "reshard_after_forward": False, "activation_checkpointing": True}
    assert mics_settings(find(**FIXED)) == expected


def test_stages_are_measured_at_set_up_unless_they_are_fixed():
    assert "hierarchical" not in mics_settings(find(shard_sizes=[8]))
    assert mics_settings(find(shard_sizes=[8], hierarchical=False))["hierarchical"] is False
    assert mics_settings(find(shard_sizes=[8], hierarchical=True))["hierarchical"] is True
    assert "hierarchical" not in mics_settings(find(shard_sizes=[4], hierarchical=True))


def test_the_line_for_the_trainer_creates_one():
    trainer = pytest.importorskip("lightning.pytorch").Trainer
    from lightning_mics import MiCSStrategy

    found = {}
    exec(
        trainer_code(find(1, 4, device_type="cpu", precision="32-true", **FIXED)),
        scope := {
            "Trainer": lambda **arguments: found.update(arguments) or trainer(logger=False, **arguments),
            "MiCSStrategy": MiCSStrategy,
        },
    )
    assert scope["trainer"].accumulate_grad_batches == 4
    assert scope["trainer"].num_devices == 4
    assert found["strategy"].config.activation_checkpointing and found["strategy"].config.shard_size == 4


def test_the_line_for_accelerate_names_the_plugin():
    code = accelerate_code(find(**FIXED))
    settings = "MiCSPlugin( shard_size=4, reshard_after_forward=False, activation_checkpointing=True, )"
    assert settings in " ".join(code.split()) and max(map(len, code.splitlines())) < 80
    assert "gradient_accumulation_steps=4" in code and 'mixed_precision="bf16"' in code
    assert 'mixed_precision="no"' in accelerate_code(find(precision="bf16-true"))


# Files.


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_the_launch_file_says_what_was_planned(tmp_path, num_nodes):
    file = tmp_path / "mics.yaml"
    use = write_plan(find(num_nodes, **FIXED), file)
    settings = check_launch_file(file)
    assert (settings.num_machines, settings.num_processes, settings.shard_size) == (num_nodes, 4 * num_nodes, 4)
    assert settings.mixed_precision == "bf16" and not settings.cpu
    assert settings.activation_checkpointing and not settings.reshard_after_forward
    assert settings.main_process_ip == (MACHINE_0 if num_nodes > 1 else None)
    assert f"accelerate launch --config_file {file}" in use
    assert (MACHINE_0 in use) is (num_nodes > 1)


def test_a_given_address_needs_no_placeholder(tmp_path):
    use = write_plan(find(), tmp_path / "mics.yaml", main_process_ip="10.0.0.1")
    assert check_launch_file(tmp_path / "mics.yaml").main_process_ip == "10.0.0.1"
    assert MACHINE_0 not in use


def test_fixed_stages_travel_by_environment(tmp_path):
    use = write_plan(find(shard_sizes=[8], hierarchical=False), tmp_path / "mics.yaml")
    assert "MICS_HIERARCHICAL=false accelerate launch" in use


def test_the_cli_file_is_one_that_lightning_takes(tmp_path, monkeypatch):
    cli = pytest.importorskip("lightning.pytorch.cli")
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.demos.boring_classes import BoringModel

    file = tmp_path / "trainer.yaml"
    write_plan(find(1, 4, device_type="cpu", precision="32-true", **FIXED), file, "lightning")
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(file), "--trainer.logger", "false"])
    trainer = cli.LightningCLI(BoringModel, run=False, save_config_callback=None, seed_everything_default=False).trainer
    assert trainer.strategy.config == MiCSConfig(**mics_settings(find(1, 4, **FIXED)))
    assert (trainer.num_devices, trainer.num_nodes, trainer.accumulate_grad_batches) == (4, 1, 4)


def test_the_cli_file_has_nodes_and_precision(tmp_path):
    write_plan(find(2, 4, **FIXED), tmp_path / "trainer.yaml", "lightning")
    trainer = yaml.safe_load((tmp_path / "trainer.yaml").read_text())["trainer"]
    assert (trainer["num_nodes"], trainer["devices"], trainer["precision"]) == (2, 4, "bf16-mixed")
    assert trainer["strategy"]["class_path"] == "lightning_mics.MiCSStrategy"


def test_the_settings_file_is_one_that_mics_config_reads(tmp_path):
    file = tmp_path / "settings.yaml"
    write_plan(find(**FIXED), file, "mics")
    expected = MiCSConfig(
        shard_size=4, activation_checkpointing=True, reshard_after_forward=False, param_dtype="bfloat16"
    )
    assert MiCSConfig.from_yaml(file) == expected
    assert "micro-batch of a rank 2, microsteps 4 (global batch 64)" in file.read_text()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_stays_without_force(tmp_path, kind):
    file = tmp_path / "mics.yaml"
    file.write_text("mine")
    with pytest.raises(MiCSConfigError, match="exists"):
        write_plan(find(), file, kind)
    assert file.read_text() == "mine"
    write_plan(find(), file, kind, force=True)
    assert file.read_text() != "mine"


# JSON.


def test_json_has_everything_under_the_names_of_the_dataclasses():
    planning = find()
    answer = json.loads(to_json(planning, weak_scaling(planning, [1, 2])))
    assert {"profile", "cluster", "training", "choices", "plans", "misfits", "contenders", "scaling"} <= set(answer)
    best = answer["plans"][0]
    assert best["candidate"]["shard_size"] == planning.best.candidate.shard_size
    assert best["memory"]["total"] == pytest.approx(planning.best.memory.total)
    assert best["time"]["seconds"] == planning.best.time.seconds and "events" not in best["time"]
    assert set(best["traffic"]) == {"partition gather", "partition reduce", "replication reduce", "replication gather"}
    assert best["fits"] is True and best["global_batch"] == 64
    assert answer["profile"]["blocks"][0]["count"] == len(planning.profile.blocks)
    assert answer["precision"] == "bf16-mixed"
    assert answer["scaling"][0]["num_nodes"] == 1
    assert answer["cluster"]["world_size"] == 8


def test_events_come_on_demand_for_the_best_plan_and_its_contenders():
    planning = find()
    answer = json.loads(to_json(planning, events=True))
    assert answer["plans"][0]["time"]["events"][0]["stream"]
    assert all("events" in plan["time"] for plan in answer["contenders"])
    assert all("events" not in plan["time"] for plan in answer["plans"][1:])


def test_json_has_no_numbers_that_json_does_not_know():
    planning = find(memory_limit=float("inf"))
    assert json.loads(to_json(planning))["plans"][0]["memory_limit"] is None


def test_json_without_plans_has_the_misfits():
    answer = json.loads(to_json(find(memory_limit=1e6)))
    assert answer["plans"] == [] and answer["misfits"][0]["reason"].startswith("p=")
