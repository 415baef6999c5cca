"""What is special about tracing models of Hugging Face."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_mics.trace.steps import Sample


def text_config(model: nn.Module) -> Any:
    """Returns the configuration of a model's text part; ``None`` if it has none."""
    config = getattr(model, "config", None)
    return getattr(config, "get_text_config", lambda: config)()


def longest_sequence(model: nn.Module) -> int | None:
    """Returns the tokens that a model takes at most; ``None`` if its configuration does not tell."""
    config = text_config(model)
    lengths = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return next((length for length in lengths if isinstance(length, int)), None)


def share_of_experts(model: nn.Module) -> tuple[int, float]:
    """Returns how many experts a model's layers have, and which share of them a token meets; 0 and 1 without any."""
    config = text_config(model)
    counts = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    experts = next((count for count in counts if isinstance(count, int) and count > 1), 0)
    used = getattr(config, "num_experts_per_tok", None)
    return (experts, used / experts) if experts and isinstance(used, int) else (0, 1.0)


def kept_in_float32(model: nn.Module) -> tuple[str, ...]:
    """Returns names of modules that a model has in float32 whatever else; nobody quantizes them."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def without_idle_mask(model: nn.Module, sample: Sample) -> Sample:
    """Leaves out a mask that masks nothing: models look into it and pass none on, which fake tensors cannot tell."""
    mask = sample.get("attention_mask") if isinstance(sample, Mapping) and hasattr(model, "config") else None
    if isinstance(sample, Mapping) and isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_meta and mask.all():
        return {key: value for key, value in sample.items() if key != "attention_mask"}
    return sample


@contextmanager
def plain_sequences() -> Iterator[None]:
    """Keeps models from building a mask for packed samples, which on fake tensors they always expect."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    name = "find_packed_sequence_indices"
    found = getattr(masking, name, None)
    if found is None:
        yield
        return
    setattr(masking, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(masking, name, found)
