"""Small models that hold what real ones hold: ties, frozen and unused parameters, odd shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, SEQUENCE = 23, 8, 6


class Block(nn.Module):
    """A residual block whose first dimensions divide nothing."""

    def __init__(self, width: int = WIDTH, hidden: int = 7) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Regressor(nn.Module):
    """Blocks between two layers with fewer rows than there are ranks; takes ``[rows, 5]``, returns ``[rows, 1]``."""

    def __init__(self, num_blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.narrow = nn.Linear(WIDTH, 3)
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(torch.tanh(self.narrow(x)))


class Frozen(Regressor):
    """A whole frozen block, single frozen parameters, and a frozen root layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)
        self.blocks[0].up.bias.requires_grad_(False)
        self.first.requires_grad_(False)


class Twice(Regressor):
    """Every block runs twice in a forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.last(torch.tanh(self.narrow(x)))


class TiedBlocks(Regressor):
    """Two blocks, units of their own, share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].down.weight = self.blocks[0].down.weight


class SharedBlock(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        block = Block()
        self.blocks = nn.ModuleList([block, Block(), block])
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Routed(nn.Module):
    """Runs the block that the data asks for.

    Takes ``[rows, 7]``: five features, the number of the block that the row goes through (-1 for none), and whether the
    row is shifted by a parameter. A block whose number no row has does not run at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.shift = nn.ParameterList([torch.ones(WIDTH), torch.ones(WIDTH)])
        self.never = nn.Linear(2, 2)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, rows: Tensor) -> Tensor:
        route, shifted = rows[:, 5].long(), rows[:, 6] > 0
        x = self.first(rows[:, :5])
        for index, block in enumerate(self.blocks):
            chosen = route == index
            if chosen.any():
                x = x.index_put((chosen,), block(x[chosen]))
        if shifted.any():
            x = x + self.shift[0] * shifted[:, None]
        return self.last(x)


def regression_loss(model: nn.Module, rows: Tensor) -> Tensor:
    target = rows[:, :5].sin().sum(1, keepdim=True)
    return functional.mse_loss(model(rows).to(target.dtype), target)  # torch 2.11 takes no two dtypes


def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits
    return functional.cross_entropy(logits.flatten(0, 1), ((tokens * 5 + 2) % VOCABULARY).flatten())


def tiny_gpt2(num_layers: int = 2) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=SEQUENCE,
        n_embd=WIDTH,
        n_layer=num_layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=11,
        max_position_embeddings=SEQUENCE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    # Attention does not depend on key biases. Starting from zero they would hold nothing but rounding noise.
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(param, -0.1, 0.1)
    return model


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "uneven": Regressor,
    "frozen": Frozen,
    "twice": Twice,
    "tied": TiedBlocks,
    "shared": SharedBlock,
    "routed": Routed,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "llama": tiny_llama,
}
LANGUAGE_MODELS = ("gpt2", "bert", "llama")


def build(name: str, seed: int = 0) -> nn.Module:
    """Returns the model of that name; its weights depend on the seed only."""
    torch.manual_seed(seed)
    return BUILDERS[name]()


def loss_of(name: str, model: nn.Module, rows: Tensor) -> Tensor:
    """Returns the mean loss of the model of that name over the rows."""
    return (language_loss if name in LANGUAGE_MODELS else regression_loss)(model, rows)


def microbatch(name: str, step: int, num_rows: int) -> Tensor:
    """Returns the global batch of one microstep, ``[num_rows, ...]``."""
    generator = torch.Generator().manual_seed(1000 + step)
    if name in LANGUAGE_MODELS:
        return torch.randint(0, VOCABULARY, (num_rows, SEQUENCE), generator=generator)
    return torch.randn(num_rows, 5, generator=generator)


def nothing(model: nn.Module) -> None:
    """Leaves the gradients alone."""


def scale(model: nn.Module) -> None:
    """Halves the gradients in place, as a loss scaler does."""
    for param in model.parameters():
        if param.grad is not None:
            param.grad.mul_(0.5)


def replace(model: nn.Module) -> None:
    """Puts twice the gradients in their place."""
    for param in model.parameters():
        if param.grad is not None:
            param.grad = param.grad * 2
