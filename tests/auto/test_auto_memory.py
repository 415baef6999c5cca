"""The parts of ``shard_size="auto"`` that need no other process: settings, memory, and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mics import ClusterTopology, MiCSConfig, MiCSConfigError
from lightning_mics.accelerate.launch_file import (
    LaunchSettings,
    check_environment,
    check_launch_file,
    write_launch_file,
)
from lightning_mics.accelerate.plugin import launched_settings
from lightning_mics.auto import AutoChoice, Sample, compare
from lightning_mics.auto.forecast import Forecast
from lightning_mics.cli import main
from lightning_mics.core.resources import ResidentMemory, bytes_on, device_memory, free_host_memory
from lightning_mics.plan import MemoryBreakdown

GIB = 2**30


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("36GiB", 36 * GIB),
        ("36 GiB", 36 * GIB),
        ("1.5GB", 1_500_000_000),
        ("800MiB", 800 * 2**20),
        ("2KB", 2000),
        ("1TiB", 2**40),
        ("5B", 5),
    ],
)
def test_memory_limits_are_bytes_or_text(given: int | str, count: int) -> None:
    assert MiCSConfig(memory_limit=given).memory_limit == count
    assert MiCSConfig.from_env({"MICS_MEMORY_LIMIT": str(given)}).memory_limit == count


@pytest.mark.parametrize("given", [0, -1, True, "36 apples", "GiB", "", "-1GiB", "0", float("inf"), []])
def test_other_memory_limits_are_refused(given: object) -> None:
    with pytest.raises(MiCSConfigError) as caught:
        MiCSConfig(memory_limit=given)  # type: ignore[arg-type]
    assert f"memory_limit={given!r}" in str(caught.value) and "'36GiB'" in str(caught.value)


def test_auto_is_a_word_where_there_is_a_model() -> None:
    assert MiCSConfig.from_env({"MICS_SHARD_SIZE": "auto"}).shard_size == "auto"
    with pytest.raises(MiCSConfigError, match="cpu_offload=True"):
        MiCSConfig(shard_size="auto", cpu_offload=True)
    with pytest.raises(
        MiCSConfigError, match=r"'auto' needs a model, and there is none here. Values that work.*1, 2, 4"
    ):
        ClusterTopology(world_size=4, node_size=2).layout("auto")


# --- Launch files -----------------------------------------------------------------------------------------------------


def test_a_launch_file_holds_a_number_in_the_place_of_the_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, environment = LaunchSettings(shard_size=4, num_processes=8), {"MICS_SHARD_SIZE": "auto"}
    assert check_environment(settings, environment).shard_size == 4
    path = write_launch_file(tmp_path / "mics.yaml", settings, environment=environment)
    assert "MICS_SHARD_SIZE=auto accelerate launch" in path.read_text()
    monkeypatch.setenv("MICS_SHARD_SIZE", "auto")
    assert check_launch_file(path) == settings
    launched = {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "4", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", **environment}
    assert MiCSConfig.from_env(launched, defaults=launched_settings(launched)).shard_size == "auto"


def test_the_command_takes_the_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["config", "--shard-size", "auto", "--num-processes", "4", "--output", "mics.yaml", "--yes"]) == 0
    printed = capsys.readouterr().out
    assert "decided from the model; without MICS_SHARD_SIZE=auto it is 4" in printed
    assert "MICS_SHARD_SIZE=auto accelerate launch --config_file mics.yaml train.py" in printed


# --- Memory -----------------------------------------------------------------------------------------------------------


def machine(root: Path, available: int, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {
        "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\n",
        "proc/self/cgroup": cgroup,
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_free_memory_of_a_machine(tmp_path: Path) -> None:
    assert free_host_memory(machine(tmp_path, 8 * GIB, "0::/\n", {})) == 8 * GIB


def test_control_groups_of_version_2_limit_it(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/jobs"
    files = {
        f"{folder}/memory.max": f"{4 * GIB}\n",
        f"{folder}/memory.current": f"{3 * GIB}\n",
        f"{folder}/memory.stat": f"anon {GIB}\ninactive_file {GIB}\n",
        f"{folder}/mine/memory.max": "max\n",
        f"{folder}/mine/memory.current": "5\n",
        f"{folder}/mine/memory.stat": "inactive_file 0\n",
    }
    assert free_host_memory(machine(tmp_path, 8 * GIB, "0::/jobs/mine\n", files)) == 2 * GIB


def test_control_groups_of_version_1_limit_it(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/mine"
    files = {
        f"{folder}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{folder}/memory.usage_in_bytes": f"{GIB}\n",
        f"{folder}/memory.stat": "total_inactive_file 0\n",
    }
    assert free_host_memory(machine(tmp_path, 8 * GIB, "4:cpu:/\n3:memory,x:/mine\n", files)) == 3 * GIB
    (tmp_path / folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert free_host_memory(tmp_path) == 8 * GIB


def test_this_machine_has_memory() -> None:
    assert free_host_memory() > 2**20


class OneDevice:
    """A device of 80 GiB; ``used`` by all processes, ``reserved`` by this one."""

    def __init__(self, used: float, reserved: float, fraction: float = 1.0) -> None:
        self.used, self.reserved, self.fraction = used, reserved, fraction

    def mem_get_info(self, device: object) -> tuple[int, int]:
        return int((80 - self.used) * GIB), 80 * GIB

    def memory_reserved(self, device: object) -> int:
        return int(self.reserved * GIB)

    def get_per_process_memory_fraction(self, device: object) -> float:
        return self.fraction


@pytest.mark.parametrize(
    ("device", "gib"),
    [
        (OneDevice(0.4, 0.0), 80),
        (OneDevice(12.5, 12.0), 80),
        (OneDevice(30.5, 10.0), 60),
        (OneDevice(0.4, 0.0, 0.5), 40),
        (OneDevice(60.5, 0.0, 0.5), 20),
    ],
    ids=["idle", "own", "others", "fraction", "fraction-and-others"],
)
def test_a_device_has_what_other_processes_leave(monkeypatch: pytest.MonkeyPatch, device: OneDevice, gib: int) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    assert device_memory(torch.device("cuda", 0)) == gib * GIB


def test_shared_weights_count_once_and_those_without_memory_not_at_all() -> None:
    layer = nn.Linear(4, 4, bias=False)
    tied = nn.Sequential(layer, nn.Linear(4, 4, bias=False))
    tied[1].weight = layer.weight
    assert bytes_on(tied, "cpu") == 64
    assert bytes_on(tied.to("meta"), "cpu") == 0


def test_resident_memory_grows_and_shrinks() -> None:
    memory = ResidentMemory()
    tensor = torch.ones(2**24)
    assert memory.growth() > 2**25
    del tensor
    memory.restart_peak()
    assert memory.growth() < 2**25 and memory.peak_growth() < 2**26


# --- Words ------------------------------------------------------------------------------------------------------------


def choice(**changes: object) -> AutoChoice:
    values = {
        "shard_size": 2,
        "memory": MemoryBreakdown(parameters=2 * GIB, gradients=2 * GIB, optimizer=4 * GIB, reserve=GIB),
        "memory_limit": 10 * GIB,
        "totals": {1: 17.0 * GIB, 2: 9.0 * GIB, 4: 5.0 * GIB},
    }
    return AutoChoice(**{**values, **changes})  # type: ignore[arg-type]


def test_a_choice_tells_its_reason() -> None:
    assert str(choice(notes=("AdamW is assumed: no optimizer is known.",))) == (
        "shard_size='auto' chose 2: a rank needs 9.0 GiB of 10.0 GiB (parameters 2.0 GiB, gradients 2.0 GiB, optimizer "
        "4.0 GiB, reserve 1.0 GiB); shard_size=1 would need 17.0 GiB. AdamW is assumed: no optimizer is known."
    )


@pytest.mark.parametrize(
    ("measured", "told"),
    [
        (8.5, "predicted 8.0 GiB a rank, measured 8.5 GiB."),
        (6.5, "measured 6.5 GiB."),
        (
            9.2,
            "more than expected. Pass a sample as large as those that are trained with, or use shard_size=4: it hardly",
        ),
        (5.0, "less than expected. No smaller partition would fit either."),
        (4.5, "less than expected. shard_size=1 would probably fit, with 9.6 GiB, and communicate less."),
    ],
)
def test_predictions_are_compared(measured: float, told: str) -> None:
    assert told in compare(choice(), int(measured * GIB), "cuda")


def test_memory_that_was_not_predicted_is_no_surprise() -> None:
    assert compare(choice(knows_activations=False, memory_limit=20 * GIB), 12 * GIB, "cuda").endswith(
        "measured 12.0 GiB, which has activations in it."
    )
    assert "use shard_size=4: it hardly fits into 10.0 GiB" in compare(
        choice(knows_activations=False), int(9.5 * GIB), "cuda"
    )
    assert "it fits into 20.0 GiB all the same" in compare(choice(memory_limit=20 * GIB), 10 * GIB, "cuda")


def test_resident_memory_tells_little_of_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    small = choice(memory=MemoryBreakdown(parameters=1.0, gradients=1.0, optimizer=2.0))
    assert compare(small, 2**27, "cpu") == ""
    assert "less than expected" in compare(choice(), 4 * GIB, "cpu")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert "MALLOC_MMAP_THRESHOLD_=131072" in compare(choice(), 12 * GIB, "cpu")


def test_a_sample_knows_its_size() -> None:
    assert Sample.of({"input_ids": torch.zeros(3, 5), "scale": torch.tensor(1.0)}).micro_batch == 3
    assert Sample.of((torch.tensor(1.0), torch.zeros(4, 2))).micro_batch == 4
    assert Sample.of("text").micro_batch == 1


def forecast(node_size: int, **settings: Any) -> Forecast:
    layers = [nn.Linear(256, 256) for _ in range(4)]
    config, topology = MiCSConfig(shard_size="auto", **settings), ClusterTopology(world_size=8, node_size=node_size)
    return Forecast(nn.Sequential(*layers), config, topology, "cpu", ["AdamW"], None)


def test_states_divided_further_are_advised_where_they_keep_gathers_inside_the_node() -> None:
    told = forecast(2)
    needs = {size: memory.total for size, memory in told.needs().items()}
    divided = told._memory(told._candidate(2, "world")).total
    assert divided < needs[2]
    advice = told.advice(4, int((divided + needs[2]) / 2))
    assert advice is not None and "optimizer_shard_size='world' shard_size=2 would do: a rank needs" in advice
    assert int(advice.partition("nodes send ")[2].partition("%")[0]) < 100
    assert told.advice(4, int(divided / 2)) is None  # nothing smaller fits
    assert told.advice(2, int(needs[2])) is None  # gathers stay inside the node already
    assert forecast(8).advice(8, int(needs[1])) is None  # nothing leaves the only node
    assert forecast(2, optimizer_shard_size="world").advice(4, int(needs[1])) is None  # as asked for
