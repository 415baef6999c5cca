"""Finds what is wrong with a file for ``accelerate launch --config_file``, and in which line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_mics.accelerate.launch_file import (
    CARRIED,
    DEFAULT_PORT,
    PRECISIONS,
    REPLICATE,
    SHARD,
    LaunchSettings,
    check_wrap,
    even_numbers,
    launch_topology,
    listing,
    mics_settings,
    yaml_scalar,
)
from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import ClusterTopology, divisors

# What Accelerate 1.15 knows; its own lists are asked where it is installed.
_KNOWN = {
    "": "compute_environment distributed_type mixed_precision use_cpu debug num_processes machine_rank num_machines "
    "gpu_ids main_process_ip main_process_port rdzv_backend same_network main_training_function enable_cpu_affinity "
    "fp8_config deepspeed_config fsdp_config parallelism_config megatron_lm_config mpirun_config downcast_bf16 "
    "tpu_name tpu_zone tpu_use_cluster tpu_use_sudo command_file commands tpu_vm tpu_env dynamo_config",
    "fsdp_config": "fsdp_version fsdp_offload_params fsdp_min_num_params fsdp_sharding_strategy "
    "fsdp_reshard_after_forward fsdp_auto_wrap_policy fsdp_transformer_layer_cls_to_wrap fsdp_backward_prefetch "
    "fsdp_state_dict_type fsdp_forward_prefetch fsdp_use_orig_params fsdp_cpu_ram_efficient_loading "
    "fsdp_sync_module_states fsdp_activation_checkpointing fsdp_activation_checkpointing_offload",
    "parallelism_config": "parallelism_config_dp_replicate_size parallelism_config_dp_shard_size "
    "parallelism_config_tp_size parallelism_config_cp_size parallelism_config_cp_backend "
    "parallelism_config_cp_comm_strategy parallelism_config_sp_size parallelism_config_sp_backend "
    "parallelism_config_sp_seq_length parallelism_config_sp_seq_length_is_variable "
    "parallelism_config_sp_attn_implementation",
}
# Accelerate reads these too, though its lists do not have them.
_UNLISTED = {"": {"fp16", "dynamo_backend"}, "fsdp_config": {"fsdp_ignored_modules"}, "parallelism_config": set()}
_OTHER_TYPES = {
    "NO": "starts one process and leaves fsdp_config and parallelism_config out",
    "MULTI_CPU": "starts processes with mpirun and leaves fsdp_config out",
    "DEEPSPEED": "hands the model to DeepSpeed",
    "MEGATRON_LM": "hands the model to Megatron-LM",
    "XLA": "starts processes on TPUs, which MiCS does not know",
    "TPU": "starts processes on TPUs, which MiCS does not know",
}
_OTHER_ENGINES = ("deepspeed_config", "megatron_lm_config", "fp8_config")
# FSDP 1's words: whether they mean resharding after forward.
_STRATEGIES = {
    "FULL_SHARD": True,
    "SHARD_GRAD_OP": False,
    "NO_SHARD": None,
    "HYBRID_SHARD": True,
    "HYBRID_SHARD_ZERO2": False,
}
_SETTING_PREFIX = re.compile(r"^(fsdp_|parallelism_config_)?(mics_)?")


def read_settings(path: Path) -> LaunchSettings:
    """Returns what a launch file says; see :func:`~lightning_mics.accelerate.launch_file.check_launch_file`."""
    file = _LaunchFile.read(path)
    _check_keys(file)
    _check_launcher(file)
    sizes = _check_sizes(file)
    values = {**_check_machines(file, sizes["num_machines"]), **_check_fsdp(file)}
    _check_strategy(file, sizes, values["reshard_after_forward"])
    if file.problems:
        raise file.error()
    try:
        return LaunchSettings(**sizes, **values)
    except MiCSConfigError as error:
        raise MiCSConfigError(f"{path}: {error}") from error


def check_keys(path: Path) -> None:
    """Checks that Accelerate knows every line of a launch file; it drops those that it does not, without a word.

    Raises:
        MiCSConfigError: Listing the unknown lines, with what to do about each.
    """
    file = _LaunchFile.read(path)
    file.problems.clear()
    _check_keys(file)
    if file.problems:
        raise file.error()


@dataclass(frozen=True)
class _Entry:
    """A key of the file with its value; ``source`` is how the two are written there."""

    key: str
    value: Any
    line: int
    source: str


@dataclass
class _LaunchFile:
    """The entries of a launch file by section (the top level is ``""``), and what is wrong with them."""

    path: Path
    sections: dict[str, dict[str, _Entry]] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> _LaunchFile:
        text = _read_text(path)
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                raise MiCSConfigError(
                    f"{path} holds no settings, but must have lines like 'num_processes: 8'. Write one with: mics "
                    "config"
                )
            file = cls(path)
            file._fill(loader, root, text.splitlines())
        except yaml.YAMLError as error:
            raise MiCSConfigError(_describe_yaml_error(path, text, error)) from error
        finally:
            loader.dispose()
        return file

    def _fill(self, loader: yaml.SafeLoader, root: yaml.MappingNode, lines: list[str]) -> None:
        self.sections[""] = self._entries(loader, root, lines)
        for section in ("fsdp_config", "parallelism_config"):
            node = next((value for key, value in root.value if key.value == section), None)
            self.sections[section] = self._entries(loader, node, lines) if isinstance(node, yaml.MappingNode) else {}
            entry = self.sections[""].get(section)
            if entry is not None and entry.value is not None and not isinstance(entry.value, dict):
                self.problem(entry, f"is not a section. Write '{section}:', and its settings indented below it")

    def _entries(self, loader: yaml.SafeLoader, node: yaml.MappingNode, lines: list[str]) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            start, end = key_node.start_mark, value_node.end_mark
            one_line = isinstance(value_node, yaml.ScalarNode) and start.line == end.line
            source = lines[start.line][start.column : end.column] if one_line else f"{key}:"
            entry = _Entry(key, loader.construct_object(value_node, deep=True), start.line + 1, source.strip())
            if key in entries:
                self.problem(entry, f"is there twice, in line {entries[key].line} too. Remove one of the lines")
            entries[key] = entry
        return entries

    def get(self, section: str, key: str) -> _Entry | None:
        entries = self.sections[section]
        if section == "fsdp_config" and key not in entries:  # Accelerate puts the prefix in front where it is missing
            return entries.get(key.removeprefix("fsdp_"))
        return entries.get(key)

    def problem(self, where: _Entry | None, text: str) -> None:
        """Notes what is wrong with a line, or, without one, with the file."""
        text = text if text.endswith((".", "?")) else f"{text}."
        self.problems.append((where.line, f", line {where.line}: {where.source} {text}") if where else (0, f": {text}"))

    def error(self) -> MiCSConfigError:
        found = [f"{self.path}{text}" for _, text in sorted(self.problems)]
        if len(found) == 1:
            return MiCSConfigError(found[0])
        return MiCSConfigError(f"{self.path} has {len(found)} problems:\n" + "\n".join(f"  {text}" for text in found))

    def missing(self, section: str, text: str) -> None:
        """Notes that a section lacks a line."""
        header = self.sections[""].get(section)
        if header is None:
            self.problem(None, f"{section} {text}" if section else text)
        else:
            self.problem(header, text)

    def integer(self, section: str, key: str, default: int | None, least: int, example: int) -> int | None:
        """Returns a whole number, or ``None`` after noting that there is none."""
        entry = self.get(section, key)
        if entry is None:
            return default
        value = entry.value
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(entry, f"is not a whole number. Change it to {example}")
        elif value < least:
            self.problem(entry, f"must be at least {least}. Change it to {example}")
        else:
            return value
        return None

    def switch(self, section: str, key: str, default: bool) -> bool:
        entry = self.get(section, key)
        value = default if entry is None else entry.value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            self.problem(entry, f"is neither true nor false. Change it to {yaml_scalar(default)}")
            return default
        return value

    def word(self, section: str, key: str, default: str, words: Sequence[str]) -> str:
        entry = self.get(section, key)
        if entry is None or entry.value in words:
            return default if entry is None else str(entry.value)
        near = next((word for word in words if word.lower() == str(entry.value).lower()), None)
        works = f"Change it to {near}" if near else f"Values that work: {', '.join(map(yaml_scalar, words))}"
        self.problem(entry, f"is not known here. {works}")
        return default


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MiCSConfigError(f"{path} does not exist. Write it with: mics config --output {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise MiCSConfigError(f"{path} cannot be read ({reason}). Give a YAML file such as mics.yaml.") from error


def _describe_yaml_error(path: Path, text: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "unreadable"
    if mark is None:
        return f"{path}: this is not YAML ({problem}). Lines look like 'num_processes: 8'."
    lines = text.splitlines()
    line = f": {lines[mark.line].strip()}" if mark.line < len(lines) else " (the end of the file)"
    return (
        f"{path}, line {mark.line + 1}{line} is not YAML here ({problem}). Change it, or the line above, to the form "
        "'num_processes: 8'."
    )


def _check_keys(file: _LaunchFile) -> None:
    known = _known_keys()
    for section, entries in file.sections.items():
        for key, entry in entries.items():
            full = key if section != "fsdp_config" or key.startswith("fsdp") else f"fsdp_{key}"
            if full not in known[section]:
                file.problem(entry, _advise(entry, section, known))


def _known_keys() -> dict[str, set[str]]:
    known = {section: set(names.split()) for section, names in _KNOWN.items()}
    with contextlib.suppress(ImportError):
        known = _accelerate_keys()
    return {section: names | _UNLISTED[section] for section, names in known.items()}


def _accelerate_keys() -> dict[str, set[str]]:
    handlers = logging.root.handlers[:]
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    logging.root.handlers[:] = handlers  # the launch module puts one of its own there when it is imported
    options = vars(launch_command_parser().parse_args(["script"]))
    return {
        "": {entry.name for entry in dataclasses.fields(ClusterConfig)},
        "fsdp_config": {name for name in options if name.startswith("fsdp_")},
        "parallelism_config": {name for name in options if name.startswith("parallelism_config_")},
    }


def _advise(entry: _Entry, section: str, known: Mapping[str, set[str]]) -> str:
    """Says what to do about an unknown key."""
    setting = _SETTING_PREFIX.sub("", entry.key.lower())
    if setting in mics_settings() or entry.key.lower().startswith("mics"):
        return _advise_setting(entry, setting)
    home = next((name for name, keys in known.items() if entry.key in keys), None)
    if home is not None:
        return f"does not belong here. Move it {f'into {home}' if home else 'to the top level, not indented'}"
    fate = "is unknown, and Accelerate drops it silently" if section else "is unknown, and Accelerate refuses it"
    if f"{section}_{entry.key}" in known[section]:
        return f"{fate}. Write it as {section}_{entry.key}"
    near = difflib.get_close_matches(entry.key, sorted(known[section]), n=1)
    return f"{fate}. {f'Did you mean {near[0]}?' if near else 'Remove it'}"


def _advise_setting(entry: _Entry, setting: str) -> str:
    setting = next(iter(difflib.get_close_matches(setting, mics_settings(), n=1)), "")
    value = yaml_scalar(entry.value) if isinstance(entry.value, bool | str) else str(entry.value)
    if setting in CARRIED:
        section, key = CARRIED[setting]
        place = f"in {section}" if section else "at the top level"
        return f"is not carried by this name. Write it as {key}: {value}, {place}"
    variable = f"MICS_{setting.upper()}={value}" if setting else "settings such as MICS_HIERARCHICAL=false"
    return (
        "is not carried by Accelerate. Such settings of MiCS travel as environment variables: remove the line, and put "
        f"{variable} in front of accelerate launch"
    )


def _check_launcher(file: _LaunchFile) -> None:
    top = file.sections[""]
    place = top.get("compute_environment")
    if place is not None and place.value != "LOCAL_MACHINE":
        file.problem(place, "starts the run elsewhere and carries no sizes. Change it to LOCAL_MACHINE")
    kind = top.get("distributed_type")
    works = "FSDP, which starts one process a rank on CPUs too"
    if kind is None:
        file.missing("", f"distributed_type is missing. Add the line distributed_type: {works}")
    elif kind.value != "FSDP":
        # A bare NO is false to YAML.
        word = "NO" if kind.value is False else str(kind.value).upper()
        does = "starts the processes for DDP and leaves fsdp_config out" if word.startswith("MULTI_") else "is unknown"
        file.problem(kind, f"{_OTHER_TYPES.get(word, does)}. Change it to {works}")
    for engine in _OTHER_ENGINES:
        if engine in top and top[engine].value:
            file.problem(top[engine], "does not go together with MiCS, which would ignore it. Remove the section")


def _check_sizes(file: _LaunchFile) -> dict[str, Any]:
    """Returns shard size, processes and machines."""
    # 0 stands for what is wrong or missing, so that everything that follows from it is left out.
    processes, machines = _check_processes(file) or 0, file.integer("", "num_machines", 1, 1, 1) or 0
    fits = bool(processes and machines) and processes % machines == 0
    if processes and machines and not fits:
        file.problem(
            file.get("", "num_processes"),
            f"cannot be spread evenly over num_machines: {machines}. Change it to "
            f"{even_numbers(processes, machines)}, or num_machines to {listing(divisors(processes))}",
        )
    each = processes // machines if fits else 8
    _check_sections(file, each)
    shard = file.integer("parallelism_config", SHARD, 0, 1, each) or 0
    replicas = file.integer("parallelism_config", REPLICATE, 1, 1, max(1, processes // (shard or each))) or 0
    if fits and shard and replicas:
        _check_product(file, launch_topology(processes, machines), shard, replicas)
    return {"shard_size": shard, "num_processes": processes, "num_machines": machines}


def _check_processes(file: _LaunchFile) -> int | None:
    example = _at_least_one(file, SHARD, 8) * _at_least_one(file, REPLICATE, 1)
    if file.get("", "num_processes") is None:
        file.missing("", f"num_processes is missing. Add a line such as num_processes: {example}")
    return file.integer("", "num_processes", None, 1, example)


def _at_least_one(file: _LaunchFile, key: str, default: int) -> int:
    entry = file.get("parallelism_config", key)
    return entry.value if entry is not None and isinstance(entry.value, int) and entry.value > 0 else default


def _check_sections(file: _LaunchFile, shard_size: int) -> None:
    """Checks that both sections are there, and that sizes MiCS does not know are 1."""
    size = f"{SHARD}: {shard_size}"
    for section, example in (("parallelism_config", size), ("fsdp_config", "fsdp_version: 2")):
        entry = file.sections[""].get(section)
        if entry is None or not entry.value:
            file.missing(section, f"is missing or empty. Add '{section}:' and, indented below it, '{example}'")
    if file.sections["parallelism_config"] and file.get("parallelism_config", SHARD) is None:
        file.missing("parallelism_config", f"has no {SHARD}, and Accelerate then takes 1. Add a line such as {size}")
    for kind in ("tp", "cp", "sp"):
        entry = file.get("parallelism_config", f"parallelism_config_{kind}_size")
        if entry is not None and entry.value != 1:
            file.problem(
                entry, "does not go together with MiCS, which only has partitions and replicas. Change it to 1"
            )


def _check_product(file: _LaunchFile, topology: ClusterTopology, shard: int, replicas: int) -> None:
    shard_line, world = file.get("parallelism_config", SHARD), topology.world_size
    topology = _pretended(file, topology)
    if shard not in topology.valid_shard_sizes():
        why = f"does not divide num_processes: {world}"
        if world % shard == 0:
            why = (
                f"makes partition groups straddle nodes ({topology.num_nodes} of {topology.node_size} ranks): a "
                "partition must fit into a node or fill whole nodes"
            )
        file.problem(shard_line, f"{why}. Change it to {listing(topology.valid_shard_sizes())}")
    elif shard * replicas != world:
        replica_line = file.get("parallelism_config", REPLICATE)
        why = (
            f"makes {shard} shard(s) x {replicas} replica(s) = {shard * replicas} processes, not num_processes: {world}"
        )
        if replica_line is None:
            file.problem(shard_line, f"{why}. Add the line {REPLICATE}: {world // shard}")
        else:
            file.problem(replica_line, f"{why}. Change it to {world // shard}")
    variable = os.environ.get("MICS_SHARD_SIZE")
    if variable is not None and variable.strip() not in (str(shard), "auto"):
        file.problem(
            shard_line,
            f"contradicts MICS_SHARD_SIZE={variable} of the environment. Unset the variable, or change the line",
        )


def _pretended(file: _LaunchFile, topology: ClusterTopology) -> ClusterTopology:
    """Returns the topology with the nodes that ``MICS_NODE_SIZE`` asks for."""
    node_size = os.environ.get("MICS_NODE_SIZE")
    if node_size is None:
        return topology
    try:
        return ClusterTopology(world_size=topology.world_size, node_size=yaml.safe_load(node_size))
    except (MiCSConfigError, yaml.YAMLError):
        file.problem(
            None,
            f"MICS_NODE_SIZE={node_size} of the environment does not divide num_processes: {topology.world_size}. Set "
            f"it to {listing(divisors(topology.world_size))}, or unset it",
        )
        return topology


def _check_machines(file: _LaunchFile, machines: int) -> dict[str, Any]:
    """Returns the settings that belong to machines and precision."""
    rank = file.integer("", "machine_rank", 0, 0, 0)
    if machines and rank is not None and rank >= machines:
        works = "0" if machines == 1 else f"one of 0 to {machines - 1}"
        file.problem(file.get("", "machine_rank"), f"is not one of num_machines: {machines}. Change it to {works}")
    return {
        "machine_rank": rank or 0,
        "main_process_ip": _check_ip(file, machines),
        "main_process_port": _check_port(file, machines),
        "mixed_precision": _check_precision(file),
        "cpu": file.switch("", "use_cpu", False),
    }


def _check_ip(file: _LaunchFile, machines: int) -> str | None:
    entry = file.get("", "main_process_ip")
    if entry is not None and entry.value is not None:
        if not isinstance(entry.value, str) or not entry.value.strip():
            file.problem(entry, "is not an address. Change it to the one of machine 0, such as 10.0.0.1")
        return str(entry.value)
    if machines > 1:
        file.problem(
            entry or file.get("", "num_machines"),
            "needs the address of machine 0, where the others reach it. Add a line such as main_process_ip: 10.0.0.1",
        )
    return None


def _check_port(file: _LaunchFile, machines: int) -> int:
    entry = file.get("", "main_process_port")
    if entry is None or entry.value is None:
        return DEFAULT_PORT
    port = file.integer("", "main_process_port", DEFAULT_PORT, 0, DEFAULT_PORT)
    if port is not None and port > 65535:
        file.problem(entry, f"is above 65535. Change it to {DEFAULT_PORT}")
    elif port == 0 and machines > 1:
        file.problem(
            entry, f"takes any free port, and all {machines} machines must know it. Change it to {DEFAULT_PORT}"
        )
    return port or 0


def _check_precision(file: _LaunchFile) -> str:
    entry = file.get("", "mixed_precision")
    if entry is None or entry.value is None:
        return "fp16" if file.switch("", "fp16", False) else "no"  # Accelerate's old way of asking for it
    if entry.value is False:
        file.problem(entry, "means false to YAML, which Accelerate does not take. Change it to 'no', with the quotes")
        return "no"
    if entry.value == "fp8":
        file.problem(entry, "is not a precision of MiCS. Change it to bf16, fp16 or 'no'")
        return "no"
    return file.word("", "mixed_precision", "no", PRECISIONS)


def _check_fsdp(file: _LaunchFile) -> dict[str, Any]:
    """Returns the settings in ``fsdp_config``."""
    section = "fsdp_config"
    if file.sections[section]:
        _check_version(file)
    _check_policy(file)
    if file.switch(section, "fsdp_activation_checkpointing_offload", False):
        entry = file.get(section, "fsdp_activation_checkpointing_offload")
        file.problem(entry, "is not something MiCS does. Change it to false")
    full = file.word(section, "fsdp_state_dict_type", "SHARDED_STATE_DICT", ("SHARDED_STATE_DICT", "FULL_STATE_DICT"))
    return {
        "reshard_after_forward": _check_reshard(file),
        "activation_checkpointing": file.switch(section, "fsdp_activation_checkpointing", False),
        "cpu_offload": file.switch(section, "fsdp_offload_params", False),
        "full_checkpoint": full == "FULL_STATE_DICT",
        "wrap": _check_classes(file),
    }


def _check_version(file: _LaunchFile) -> None:
    entry = file.get("fsdp_config", "fsdp_version")
    if entry is None:
        file.missing("fsdp_config", "has no fsdp_version, and Accelerate then takes 1. Add the line fsdp_version: 2")
    elif str(entry.value) != "2":
        file.problem(entry, "is not what MiCS is built on. Change it to 2")


def _check_reshard(file: _LaunchFile) -> bool:
    entry = file.get("fsdp_config", "fsdp_reshard_after_forward")
    reshards = _STRATEGIES.get(str(entry.value).upper()) if entry is not None else None
    if reshards is None:
        return file.switch("fsdp_config", "fsdp_reshard_after_forward", True)
    file.problem(entry, f"is a word of FSDP version 1. Change it to {yaml_scalar(reshards)}")
    return reshards


def _check_policy(file: _LaunchFile) -> None:
    entry = file.get("fsdp_config", "fsdp_auto_wrap_policy")
    if entry is not None and str(entry.value).upper() != "TRANSFORMER_BASED_WRAP":
        file.problem(
            entry,
            "is not how MiCS finds units. Remove the line (MiCS finds them by itself), or change it to "
            "TRANSFORMER_BASED_WRAP and name classes in fsdp_transformer_layer_cls_to_wrap",
        )


def _check_classes(file: _LaunchFile) -> str | None:
    entry = file.get("fsdp_config", "fsdp_transformer_layer_cls_to_wrap")
    if entry is None or entry.value is None:
        return None
    try:
        return check_wrap(entry.value)
    except MiCSConfigError:
        file.problem(
            entry, "is not a list of class names. Separate them by commas in one line, as in GPT2Block,Embedding"
        )
        return None


def _check_strategy(file: _LaunchFile, sizes: Mapping[str, int], reshard: bool) -> None:
    """Checks FSDP 1's word for what the sizes and switches say; version 2 does not read it."""
    entry = file.get("fsdp_config", "fsdp_sharding_strategy")
    if entry is None:
        return
    numbered = dict(enumerate(_STRATEGIES, start=1))
    word = numbered.get(int(entry.value)) if str(entry.value).isdigit() else str(entry.value).upper().lstrip("_")
    shard, node_size = sizes["shard_size"], sizes["num_processes"] // max(1, sizes["num_machines"])
    if word not in _STRATEGIES:
        file.problem(entry, "is unknown, and FSDP version 2 does not read it. Remove the line")
    elif word == "NO_SHARD" and shard > 1:
        file.problem(entry, f"contradicts {SHARD}: {shard}, and FSDP version 2 does not read it. Remove the line")
    elif word.startswith("HYBRID") and shard and shard != node_size:
        file.problem(
            entry, f"shards over a machine ({node_size} ranks) and contradicts {SHARD}: {shard}. Remove the line"
        )
    elif _STRATEGIES[word] is not None and _STRATEGIES[word] != reshard:
        file.problem(
            entry,
            f"contradicts fsdp_reshard_after_forward: {yaml_scalar(reshard)}, and FSDP version 2 does not read it. "
            "Remove the line",
        )
