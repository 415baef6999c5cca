"""Models to plan for, by name: known shapes, a Hugging Face configuration, or a function of the user's own.

All are built on the meta device: they take no memory, and nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.profile import DEFAULT_LENGTH
from lightning_mics.text import did_you_mean
from lightning_mics.trace.steps import tensors_in

Sample = dict[str, Tensor]


def _gpt(layers: int, hidden: int, heads: int, positions: int = 1024, vocabulary: int = 50257) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "n_positions": positions,
        "vocab_size": vocabulary,
    }


def _bert(layers: int, hidden: int, heads: int, vocabulary: int = 30522) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
    }


def _llama(
    layers: int,
    hidden: int,
    heads: int,
    intermediate: int,
    *,
    key_value_heads: int | None = None,
    positions: int = 4096,
    vocabulary: int = 32000,
    family: str = "Llama",
) -> dict[str, Any]:
    return {
        "model_type": family.lower(),
        "architectures": [f"{family}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads or heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "vocab_size": vocabulary,
    }


def _experts(family: str, shape: dict[str, Any], used: int, **settings: Any) -> dict[str, Any]:
    return {**shape, "architectures": [f"{family}ForCausalLM"], "num_experts_per_tok": used, **settings}


# Shapes as published, except for gpt3-13b, whose heads would not divide the width (5140 in the paper's table). The
# large BERTs have the sizes of those in the MiCS paper (Zhang et al., VLDB 2022); their shapes were not checked.
_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": _gpt(12, 768, 12),
    "gpt2-medium": _gpt(24, 1024, 16),
    "gpt2-large": _gpt(36, 1280, 20),
    "gpt2-xl": _gpt(48, 1600, 25),
    "gpt3-2.7b": _gpt(32, 2560, 32, positions=2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, positions=2048),
    "gpt3-13b": _gpt(40, 5120, 40, positions=2048),
    "gpt3-175b": _gpt(96, 12288, 96, positions=2048),
    # No published model: the shape that is near 12 layers h^2 = 100e9 with heads of 128.
    "gpt-100b": _gpt(80, 10240, 80, positions=2048),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "bert-10b": _bert(127, 2560, 40, vocabulary=32008),
    "bert-15b": _bert(190, 2560, 40, vocabulary=32008),
    "bert-20b": _bert(64, 5120, 40, vocabulary=32008),
    "bert-50b": _bert(62, 8192, 64, vocabulary=32008),
    "llama-2-7b": _llama(32, 4096, 32, 11008),
    "llama-2-13b": _llama(40, 5120, 40, 13824),
    "llama-2-70b": _llama(80, 8192, 64, 28672, key_value_heads=8),
    "llama-3-8b": _llama(32, 4096, 32, 14336, key_value_heads=8, positions=8192, vocabulary=128256),
    "llama-3-70b": _llama(80, 8192, 64, 28672, key_value_heads=8, positions=8192, vocabulary=128256),
    "mistral-7b": _llama(32, 4096, 32, 14336, key_value_heads=8, positions=32768, family="Mistral"),
    "mixtral-8x7b": _experts(
        "Mixtral",
        _llama(32, 4096, 32, 14336, key_value_heads=8, positions=32768),
        used=2,
        model_type="mixtral",
        num_local_experts=8,
    ),
    "qwen3-30b-a3b": _experts(
        "Qwen3Moe",
        _llama(48, 2048, 32, 6144, key_value_heads=4, positions=40960, vocabulary=151936),
        used=8,
        model_type="qwen3_moe",
        num_experts=128,
        moe_intermediate_size=768,
        head_dim=128,
    ),
    "tinyllama": _llama(22, 2048, 32, 5632, key_value_heads=4, positions=2048),
}


def known_models() -> list[str]:
    """Returns the built-in names."""
    return list(_SHAPES)


def build_model(
    name_or_path: str | os.PathLike[str],
    *,
    sequence_length: int | None = None,
    attention: str | None = None,
    device: str = "meta",
    layers: int | None = None,
) -> tuple[nn.Module, Sample | Any, str]:
    """Builds a model, by default without memory.

    Args:
        name_or_path: A built-in name (see :func:`known_models`), the path of a Hugging Face ``config.json`` or of its
            folder, or ``"module:factory"``, a function that returns a module, or a module and a sample.
        sequence_length: Tokens of the sample; by default the longest that the model takes, but at most 8192 where its
            positions have no table.
        attention: Name of the attention in transformers; by default its own choice.
        device: Where it is built.
        layers: How many layers it gets at most, where it is described by a configuration.

    Returns:
        The model on the device; a batch of one sample as the model takes it, on the meta device (what a factory
        returned, ``None`` if it returned none); and the model's name.

    Raises:
        MiCSConfigError: If the name is unknown, the file is no configuration, the factory fails, or the model cannot
            take samples of that length.
    """
    if sequence_length is not None and sequence_length < 1:
        raise MiCSConfigError(f"sequence_length={sequence_length} must be at least 1. Try sequence_length=1024.")
    name = os.fspath(name_or_path)
    key = name.lower().replace("_", "-")
    chosen = {} if attention is None else {"attn_implementation": attention}
    if key in _SHAPES:
        return _from_config({**_SHAPES[key], **chosen}, key, key, sequence_length, device, layers)
    path = Path(name).expanduser()
    if path.exists() or path.suffix == ".json" or not isinstance(name_or_path, str):
        return _from_file(path, sequence_length, chosen, device, layers)
    if ":" in name:
        if chosen:
            raise MiCSConfigError(f"attention={attention!r} is a setting of transformers' models. Set it in {name}().")
        return _from_factory(name, device)
    raise MiCSConfigError(
        f"Model {name!r} is not known, and no such file exists. {did_you_mean(key, _SHAPES, cutoff=0.5)} Values that "
        f"work: {', '.join(_SHAPES)}; the path of a Hugging Face config.json; or 'module:factory', a function that "
        "returns your model.".replace("  ", " ")
    )


def _from_file(
    path: Path, sequence_length: int | None, chosen: dict[str, str], device: str, layers: int | None
) -> tuple[nn.Module, Sample, str]:
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise MiCSConfigError(
            f"{file} cannot be read ({error.strerror or error}). Pass a Hugging Face config.json or its folder."
        ) from error
    except ValueError as error:
        raise MiCSConfigError(f"{file} is no JSON file ({error}). Pass a Hugging Face config.json.") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise MiCSConfigError(
            f"{file} is no configuration of Hugging Face: it names no 'model_type'. Add one, for example "
            '"model_type": "llama".'
        )
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return _from_config({**values, **chosen}, name, str(file), sequence_length, device, layers)


def _from_config(
    values: dict[str, Any], name: str, where: str, sequence_length: int | None, device: str, layers: int | None
) -> tuple[nn.Module, Sample, str]:
    transformers = _transformers()
    kind = values.pop("model_type")
    known = sorted(transformers.CONFIG_MAPPING.keys())
    if kind not in known:
        hint = did_you_mean(kind, known, "Pass 'module:factory', a function that builds your model.")
        raise MiCSConfigError(
            f"{where}: model_type={kind!r} is not known to transformers {transformers.__version__}. {hint}"
        )
    _refuse_mistyped(values, transformers.CONFIG_MAPPING[kind], where)
    try:
        config = transformers.AutoConfig.for_model(kind, **values)
        config.use_cache = False
        if layers is not None and isinstance(getattr(config, "num_hidden_layers", None), int):
            config.num_hidden_layers = min(layers, config.num_hidden_layers)
        with torch.device(device):
            model = _build(transformers, config)
    except MiCSConfigError:
        raise
    except Exception as error:
        raise MiCSConfigError(
            f"{where}: transformers cannot build the model from its configuration: {_first_line(error)}. Check the "
            "numbers in it."
        ) from error
    if getattr(model, "loss_type", "") is None:
        model.__dict__["loss_type"] = "ForCausalLM"  # what transformers takes then anyway, with a warning
    return model, _sample(model, config, name, sequence_length), name


def _refuse_mistyped(values: dict[str, Any], kind: Any, where: str) -> None:
    """Refuses unknown keys that look like those of a shape: transformers would ignore them, and plan another model."""
    try:
        known = {*kind().to_dict(), *kind.attribute_map}
    except Exception:  # it has no defaults
        return
    for key, value in values.items():
        if key in known or not isinstance(value, int) or isinstance(value, bool) or key.endswith("_id"):
            continue
        if hint := did_you_mean(key, sorted(known.difference(values)), cutoff=0.85):
            raise MiCSConfigError(f"{where}: key {key!r} is unknown to {kind.__name__}. {hint} If not, remove it.")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MiCSConfigError(
            "Models by name need transformers. Install it with pip install 'lightning-mics[transformers]'."
        ) from error
    return transformers


def _build(transformers: Any, config: Any) -> nn.Module:
    """Builds the class that the configuration names, else one with a loss, in ``float32`` as training keeps it."""
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if found is not None:
            model: nn.Module = found(config)
            return model
    is_pair = getattr(config, "is_encoder_decoder", False)
    for auto in (
        *([transformers.AutoModelForSeq2SeqLM] if is_pair else []),
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModel,
    ):
        if type(config) in auto._model_mapping:
            return auto.from_config(config, dtype=torch.float32)
    raise MiCSConfigError(
        f"transformers has no model for {type(config).__name__}. Name a class in 'architectures', or pass "
        "'module:factory', a function that builds your model."
    )


def _sample(model: nn.Module, config: Any, name: str, sequence_length: int | None) -> Sample:
    takes = inspect.signature(model.forward).parameters
    if "input_ids" in takes:
        length = _checked_length(model, config, name, sequence_length)
        return {"input_ids": torch.empty((1, length), dtype=torch.long, device="meta")}
    size = getattr(config, "image_size", None)
    if "pixel_values" in takes and size is not None:
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.empty((1, channels, height, width), device="meta")}
    raise MiCSConfigError(
        f"{name}: no sample is known for {type(model).__name__}, which takes {', '.join(list(takes)[:6])}. Pass "
        "'module:factory', a function that returns your model and a sample."
    )


def _checked_length(model: nn.Module, config: Any, name: str, sequence_length: int | None) -> int:
    table = _positions(model)
    if table is not None and sequence_length is not None and sequence_length > table:
        raise MiCSConfigError(
            f"sequence_length={sequence_length}, but {name} has positions for {table} tokens. Use at most {table}, or "
            "raise the positions in its configuration."
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH
    return sequence_length or table or min(longest, DEFAULT_LENGTH)


def _positions(model: nn.Module) -> int | None:
    """Returns for how many tokens a model has a table of positions; ``None`` if it has none."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and last in {"wpe", "position_embeddings", "embed_positions"}:
            # RoBERTa and OPT begin behind rows that no token uses.
            unused = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - unused
    return None


def _from_factory(name: str, device: str) -> tuple[nn.Module, Any, str]:
    factory = _load(name)
    try:
        with torch.device(device):
            result = factory()
    except Exception as error:
        raise MiCSConfigError(
            f"{name}() failed with {type(error).__name__}: {_first_line(error)}. It is called without arguments, and "
            + (
                "its tensors are on the meta device, without values."
                if device == "meta"
                else f"on the device {device}."
            )
        ) from error
    model, sample = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise MiCSConfigError(
            f"{name}() returned a {type(model).__name__}. Return a torch.nn.Module, or a module and a sample."
        )
    return model, sample, name.rpartition(":")[2]


def _load(name: str) -> Callable[[], Any]:
    module_name, _, attribute = name.partition(":")
    with _working_directory():
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise MiCSConfigError(
                f"{name}: module {error.name!r} does not exist here. Run in the folder that holds it, or install it."
            ) from error
        except Exception as error:
            raise MiCSConfigError(
                f"{name}: importing {module_name} failed with {type(error).__name__}: {_first_line(error)}."
            ) from error
    for part in attribute.split("."):
        names = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
        found = getattr(found, part, None)
        if found is None:
            hint = did_you_mean(part, names, f"It has: {', '.join(names[:12])}.")
            raise MiCSConfigError(f"{name}: {module_name} has no {part!r}. {hint}")
    if not callable(found):
        raise MiCSConfigError(f"{name} is a {type(found).__name__}. Name a function that returns a torch.nn.Module.")
    factory: Callable[[], Any] = found
    return factory


@contextmanager
def _working_directory() -> Iterator[None]:
    """Finds modules of the working directory, as ``python -m`` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def typical_layer(name_or_path: str | os.PathLike[str], sequence_length: int | None) -> tuple[int, int]:
    """Returns the width of a model's layers, and the tokens of a sample.

    Args:
        name_or_path: As for :func:`build_model`.
        sequence_length: Tokens of a sample; by default the longest that the model takes.

    Raises:
        MiCSConfigError: As :func:`build_model` does.
    """
    model, sample, _ = build_model(name_or_path, sequence_length=sequence_length)
    widths = Counter(param.shape[-1] for param in model.parameters() if param.dim() == 2)
    width = widths.most_common(1)[0][0] if widths else 1024
    tokens = [tensor.shape[1] for tensor in tensors_in(sample) if tensor.dim() == 2]
    return width, (tokens[0] if tokens else 512)
