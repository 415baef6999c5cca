"""What a file for ``accelerate launch --config_file`` says: its settings, and where it has the line of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from lightning_mics.errors import MiCSConfigError
from lightning_mics.precision import ACCELERATE_PRECISIONS
from lightning_mics.text import listing
from lightning_mics.topology import ClusterTopology, GroupLayout, check_positive_int, divisors

if TYPE_CHECKING:
    from lightning_mics.config import MiCSConfig

DEFAULT_PORT = 29500
MOST_PROCESSES = 2**20
SHARD, REPLICATE = "parallelism_config_dp_shard_size", "parallelism_config_dp_replicate_size"

# Section and key of each setting; the top level is the section "".
LINES = {
    "num_processes": ("", "num_processes"),
    "num_machines": ("", "num_machines"),
    "machine_rank": ("", "machine_rank"),
    "main_process_ip": ("", "main_process_ip"),
    "main_process_port": ("", "main_process_port"),
    "mixed_precision": ("", "mixed_precision"),
    "param_dtype": ("", "mixed_precision"),
    "cpu": ("", "use_cpu"),
    "shard_size": ("parallelism_config", SHARD),
    "replicas": ("parallelism_config", REPLICATE),
    "wrap": ("fsdp_config", "fsdp_transformer_layer_cls_to_wrap"),
    "reshard_after_forward": ("fsdp_config", "fsdp_reshard_after_forward"),
    "activation_checkpointing": ("fsdp_config", "fsdp_activation_checkpointing"),
    "activation_checkpointing_offload": ("fsdp_config", "fsdp_activation_checkpointing_offload"),
    "cpu_offload": ("fsdp_config", "fsdp_offload_params"),
    "full_checkpoint": ("fsdp_config", "fsdp_state_dict_type"),
}
# Lines of which one value goes together with MiCS, and why.
FIXED = {
    ("fsdp_config", "fsdp_version"): ("2", "is not what MiCS is built on"),
    **{
        ("parallelism_config", f"parallelism_config_{kind}_size"): (
            "1",
            "does not go together with MiCS, which only has partitions and replicas",
        )
        for kind in ("tp", "cp", "sp")
    },
}


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """What a launch file says.

    Attributes:
        shard_size: Ranks in a partition group.
        num_processes: Ranks on all machines together.
        num_machines: Machines, each with the same number of ranks.
        machine_rank: Which of the machines this one is, from 0.
        main_process_ip: Address of machine 0. Needed with several machines.
        main_process_port: Port on machine 0. 0 takes a free one, which only works on a single machine and is the
            default there; with several machines the default is 29500.
        mixed_precision: Precision of parameters while they are gathered: ``"no"``, ``"bf16"`` or ``"fp16"``.
        cpu: Whether the ranks compute on CPUs.
        reshard_after_forward: Whether units are freed between forward and backward.
        activation_checkpointing: Whether units recompute their activations in the backward pass.
        activation_checkpointing_offload: Whether what recomputed units keep waits in host memory.
        cpu_offload: Whether shards, their gradients and optimizer states live in host memory.
        full_checkpoint: Whether ``save_state`` also writes the whole weights, for ``from_pretrained``.
        wrap: Class names of the modules that become FSDP units, separated by commas.

    Raises:
        MiCSConfigError: If a value is wrong, or the sizes do not fit together.
    """

    shard_size: int
    num_processes: int
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    mixed_precision: str = "no"
    cpu: bool = False
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    activation_checkpointing_offload: bool = False
    cpu_offload: bool = False
    full_checkpoint: bool = False
    wrap: str | None = None

    def __post_init__(self) -> None:
        topology = launch_topology(self.num_processes, self.num_machines)
        check_positive_int("shard_size", self.shard_size, topology.node_size)
        topology.layout(self.shard_size)
        self._check_machines()
        self._check_port()
        if self.mixed_precision not in tuple(ACCELERATE_PRECISIONS):
            works = ", ".join(map(repr, ACCELERATE_PRECISIONS))
            self._refuse("mixed_precision", f"is not known here. Values that work: {works}.")
        for name in ("cpu", "full_checkpoint"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "is not a switch. Values that work: True or False.")
        if self.wrap is not None:
            object.__setattr__(self, "wrap", self._check_wrap())
        _ = self.config  # checks the settings of MiCS

    def _refuse(self, name: str, why: str) -> None:
        raise MiCSConfigError(f"{name}={getattr(self, name)!r} {why}", setting=name)

    def _check_machines(self) -> None:
        rank, last = self.machine_rank, self.num_machines - 1
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= last:
            works = "0" if last == 0 else f"0 to {last}"
            self._refuse(
                "machine_rank", f"is not one of the num_machines={self.num_machines}. Values that work: {works}."
            )
        ip = self.main_process_ip
        if ip is not None and (not isinstance(ip, str) or not ip.strip()):
            self._refuse("main_process_ip", "is not an address. Try main_process_ip='10.0.0.1'.")
        if ip is None and self.num_machines > 1:
            self._refuse(
                "num_machines",
                "needs main_process_ip, the address of machine 0 at which the others reach it. Try "
                "main_process_ip='10.0.0.1'.",
            )

    def _check_port(self) -> None:
        several = self.num_machines > 1
        if self.main_process_port is None:
            object.__setattr__(self, "main_process_port", DEFAULT_PORT if several else 0)
        port = self.main_process_port
        if isinstance(port, bool) or not isinstance(port, int) or not int(several) <= port <= 65535:
            why = f", and all {self.num_machines} machines must know it" if several and port == 0 else ""
            self._refuse("main_process_port", f"is not a port{why}. Try main_process_port={DEFAULT_PORT}.")

    def _check_wrap(self) -> str:
        names = [name.strip() for name in self.wrap.split(",")] if isinstance(self.wrap, str) else []
        if not names or not all(name.isidentifier() for name in names):
            self._refuse(
                "wrap", "is not a list of class names. Separate them by commas, as in wrap='GPT2Block,Embedding'."
            )
        return ",".join(names)

    @property
    def config(self) -> MiCSConfig:
        """What it says to MiCS."""
        from lightning_mics.config import MiCSConfig

        carried = {name: getattr(self, name) for name in mics_settings() if hasattr(self, name)}
        carried["wrap"] = "auto" if self.wrap is None else self.wrap.split(",")
        return MiCSConfig(**carried).with_precision(ACCELERATE_PRECISIONS[self.mixed_precision].name)

    @property
    def layout(self) -> GroupLayout:
        """Which rank holds which shard of which replica."""
        return launch_topology(self.num_processes, self.num_machines).layout(self.shard_size)


def mics_settings() -> list[str]:
    """Returns the names of all settings of MiCS."""
    from lightning_mics.config import MiCSConfig

    return list(MiCSConfig.setting_names())


def yaml_scalar(value: bool | str) -> str:
    """Writes a value so that YAML reads the same one; the bare word ``no`` would mean false."""
    return yaml.safe_dump({"key": value}, width=1000).removeprefix("key: ").strip()


def launch_topology(num_processes: int, num_machines: int = 1, node_size: int | None = None) -> ClusterTopology:
    """Returns the cluster that a launch makes.

    Args:
        num_processes: Ranks on all machines together.
        num_machines: Machines, each with the same number of ranks.
        node_size: Ranks of a pretended node (``MICS_NODE_SIZE``); the ranks of a machine, if not given.

    Raises:
        MiCSConfigError: If a number is wrong, or the processes cannot be spread evenly over the machines.
    """
    check_positive_int("num_processes", num_processes, 8)
    check_positive_int("num_machines", num_machines, 1)
    if num_processes > MOST_PROCESSES:
        raise MiCSConfigError(
            f"num_processes={num_processes} is more than one launch can start ({MOST_PROCESSES}). Give the number of "
            "accelerators on all machines, such as num_processes=8.",
            setting="num_processes",
        )
    if num_processes % num_machines:
        below = num_processes // num_machines * num_machines
        even = [number for number in (below, below + num_machines) if number]
        raise MiCSConfigError(
            f"num_processes={num_processes} cannot be spread evenly over num_machines={num_machines}. Values that "
            f"work: num_processes={' or '.join(map(str, even))}, or num_machines={listing(divisors(num_processes))}.",
            setting="num_processes",
        )
    return ClusterTopology(world_size=num_processes, node_size=node_size or num_processes // num_machines)


def check_replicas(shard_size: int, replicas: int, num_processes: int) -> None:
    """Checks that the two sizes of ``parallelism_config`` multiply to the number of processes.

    Raises:
        MiCSConfigError: If they do not; it names the line to change.
    """
    if shard_size * replicas != num_processes:
        raise MiCSConfigError(
            f"{REPLICATE}: {replicas} and {SHARD}: {shard_size} make {shard_size * replicas} processes, but "
            f"{num_processes} are launched: {replicas_that_work(shard_size, num_processes)}.",
            setting="replicas",
        )


def replicas_that_work(shard_size: int, num_processes: int) -> str:
    """Returns what to change in a launch file whose sizes do not multiply to the number of processes."""
    if shard_size > 0 and num_processes % shard_size == 0:
        return f"change the line to '{REPLICATE}: {num_processes // shard_size}'"
    return f"choose a {SHARD} that divides {num_processes}"


def check_variable(shard_size: int, environ: Mapping[str, str]) -> None:
    """Checks that ``MICS_SHARD_SIZE``, where it is set, says what the launch file says.

    Raises:
        MiCSConfigError: If it does not.
    """
    variable = environ.get("MICS_SHARD_SIZE")
    # The file has no word for "auto", so its number is a placeholder then.
    if variable is not None and variable.strip() not in (str(shard_size), "auto"):
        raise MiCSConfigError(
            f"MICS_SHARD_SIZE={variable} contradicts the launch file's {SHARD}: {shard_size}. Leave the variable out, "
            "or change the line.",
            setting="shard_size",
        )
