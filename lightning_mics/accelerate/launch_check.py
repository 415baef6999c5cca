"""Reads a file for ``accelerate launch --config_file``; finds what is wrong with it, and in which line."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_mics.accelerate.launch_settings import (
    DEFAULT_PORT,
    FIXED,
    LINES,
    REPLICATE,
    SHARD,
    LaunchSettings,
    check_replicas,
    mics_settings,
    yaml_scalar,
)
from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import did_you_mean, listing, nearest
from lightning_mics.topology import check_positive_int
from lightning_mics.yaml_text import describe_error, read_text

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
    "MULTI_GPU": "starts the processes for DDP and leaves fsdp_config out",
    "DEEPSPEED": "hands the model to DeepSpeed",
    "MEGATRON_LM": "hands the model to Megatron-LM",
}
_FIXED = {
    **FIXED,
    ("", "compute_environment"): ("LOCAL_MACHINE", "starts the run elsewhere and carries no sizes"),
    ("fsdp_config", "fsdp_auto_wrap_policy"): (
        "TRANSFORMER_BASED_WRAP",
        "is not how MiCS finds units; without the line it finds them by itself",
    ),
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
_STATE_DICT_TYPES = {"SHARDED_STATE_DICT": False, "FULL_STATE_DICT": True}
_NEEDED = (
    ("", "distributed_type", "FSDP"),
    ("", "num_processes", 8),
    ("fsdp_config", "fsdp_version", 2),
    ("parallelism_config", SHARD, 4),
)
# Without these, nothing can be said about the others.
_FIRST = ("num_processes", "num_machines", "shard_size", "main_process_ip")
_SETTING_PREFIX = re.compile(r"^(fsdp_|parallelism_config_)?(mics_)?")


def read_settings(path: Path) -> tuple[LaunchFile, LaunchSettings | None]:
    """Reads and checks a launch file.

    Returns:
        The file with the problems that were found, and what it says if that could be told.

    Raises:
        MiCSConfigError: If it cannot be read at all.
    """
    file = LaunchFile.read(path)
    _check_keys(file)
    _check_needed(file)
    _check_fixed(file)
    settings = _settings(file)
    if settings is not None:
        _check_replicas(file, settings)
        _check_strategy(file, settings)
    return file, settings


def check_keys(path: Path) -> None:
    """Checks that Accelerate knows every line of a launch file; it drops those that it does not, without a word.

    Raises:
        MiCSConfigError: Listing the unknown lines, with what to do about each.
    """
    file = LaunchFile.read(path)
    file.problems.clear()
    _check_keys(file)
    file.raise_problems()


@dataclass(frozen=True)
class _Entry:
    """A key of the file with its value; ``source`` is how the two are written there."""

    key: str
    value: Any
    line: int
    source: str


@dataclass
class LaunchFile:
    """The entries of a launch file by section (the top level is ``""``), and what is wrong with them."""

    path: Path
    sections: dict[str, dict[str, _Entry]] = field(default_factory=lambda: {section: {} for section in _KNOWN})
    problems: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> LaunchFile:
        """Reads a file; notes lines that are there twice, and sections that are none."""
        if not path.exists():
            raise MiCSConfigError(f"{path} does not exist. Write it with: mics config --output {path}")
        file, text = cls(path), read_text(path, "Give a YAML file such as mics.yaml.")
        try:
            root = yaml.compose(text, yaml.SafeLoader)
            if not isinstance(root, yaml.MappingNode):
                raise MiCSConfigError(
                    f"{path} holds no settings, but must have lines like 'num_processes: 8'. Write one with: mics "
                    "config"
                )
            file._fill("", root, text.splitlines())
        except yaml.YAMLError as error:
            raise MiCSConfigError(describe_error(text, str(path), error, "'num_processes: 8'")) from error
        return file

    def _fill(self, section: str, node: yaml.MappingNode, lines: list[str]) -> None:
        entries = self.sections[section]
        for key_node, value_node in node.value:
            key, value = str(key_node.value), yaml.SafeLoader("").construct_document(value_node)
            start, end = key_node.start_mark, value_node.end_mark
            one_line = isinstance(value_node, yaml.ScalarNode) and start.line == end.line
            source = lines[start.line][start.column : end.column] if one_line else f"{key}:"
            entry = _Entry(key, value, start.line + 1, source.strip())
            if key in entries:
                self.problem(entry, f"is there twice, in line {entries[key].line} too. Remove one of the lines")
            entries[key] = entry
            if section == "" and key in self.sections:
                if isinstance(value_node, yaml.MappingNode):
                    self._fill(key, value_node, lines)
                elif value is not None:
                    self.problem(entry, f"is not a section. Write '{key}:', and its settings indented below it")

    def get(self, section: str, key: str) -> _Entry | None:
        """Returns a line, if it is there and not empty."""
        entries = self.sections[section]
        # Accelerate puts the prefix in front where it is missing.
        entry = entries.get(key) or (entries.get(key.removeprefix("fsdp_")) if section == "fsdp_config" else None)
        return None if entry is None or entry.value is None else entry

    def problem(self, where: _Entry | None, text: str) -> None:
        """Notes what is wrong with a line, or, without one, with the file."""
        text = text if text.endswith((".", "?")) else f"{text}."
        self.problems.append((where.line, f", line {where.line}: {where.source} {text}") if where else (0, f": {text}"))

    def note(self, error: MiCSConfigError) -> None:
        """Notes what is wrong with a setting, in the words of the file."""
        entry, text = None, str(error)
        if error.setting in LINES:
            section, key = LINES[error.setting]
            entry = self.get(section, key) or self.sections[""].get(section)
        if entry is not None:
            written = f"{error.setting}={entry.value!r}"
            text = entry.source + text.removeprefix(written) if text.startswith(written) else text
        text = text.replace(", 'node' or 'world'", "")  # Accelerate takes numbers only
        for name in [*LINES, *mics_settings()]:
            text = re.sub(rf"\b{name}=", f"{LINES[name][1]}: " if name in LINES else f"MICS_{name.upper()}=", text)
        line = entry.line if entry is not None else 0
        self.problems.append((line, f", line {line}: {text}" if line else f": {text}"))

    def raise_problems(self) -> None:
        """Lists what was noted, in the order of the lines.

        Raises:
            MiCSConfigError: If anything was.
        """
        found = [f"{self.path}{text}" for _, text in sorted(self.problems)]
        if len(found) > 1:
            found = [f"{self.path} has {len(found)} problems:", *(f"  {text}" for text in found)]
        if found:
            raise MiCSConfigError("\n".join(found))


def _check_keys(file: LaunchFile) -> None:
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
    return f"{fate}. {did_you_mean(entry.key, sorted(known[section]), 'Remove it', show=str)}"


def _advise_setting(entry: _Entry, setting: str) -> str:
    found = nearest(setting, mics_settings())
    value = yaml_scalar(entry.value) if isinstance(entry.value, bool | str) else str(entry.value)
    if found in LINES:
        section, key = LINES[found]
        place = f"in {section}" if section else "at the top level"
        return f"is not carried by this name. Write it as {key}: {value}, {place}"
    variable = f"MICS_{found.upper()}={value}" if found else "settings such as MICS_HIERARCHICAL=false"
    return (
        "is not carried by Accelerate. Such settings of MiCS travel as environment variables: remove the line, and put "
        f"{variable} in front of accelerate launch"
    )


def _check_needed(file: LaunchFile) -> None:
    for section, key, example in _NEEDED:
        header = file.sections[""].get(section)
        if file.get(section, key) is not None or (header is not None and not isinstance(header.value, dict | None)):
            continue
        line = f"'{key}: {example}'"
        if header is not None:
            file.problem(header, f"has no {key}. Add a line such as {line}, indented below it")
        elif section:
            file.problem(None, f"{section} is missing. Add '{section}:' and, indented below it, a line such as {line}")
        else:
            file.problem(None, f"{key} is missing. Add a line such as {line}")


def _check_fixed(file: LaunchFile) -> None:
    """Checks lines of which only one value goes together with MiCS."""
    for (section, key), (works, why) in _FIXED.items():
        entry = file.get(section, key)
        if entry is not None and str(entry.value).lower() != works.lower():
            file.problem(entry, f"{why}. Change it to {works}")
    kind = file.get("", "distributed_type")
    if kind is not None and kind.value != "FSDP":
        word = "NO" if kind.value is False else str(kind.value).upper()  # a bare NO is false to YAML
        why = _OTHER_TYPES.get(word, "is unknown here")
        file.problem(kind, f"{why}. Change it to FSDP, which starts one process a rank on CPUs too")
    for engine in _OTHER_ENGINES:
        entry = file.get("", engine)
        if entry is not None and entry.value:
            file.problem(entry, "does not go together with MiCS, which would ignore it. Remove the section")


def _settings(file: LaunchFile) -> LaunchSettings | None:
    """Returns what the file says; where a single setting is wrong, it is noted, and the others are checked still."""
    values: dict[str, Any] = {"main_process_port": DEFAULT_PORT}
    for setting in dataclasses.fields(LaunchSettings):
        entry = file.get(*LINES[setting.name])
        if entry is not None:
            values[setting.name] = _value(file, setting.name, entry)
    if file.get("", "fp16") is not None and file.get("", "mixed_precision") is None:  # Accelerate's old way to ask
        values["mixed_precision"] = "fp16" if file.sections[""]["fp16"].value is True else "no"
    while "num_processes" in values and "shard_size" in values:
        try:
            return LaunchSettings(**values)
        except MiCSConfigError as error:
            file.note(error)
            if error.setting in _FIRST or error.setting not in values:
                break
            del values[error.setting]
    return None


def _value(file: LaunchFile, setting: str, entry: _Entry) -> Any:
    word = str(entry.value)
    if setting == "mixed_precision" and entry.value is False:
        file.problem(entry, "means false to YAML, which Accelerate does not take. Change it to 'no', with the quotes")
        return "no"
    if setting == "full_checkpoint":
        if word not in _STATE_DICT_TYPES:
            file.problem(entry, f"is not known here. Values that work: {listing([*_STATE_DICT_TYPES])}")
        return _STATE_DICT_TYPES.get(word, False)
    if setting == "reshard_after_forward" and _STRATEGIES.get(word.upper()) is not None:
        reshards = _STRATEGIES[word.upper()]
        file.problem(entry, f"is a word of FSDP version 1. Change it to {str(reshards).lower()}")
        return reshards
    return word.lower() == "true" if word.lower() in ("true", "false") else entry.value


def _check_replicas(file: LaunchFile, settings: LaunchSettings) -> None:
    entry = file.get("parallelism_config", REPLICATE)
    replicas = 1 if entry is None else entry.value
    try:
        check_positive_int("replicas", replicas, settings.layout.num_replicas)
        check_replicas(settings.shard_size, replicas, settings.num_processes)
    except MiCSConfigError as error:
        file.note(error)


def _check_strategy(file: LaunchFile, settings: LaunchSettings) -> None:
    """Checks FSDP 1's word for what the sizes and switches say; version 2 does not read it."""
    entry = file.get("fsdp_config", "fsdp_sharding_strategy")
    if entry is None:
        return
    numbered = {str(number): word for number, word in enumerate(_STRATEGIES, start=1)}
    word = numbered.get(str(entry.value), str(entry.value).upper())
    shard, node_size, reshard = settings.shard_size, settings.layout.topology.node_size, settings.reshard_after_forward
    problem = ""
    if word not in _STRATEGIES:
        problem = "is unknown"
    elif word == "NO_SHARD" and shard > 1:
        problem = f"contradicts {SHARD}: {shard}"
    elif word.startswith("HYBRID") and shard != node_size:
        problem = f"shards over a machine ({node_size} ranks), contradicts {SHARD}: {shard}"
    elif _STRATEGIES[word] not in (None, reshard):
        problem = f"contradicts fsdp_reshard_after_forward: {str(reshard).lower()}"
    if problem:
        file.problem(entry, f"{problem}, and FSDP version 2 does not read it. Remove the line")
