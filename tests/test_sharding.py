"""``mics_shard`` takes models as they come, and every replica starts from the same values."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from models import BUILDERS, WIDTH, Block, Regressor, build, loss_of, microbatch, regression_loss
from parity import Case, Outcome, check, rows_of, train_all
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics import MiCSConfig, MiCSConfigError, MiCSError, communication_ledger, mics_shard
from lightning_mics.core.runtime import runtime_of
from lightning_mics.testing import WorkerPool, full_state_dict
from lightning_mics.topology import Recomputation

CONFIG = MiCSConfig(shard_size=2, node_size=2)


def gather_states(model: nn.Module) -> list[dict[str, Tensor]]:
    """Returns the whole model as each rank has it."""
    states: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(states, full_state_dict(model))
    return states


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Buffered(Regressor):
    """Buffers of several kinds, one of them not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("noise", torch.randn(3, 2))
        self.register_buffer("hidden", torch.randn(4), persistent=False)
        self.register_buffer("mask", torch.rand(5) > 0.5)
        self.register_buffer("wave", torch.randn(3, dtype=torch.complex64))
        self.norm = nn.BatchNorm1d(5)


def unseeded() -> list[str]:
    torch.manual_seed(100 + dist.get_rank())
    model, first = Buffered(), None
    if dist.get_rank() == 0:
        first = {**model.state_dict(), "hidden": model.hidden}
        first = {name: value.detach().clone() for name, value in first.items()}
    mics_shard(model, CONFIG)
    box = [first]
    dist.broadcast_object_list(box)
    expected = box[0]
    assert expected is not None
    actual = {**full_state_dict(model), "hidden": model.hidden}
    return [name for name in expected if not torch.equal(actual[name], expected[name])]


def test_unseeded_ranks_start_from_the_values_of_rank_0(pool: WorkerPool) -> None:
    assert pool.run(unseeded, world_size=4) == [[]] * 4


def shapes(name: str) -> tuple[int, list[str]]:
    """Returns how many elements the ranks of a partition hold together, and what is wrong."""
    model = mics_shard(build(name), CONFIG)
    partition = runtime_of(model).mesh.partition_group
    local = torch.tensor(sum(param.to_local().numel() for param in model.parameters()))
    dist.all_reduce(local, group=partition)
    wrong = [n for n, p in model.named_parameters() if not isinstance(p, DTensor) or p.device_mesh.size() != 2]
    return int(local), wrong


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_partition_holds_every_element_once(pool: WorkerPool, name: str) -> None:
    total = sum(param.numel() for param in build(name).parameters())
    assert pool.run(shapes, name, world_size=4) == [(total, [])] * 4


# --- models on the meta device ----------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Buffers that only the module itself can compute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.empty(6, 2, dtype=torch.complex64), persistent=False)
        self.register_buffer("causal", torch.empty(3, 3, dtype=torch.bool), persistent=False)
        self.register_buffer("places", torch.empty(4, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.angles.copy_(torch.polar(torch.ones(6, 2), torch.arange(12.0).view(6, 2)))
        self.causal.copy_(torch.ones(3, 3).tril())
        self.places.copy_(torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Scaled(nn.Module):
    """Like GPT-2, a module without parameters of its own that initialises its child's in a special way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.inner.weight, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.rotary = Rotary()
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.scaled = Scaled()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.scaled(self.rotary(self.first(x))))
        x = self.attention(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = block(x)
        return x.sum(1, keepdim=True)


def materialized(build_model: Callable[[], nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Returns the model's tensors and buffers, and how many ranks see others."""
    torch.manual_seed(7 + dist.get_rank())
    with torch.device("meta"):
        model = build_model()
    mics_shard(model, CONFIG)
    states = gather_states(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return states[0], buffers, sum(not same(states[0], other) for other in states)


def meta_gpt2() -> nn.Module:
    return BUILDERS["gpt2"]()


def meta_bert() -> nn.Module:
    from transformers import BertForMaskedLM

    return BertForMaskedLM(BUILDERS["bert"]().config)


def meta_llama() -> nn.Module:
    return BUILDERS["llama"]()


@pytest.mark.parametrize("build_model", [Deep, meta_gpt2, meta_bert, meta_llama])
def test_a_model_on_meta_is_initialised_like_any_other(pool: WorkerPool, build_model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    normal = build_model()
    for state, buffers, num_others in pool.run(materialized, build_model, world_size=4):
        assert num_others == 0
        expected = dict(normal.named_buffers())
        assert buffers.keys() == expected.keys()
        assert all(torch.equal(buffers[name], expected[name]) for name in expected)
        for name, param in normal.state_dict().items():
            value = state[name]
            assert value.shape == param.shape and not value.isnan().any()
            if param.is_floating_point() and param.unique().numel() == 1:  # a constant, such as zero biases
                assert torch.equal(value, param), name
            elif param.is_floating_point() and param.numel() >= 48:
                assert 0.6 < value.std() / param.std() < 1.6, name


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class BareFlag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flags", torch.ones(4, dtype=torch.bool))


def on_meta(part: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), part())
    mics_shard(model, CONFIG)


@pytest.mark.parametrize(("part", "tensor"), [(Bare, "Bare.scale"), (BareFlag, "BareFlag.flags")])
def test_what_nobody_initialises_is_an_error_on_every_rank(
    pool: WorkerPool, part: type[nn.Module], tensor: str
) -> None:
    for failure in pool.attempt(on_meta, part, world_size=2):
        assert failure.kind == "MiCSConfigError"
        assert f"{tensor} was built on the meta device" in failure.message
        assert "reset_parameters()" in failure.message


class Faulty(nn.Linear):
    """Cannot be initialised on one rank."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not self.weight.is_meta and dist.get_rank() == 1:
            raise OSError("the file of rank 1 is not there")


def test_one_rank_that_cannot_initialise_a_unit_is_an_error_on_all(pool: WorkerPool) -> None:
    for rank, failure in enumerate(pool.attempt(on_meta, functools.partial(Faulty, 2, 2), world_size=4)):
        assert failure.kind == ("OSError" if rank == 1 else "MiCSError")
        assert "the file of rank 1 is not there" in failure.message
        assert rank == 1 or "Rank 1 could not build its part" in failure.message


def without_initialiser() -> bool:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), Bare()))
    with pytest.raises(MiCSConfigError, match=r"Bare\.scale was built on the meta device"):
        mics_shard(model, CONFIG.replace(activation_checkpointing=True, wrap="Sequential"))
    return all(param.is_meta and not isinstance(param, DTensor) for param in model.parameters())


def test_what_nothing_could_initialise_is_found_before_anything_is_changed(pool: WorkerPool) -> None:
    assert pool.run(without_initialiser, world_size=2) == [True] * 2


# --- models that are out of the ordinary ------------------------------------------------------------------------------


class MixedBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm.double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x.double()).float())))


class Mixed(Regressor):
    """Trainable parameters of two dtypes, and a frozen one of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MixedBlock() for _ in range(2))
        self.last.double()
        self.table = nn.Embedding(4, 5).bfloat16().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.table(torch.zeros(len(x), dtype=torch.int64)).float())
        for block in self.blocks:
            x = block(x)
        return self.last(torch.tanh(self.narrow(x)).double()).float()


class Idle(nn.Module):
    """Modules without parameters between others, a frozen half, and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Identity(), nn.Linear(5, 4), nn.Dropout(0.0), nn.Sequential(), nn.Linear(4, 1))
        self.spare = nn.ModuleDict({"empty": nn.ModuleList()})

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Encoder(nn.Module):
    """PyTorch's own transformer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.first = nn.Linear(5, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).view(-1, 2, WIDTH)
        padding = torch.stack([torch.zeros(len(hidden), dtype=torch.bool), hidden[:, 1, 0] > 0], 1)
        return self.last(self.encoder(hidden, src_key_padding_mask=padding)).view(-1, 1)


EXTRA = {"mixed": Mixed, "idle": Idle, "encoder": Encoder}


def train_extra(cases: list[Case]) -> list[Outcome]:
    BUILDERS.update(EXTRA)
    return train_all(cases)


@pytest.mark.parametrize("name", EXTRA)
def test_unusual_models_train_like_in_one_process(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(BUILDERS, name, EXTRA[name])
    check(pool, [Case(name, 4, 2, 2, 2), Case(name, 4, 4, 2, 2)], train_extra)


def wrap_by_function() -> list[str]:
    # A function's address differs between ranks; what it selects does not.
    model = mics_shard(build("uneven"), CONFIG.replace(wrap=lambda module: isinstance(module, Block)))
    regression_loss(model, microbatch("uneven", 0, 2)).backward()
    return communication_ledger(model).units()


def test_units_may_be_chosen_by_a_function(pool: WorkerPool) -> None:
    assert pool.run(wrap_by_function, world_size=2) == [["(root)", "blocks.0", "blocks.1"]] * 2


def drop() -> bool:
    model = mics_shard(build("uneven"), CONFIG)
    regression_loss(model, microbatch("uneven", 0, 2)).backward()
    alive = weakref.ref(model)
    del model
    gc.collect()
    return alive() is not None


def test_a_dropped_model_is_freed(pool: WorkerPool) -> None:
    assert pool.run(drop, world_size=2) == [False, False]


def gathers_of_recomputation(checkpointing: Recomputation) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Regressor()
    model.blocks = nn.ModuleList(nn.Sequential(Block(), nn.Dropout(0.5)) for _ in range(2))
    mics_shard(model, CONFIG.replace(activation_checkpointing=checkpointing))
    torch.manual_seed(5 + dist.get_rank())
    regression_loss(model, microbatch("uneven", dist.get_rank(), 4)).backward()
    return {name: param.grad.full_tensor() for name, param in model.named_parameters() if param.grad is not None}


def both_ways() -> bool:
    plain = gathers_of_recomputation(False)
    return all(same(gathers_of_recomputation(how), plain) for how in (True, 2, "selective"))


def test_recomputed_activations_drop_out_the_same_units(pool: WorkerPool) -> None:
    assert pool.run(both_ways, world_size=4) == [True] * 4


def optimizer_first() -> list[bool]:
    model = build("gpt2")
    decayed = [param for param in model.parameters() if param.dim() > 1]
    others = [param for param in model.parameters() if param.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2)
    mics_shard(model, CONFIG, optimizer=optimizer)
    held = [param for group in optimizer.param_groups for param in group["params"]]
    before = full_state_dict(model)
    loss_of("gpt2", model, rows_of(Case("gpt2", 2, 2, 2), 0)).backward()
    optimizer.step()
    return [
        all(isinstance(param, DTensor) for param in held) and len(held) == len(list(model.parameters())),
        not same(before, full_state_dict(model)),
    ]


def optimizer_after_steps() -> None:
    model = build("uneven")
    optimizer = torch.optim.AdamW(model.parameters())
    regression_loss(model, microbatch("uneven", 0, 2)).backward()
    optimizer.step()
    mics_shard(model, CONFIG, optimizer=optimizer)


def test_an_optimizer_made_before_sharding_follows_its_parameters(pool: WorkerPool) -> None:
    assert pool.run(optimizer_first, world_size=2) == [[True, True]] * 2
    for failure in pool.attempt(optimizer_after_steps, world_size=2):
        assert failure.kind == "MiCSConfigError" and "has taken steps already" in failure.message


def not_sharded() -> None:
    communication_ledger(nn.Linear(2, 2))


def test_a_plain_model_has_no_ledger(pool: WorkerPool) -> None:
    with pytest.raises(MiCSError, match="Linear is not sharded by MiCS"):
        not_sharded()
    assert issubclass(MiCSConfigError, MiCSError)
