"""Small models with adapters of PEFT, in the forms in which people use them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from models import SEQUENCE, VOCABULARY, build, language_loss
from torch import Tensor, nn
from torch.nn import functional

ATTENTION = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens", "bert": "word_embeddings"}
HEAD = {"gpt2": "lm_head", "llama": "lm_head", "bert": "decoder"}
FORMS = {
    "LoRA": {},
    "all linear layers": {"target_modules": "all-linear"},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "LoRA on an embedding": {"target_modules": ["EMBEDDING"]},
    "DoRA on an embedding": {"target_modules": ["EMBEDDING"], "use_dora": True},
    "LoRA on an embedding and its tied head": {"target_modules": ["EMBEDDING"], "ensure_weight_tying": True},
    "trainable tokens": {"trainable_token_indices": [1, 3, 7]},
    "trainable tokens, tied": {"trainable_token_indices": [1, 3, 7], "ensure_weight_tying": True},
    "a head of its own": {"modules_to_save": ["HEAD"]},
    "an embedding of its own": {"modules_to_save": ["EMBEDDING"]},
    "an embedding and its tied head": {"modules_to_save": ["EMBEDDING"], "ensure_weight_tying": True},
    "trained biases": {"bias": "lora_only"},
}


def base(name: str) -> nn.Module:
    """Returns a model with large weights, so that adapters matter; the head of each is tied to its embedding."""
    model: Any = build(name)
    if name == "llama":
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        model.config.tie_word_embeddings = True
        model = LlamaForCausalLM(model.config)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(3)
    return model


def settings(name: str, form: str) -> Any:
    """Returns the ``LoraConfig`` of a form for a model."""
    from peft import LoraConfig

    names = {"EMBEDDING": EMBEDDING[name], "HEAD": HEAD[name]}
    asked = {
        key: [names.get(entry, entry) for entry in value] if isinstance(value, list) else value
        for key, value in FORMS[form].items()
    }
    own = "EMBEDDING" in FORMS[form].get("target_modules", ())  # type: ignore[attr-defined]
    return LoraConfig(
        **{"r": 2, "lora_alpha": 4, "target_modules": ATTENTION[name], **asked},
        fan_in_fan_out=name == "gpt2" and not own,
    )


def adapted(name: str, form: str, names: tuple[str, ...] = ("default",)) -> Any:
    """Returns a model with adapters whose product is not zero."""
    from peft import get_peft_model

    warnings.simplefilter("ignore")  # PEFT tells what merging does to tied weights
    model = base(name)
    torch.manual_seed(1)
    model = get_peft_model(model, settings(name, form), adapter_name=names[0])
    for other in names[1:]:
        model.add_adapter(other, settings(name, form))
    for key, param in model.named_parameters():
        if "lora_B" in key or "lora_embedding_A" in key:
            nn.init.normal_(param, std=0.1)
    return model


def tokens(step: int, num_rows: int) -> Tensor:
    """Returns the global batch of a step, ``[num_rows, SEQUENCE]``."""
    return torch.randint(0, VOCABULARY, (num_rows, SEQUENCE), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, first: int, rank: int | None = None, world: int = 4) -> None:
    """Takes two steps, on the rows of one rank or of all."""
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.3, momentum=0.9)
    for step in (first, first + 1):
        rows = tokens(step, 2 * world)
        language_loss(model, rows if rank is None else rows[2 * rank : 2 * rank + 2]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Returns logits of the same rows on every rank."""
    found: Tensor = model(input_ids=tokens(99, 2)).logits
    return found


class Int8(Tensor):
    """A weight of 8 bits with a scale for each row, made as torchao makes its own, and with none of its operations."""

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor, dtype: torch.dtype, size: Any = None) -> Int8:
        made: Int8 = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape if size is None else size, dtype=dtype, device=values.device
        )
        return made

    def __init__(self, values: Tensor, scales: Tensor, dtype: torch.dtype, size: Any = None) -> None:
        self.values, self.scales = values, scales

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["values", "scales"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Int8:
        return cls(parts["values"], parts["scales"], dtype, size)

    def __deepcopy__(self, memo: Any) -> Int8:
        return type(self)(self.values.clone(), self.scales.clone(), self.dtype, self.shape)

    def dequantize(self) -> Tensor:
        return (self.values * self.scales).to(self.dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.linear:
            rows, weight = args[:2]
            return _Product.apply(rows, [weight])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


class Int4(Int8):
    """A weight of 4 bits, two in a byte, with a scale for each 64 of them."""

    def dequantize(self) -> Tensor:
        weights = torch.empty(self.shape, dtype=self.dtype).flatten()
        weights[0::2], weights[1::2] = self.values[:, 0] & 15, self.values[:, 0] >> 4
        weights.sub_(8).view(-1, 64).mul_(self.scales.unsqueeze(1))
        return weights.view(self.shape)


class _Product(torch.autograd.Function):
    """Multiplies rows with a weight, which is unpacked in both passes and not kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: list[Int8]) -> Tensor:
        ctx.weight = weight
        return functional.linear(rows, weight[0].dequantize().to(rows.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.weight[0].dequantize().to(grad.dtype), None


def own_int4(weight: Tensor) -> nn.Parameter:
    blocks = weight.view(-1, 64)
    scales = (blocks.abs().amax(1) / 7).float()
    values = (blocks / scales.unsqueeze(1)).round().add(8).to(torch.uint8).view(-1, 2)
    packed = (values[:, :1] | values[:, 1:] << 4).contiguous()
    return nn.Parameter(Int4(packed, scales, weight.dtype, weight.shape), requires_grad=False)


def own_int8(weight: Tensor) -> nn.Parameter:
    scales = (weight.abs().amax(1, keepdim=True) / 127).float()
    return nn.Parameter(Int8((weight / scales).round().to(torch.int8), scales, weight.dtype), requires_grad=False)


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a Llama whose linear layers in blocks hold weights of 4 or 8 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 288, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY + 1, max_position_embeddings=SEQUENCE, use_cache=False, **sizes)
    model: Any = LlamaForCausalLM(config).to(dtype)
    model.model.requires_grad_(False)
    quantize(model.model, kind)
    if kind.startswith("bitsandbytes"):
        setattr(model, "is_loaded_in_8bit" if kind.endswith("8") else "is_loaded_in_4bit", True)
    return model


def quantize(model: nn.Module, kind: str) -> None:
    """Gives linear layers that are frozen weights of 4 or 8 bits."""
    if kind.startswith("bitsandbytes"):
        return _by_bitsandbytes(model, kind)
    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        return quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: _is_frozen(module))
    makers = {"own int8": own_int8, "own int4": own_int4, "torchao nf4": _nf4}
    for module in filter(_is_frozen, model.modules()):
        module.weight = makers[kind](module.weight.detach())


def _is_frozen(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not module.weight.requires_grad


def _nf4(weight: Tensor) -> nn.Parameter:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return nn.Parameter(to_nf4(weight, 64, 4), requires_grad=False)


def _by_bitsandbytes(model: nn.Module, kind: str) -> None:
    import bitsandbytes

    own = bitsandbytes.nn
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if not _is_frozen(layer):
                continue
            size, dtype = (layer.in_features, layer.out_features), layer.weight.dtype
            if kind.endswith("8"):
                made = own.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
                made.weight = own.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
            else:
                storage = torch.bfloat16 if kind.endswith("bfloat16") else torch.uint8
                options = {"quant_type": "nf4", "quant_storage": storage}
                options["compress_statistics"] = not kind.endswith("single")
                made = own.Linear4bit(*size, bias=False, compute_dtype=dtype, **options)
                made.weight = own.Params4bit(layer.weight.detach(), requires_grad=False, module=made, **options)
            setattr(module, name, made.to("cpu"))
