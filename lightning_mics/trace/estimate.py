"""Profiles without a sample, from shapes and published formulas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_mics.core.units import backward_order
from lightning_mics.plan.profile import DEFAULT_LENGTH, Amount, ModelProfile, Param, Unit
from lightning_mics.trace.huggingface import longest_sequence, text_config
from lightning_mics.trace.structure import Key, Structure


def estimate(structure: Structure, name: str | None, sequence_length: int | None) -> ModelProfile:
    """Estimates a profile from shapes.

    Without the shape of a transformer, only the products with weights count, as in ``6 N D`` of Kaplan et al., "Scaling
    Laws for Neural Language Models", 2020. Activations of transformer blocks are those of Korthikanti et al., "Reducing
    Activation Recomputation in Large Transformer Models", 2022: ``s h (34 + 5 a s / h)`` bytes a sample at 16 bits,
    without the second term where attention is computed in one piece.
    """
    shape = _Shape.of(structure.model)
    figures: dict[Key, Unit] = {}
    if sequence_length is None and shape is not None and (positions := longest_sequence(structure.model)) is not None:
        sequence_length = min(positions, DEFAULT_LENGTH)
    if shape is not None and sequence_length is not None:
        source, width = "formula", structure.compute_dtype.itemsize
        for unit in structure.units:
            # Embeddings, which may be units, have fewer matrices than a block.
            if sum(len(param.shape) > 1 for param in structure.params[unit]) >= 4:
                figures[unit] = _block(shape, structure.params[unit], sequence_length, width)
                figures[unit] = _unpacking(figures[unit], structure.params[unit], width)
        figures[None] = _root(shape, sequence_length, width)
    else:
        source = "shapes only"
        for key in (None, *structure.units):
            figures[key] = _figures(
                _matmul_flops(structure.params[key], sequence_length or 1), len(structure.params[key])
            )
    order = backward_order(structure.model, structure.units)
    return structure.profile(figures, order, name=name, sequence_length=sequence_length, source=source)


@dataclass(frozen=True)
class _Shape:
    """The shape of a transformer."""

    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    is_gated: bool
    is_flash: bool

    @classmethod
    def of(cls, model: nn.Module) -> _Shape | None:
        """Reads it from the configuration of a Hugging Face model; ``None`` if there is none."""
        config = text_config(model)

        def get(*names: str) -> Any:
            return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

        hidden, heads = get("hidden_size", "n_embd", "d_model"), get("num_attention_heads", "n_head")
        vocabulary = get("vocab_size")
        if not all(isinstance(value, int) for value in (hidden, heads, vocabulary)):
            return None
        return cls(
            hidden=hidden,
            heads=heads,
            intermediate=get("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
            vocabulary=vocabulary,
            is_gated=get("hidden_act", "activation_function") in ("silu", "swish"),
            is_flash=get("_attn_implementation") not in (None, "eager"),
        )


def _figures(flops: float, num_params: int = 0, **bytes_per_sample: float) -> Unit:
    amounts: dict[str, Any] = {name: Amount(per_sample=size) for name, size in bytes_per_sample.items()}
    return Unit(
        name="",
        params=(),
        forward_flops=flops,
        backward_flops=2 * flops,
        forward_launches=2 * num_params,  # as blocks of GPT-2 have it
        backward_launches=3 * num_params,
        **amounts,
    )


def _matmul_flops(params: Iterable[Param], tokens: int) -> float:
    return 2.0 * sum(param.weights for param in params if len(param.shape) > 1) * tokens


def _block(shape: _Shape, params: Sequence[Param], tokens: int, width: int) -> Unit:
    hidden, wide = tokens * shape.hidden * width, tokens * shape.intermediate * width
    masks = 2 * tokens * shape.hidden
    saved = 8 * hidden + (4 if shape.is_gated else 2) * wide + masks
    if not shape.is_flash:
        saved += shape.heads * tokens**2 * (2 * width + 1)
    return _figures(
        _matmul_flops(params, tokens) + 4.0 * tokens**2 * shape.hidden,
        len(params),
        saved=saved,
        checkpoint=hidden,
        forward_extra=wide,
        checkpoint_extra=saved - hidden + wide,
        backward_extra=hidden + 2 * wide,
    )


def _unpacking(block: Unit, params: Iterable[Param], width: int) -> Unit:
    """Adds the largest of the quantized weights, which are unpacked one at a time."""
    largest = Amount(fixed=width * max((param.weights for param in params if param.is_quantized), default=0))
    names = ("forward_extra", "checkpoint_extra", "backward_extra")
    return replace(block, **{name: getattr(block, name) + largest for name in names})


def _root(shape: _Shape, tokens: int, width: int) -> Unit:
    """Embeddings, a last norm, and a head whose loss is computed in float32."""
    hidden, logits = tokens * shape.hidden, tokens * shape.vocabulary
    saved, extra = 3 * hidden * width + 4 * logits, (width + 4) * logits
    return _figures(
        2.0 * hidden * shape.vocabulary, saved=saved, checkpoint=saved, forward_extra=extra, backward_extra=extra
    )
