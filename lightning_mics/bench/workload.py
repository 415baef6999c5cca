"""What the benchmarks train: a GPT-2 on real text, with blocks that can stand for slow or fast accelerators."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

_TEXT_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Size of the GPT-2.

    Attributes:
        layers: Number of blocks.
        width: Hidden size.
        sequence: Tokens of a sample.
        vocabulary: Different tokens; bytes by default.
    """

    layers: int = 8
    width: int = 192
    sequence: int = 16
    vocabulary: int = 256


def build_model(spec: ModelSpec, seed: int = 0, device: torch.device | None = None) -> GPT2LMHeadModel:
    """Returns the model with the same weights on every rank; without dropout, so that losses can be compared.

    Args:
        spec: Its size.
        seed: Of its weights.
        device: Where to build it; on CPUs by default.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=spec.vocabulary,
        n_positions=spec.sequence,
        n_embd=spec.width,
        n_layer=spec.layers,
        n_head=max(1, spec.width // 64),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    with nullcontext() if device is None else device:
        return GPT2LMHeadModel(config)


@functools.cache
def unit_bytes(spec: ModelSpec) -> tuple[int, int]:
    """Returns the bytes of the parameters of all blocks, and of what is outside of them."""
    model = build_model(spec)
    blocks = sum(param.nbytes for block in blocks_of(model) for param in block.parameters())
    return blocks, sum(param.nbytes for param in model.parameters()) - blocks


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks that become FSDP units."""
    return [module for module in model.modules() if type(module).__name__ == "GPT2Block"]


@functools.cache
def _text() -> Tensor:
    from lightning_mics.demo.data import standard_library_text

    text = "".join(standard_library_text(_TEXT_BYTES)).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def microbatch(spec: ModelSpec, size: int, number: int, rank: int, world_size: int) -> Tensor:
    """Returns the tokens ``[size, sequence]`` of one rank's microstep; different ones for each rank and number."""
    text = _text()
    first = (number * world_size + rank) * size
    last_start = len(text) - spec.sequence
    starts = [((first + index) * 9973) % last_start for index in range(size)]
    return torch.stack([text[start : start + spec.sequence] for start in starts])


class _Delay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, seconds: tuple[float, float], note: Callable[[float], None]) -> Tensor:
        ctx.backward_seconds, ctx.note = seconds[1], note
        _sleep(seconds[0], note)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _sleep(ctx.backward_seconds, ctx.note)
        return grads[0], None, None


def _sleep(seconds: float, note: Callable[[float], None]) -> None:
    begin = time.perf_counter()
    if seconds > 0:
        time.sleep(seconds)
    note(time.perf_counter() - begin)


def emulate_compute(
    model: nn.Module, seconds: Callable[[], tuple[float, float]], note: Callable[[float], None]
) -> None:
    """Makes each block's forward and backward take a given time longer, without using the CPU.

    So many ranks on few cores can stand for accelerators: the ratio of compute to communication is the one asked for.

    Args:
        model: The model; its blocks get a hook.
        seconds: Asked for the time of the forward and of the backward pass of a block, at each forward pass.
        note: Told the seconds of each wait, also where it was zero; once in a block's forward, once in its
            backward pass.
    """

    def delay(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _Delay.apply(args[0], seconds(), note), *args[1:]

    for block in blocks_of(model):
        # Inside of the block, as real compute: hooks of the block itself gather ahead, before it begins.
        next(block.children()).register_forward_pre_hook(delay)
