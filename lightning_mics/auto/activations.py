"""A model's profile, traced with a sample where there is one that works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lightning_mics.auto.sample import Sample
from lightning_mics.config import MiCSConfig
from lightning_mics.plan.profile import ModelProfile
from lightning_mics.plan.search import UNKNOWN_ACTIVATIONS
from lightning_mics.trace import LeakedTensorsError, profile_model
from lightning_mics.trace.huggingface import longest_sequence
from lightning_mics.trace.steps import mean_of_outputs
from lightning_mics.trace.structure import dtype_name


def profile_with(
    model: nn.Module, sample: Sample | None, config: MiCSConfig, device_type: str
) -> tuple[ModelProfile, list[str]]:
    """Returns a model's profile, and what was assumed.

    Args:
        model: The model, not sharded.
        sample: What a rank computes with in a microstep, if that is known.
        config: The settings.
        device_type: ``"cuda"`` or ``"cpu"``.
    """

    def profile(batch: Any, **options: Any) -> ModelProfile:
        return profile_model(
            model,
            batch,
            wrap=config.wrap,
            param_dtype=None if config.param_dtype is None else dtype_name(config.param_dtype),
            device_type="cpu" if device_type == "cpu" else "cuda",
            **options,
        )

    notes: list[str] = []
    if sample is not None:
        traced, note = _trace(profile, sample)
        notes.append(note)
        if traced is not None:
            return traced, notes
    tokens = longest_sequence(model)
    estimate = profile(None, sequence_length=tokens)
    if estimate.knows_activations:
        micro_batch = 1 if sample is None else sample.micro_batch
        notes.append(
            f"Activations follow a formula, for micro-batches of {micro_batch} with {tokens} tokens each; a sample "
            "would tell more."
        )
    else:
        notes.append(
            f"Without a sample nothing is known of activations: {UNKNOWN_ACTIVATIONS:.0%} of the memory is kept free "
            "for them."
        )
    return estimate, notes


def _trace(profile: Callable[..., ModelProfile], sample: Sample) -> tuple[ModelProfile | None, str]:
    failure = ""
    for batch, loss in _attempts(sample):
        try:
            return profile(batch, loss=loss), f"Activations are those of micro-batches of {sample.micro_batch}."
        except LeakedTensorsError:
            raise
        except Exception as error:
            failure = failure or f"{type(error).__name__}: {error}"
    return None, f"The model cannot be traced with its sample ({' '.join(failure.split())[:200]})."


def _attempts(sample: Sample) -> Iterator[tuple[Any, Any]]:
    """Yields a batch, and how to get a loss from it: ``None`` for a step's own."""
    batch = sample.batch
    yield batch, mean_of_outputs if sample.through_forward else None
    if isinstance(batch, list | tuple) and len(batch) > 1:
        # Inputs and targets, of which forward takes the first.
        yield batch[0], mean_of_outputs
