"""What tests of the ways in share: a value of every setting that is not its default, as files and variables say it."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_mics import MiCSConfig

OTHER_VALUES: dict[str, Any] = {
    "shard_size": 2,
    "node_size": 4,
    "hierarchical": False,
    "wrap": ["Block", "Linear"],
    "ignore": ["scale"],
    "reshard_after_forward": False,
    "param_dtype": "bfloat16",
    "reduce_dtype": "bfloat16",
    "output_dtype": "float16",
    "cast_forward_inputs": "units",
    "activation_checkpointing": ["Block", "Linear"],
    "cpu_offload": True,
    "verify": False,
    "memory_limit": "36GiB",
    "verify_every": 100,
    "on_mismatch": "repair",
    "async_checkpoint": True,
    "optimizer_shard_size": "world",
    "replication_reduce_dtype": "bfloat16",
    "replication_gather_dtype": "bfloat16",
    "master_weights": "owners",
    "activation_checkpointing_offload": True,
    "uneven_inputs": "longest",
}


def other_settings() -> list[tuple[str, Any, MiCSConfig]]:
    """Returns each setting with another value than its default, and the config that has it."""
    names = [field.name for field in dataclasses.fields(MiCSConfig)]
    assert names == list(OTHER_VALUES), "OTHER_VALUES lacks a setting"
    found = [(name, OTHER_VALUES[name], MiCSConfig(**{name: OTHER_VALUES[name]})) for name in names]
    assert all(config != MiCSConfig() for _, _, config in found)
    return found
