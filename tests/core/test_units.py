"""Which modules become units, read off the model."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from accelerate.utils import compile_regions
from models import Block, Regressor, SharedBlock, TiedBlocks, tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from works import works

from lightning_mics import MiCSConfigError
from lightning_mics.core.units import Unit, backward_order, plan_units, unit_names


def names_of(model: nn.Module, units: list[Unit]) -> list[tuple[str, ...]]:
    names = {module: name for name, module in model.named_modules()}
    return [tuple(names[module] for module in unit) for unit in units]


def plan(model: nn.Module, wrap: object = "auto") -> list[tuple[str, ...]]:
    return names_of(model, plan_units(model, wrap))  # type: ignore[arg-type]


def test_hugging_face_models_split_where_they_say() -> None:
    assert plan(tiny_gpt2(3)) == [("transformer.h.0",), ("transformer.h.1",), ("transformer.h.2",)]
    assert plan(tiny_llama()) == [("model.layers.0",), ("model.layers.1",)]
    # BERT's list holds its embeddings, whose weight the decoder shares, whose bias the head around it shares.
    assert plan(tiny_bert()) == [
        ("bert.embeddings.word_embeddings", "cls.predictions"),
        ("bert.embeddings",),
        ("bert.encoder.layer.0",),
        ("bert.encoder.layer.1",),
    ]


def test_a_model_around_a_hugging_face_model_splits_alike() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny_gpt2()
            self.head = nn.Linear(8, 2)

    assert plan(Classifier()) == [("backbone.transformer.h.0",), ("backbone.transformer.h.1",)]


def test_repeated_blocks_are_units() -> None:
    assert plan(Regressor()) == [("blocks.0",), ("blocks.1",)]
    assert plan(nn.Sequential(nn.Linear(2, 2), nn.Sequential(Block(), Block()))) == [("1.0",), ("1.1",)]


def test_blocks_between_other_layers_are_units() -> None:
    model = nn.Sequential(nn.Linear(2, 4), Block(), Block(), nn.Linear(4, 4), Block(), nn.Linear(4, 2))
    assert plan(model) == [("1",), ("2",), ("4",)]
    stages = nn.Sequential(nn.Linear(2, 4), nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()))
    assert plan(stages) == [("1.0",), ("1.1",), ("2.0",), ("2.1",)]


def mlp(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


class ConvNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))


@works("Model kinds", "Nested Sequentials (wrap='auto')")
def test_stages_without_blocks_in_them_are_blocks() -> None:
    assert plan(nn.Sequential(mlp(), mlp(), mlp(), nn.Linear(4, 2))) == [("0",), ("1",), ("2",)]
    assert plan(nn.Sequential(nn.Linear(4, 8), mlp(8), mlp(8))) == [("1",), ("2",)]
    assert plan(nn.Sequential(nn.Sequential(mlp(), mlp()), nn.Linear(4, 2))) == [("0.0",), ("0.1",)]
    named = OrderedDict(a=nn.Sequential(nn.Linear(4, 4)), b=nn.Sequential(nn.Linear(4, 4)), head=nn.Linear(4, 2))
    assert plan(nn.Sequential(named)) == [("a",), ("b",)]
    assert plan(nn.Sequential(nn.Conv1d(2, 2, 1), ConvNorm(), ConvNorm(), nn.Linear(2, 2))) == [("1",), ("2",)]


def test_stages_with_blocks_in_them_are_split_into_these() -> None:
    stem, head = ConvNorm(), nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model = nn.Sequential(stem, nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()), head, nn.Tanh())
    assert plan(model) == [("1.0",), ("1.1",), ("2.0",), ("2.1",)]


@works("Model kinds", "Blocks in a ModuleDict (wrap='auto')")
def test_members_of_a_dictionary_are_blocks_unless_they_hold_some() -> None:
    assert plan(nn.ModuleDict({"embed": nn.Linear(2, 4), "a": Block(), "b": Block()})) == [("a",), ("b",)]
    sides = nn.ModuleDict({side: nn.Sequential(Block(), Block()) for side in ("encoder", "decoder")})
    assert plan(sides) == [("encoder.0",), ("encoder.1",), ("decoder.0",), ("decoder.1",)]
    lists = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(), Block()])])
    assert plan(lists) == [("0.0",), ("0.1",), ("1.0",), ("1.1",)]


def test_blocks_of_different_widths_are_units() -> None:
    down, up = (
        nn.ModuleList([mlp(4), mlp(8), mlp(16)]),
        nn.ModuleList([nn.Linear(16, 8), mlp(8), nn.Linear(8, 4), mlp(4)]),
    )
    units = plan(nn.ModuleDict({"down": down, "up": up}))
    assert units == [("down.0",), ("down.1",), ("down.2",), ("up.1",), ("up.3",)]


def test_small_blocks_do_not_keep_a_larger_module_whole() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(512, 512), nn.Linear(512, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.narrow(self.wide(x))

    assert plan(nn.Sequential(Large(), Block(), Block())) == [("0.wide",), ("0.narrow",)]


def test_pytorchs_own_transformer_is_split_into_its_layers_and_no_deeper() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert plan(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)) == [("layers.0",), ("layers.1",)]


def test_models_without_blocks_are_split_by_size() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 2))
    assert plan(model) == [("0",), ("2",)]
    assert plan(nn.Linear(512, 512)) == []
    assert plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        ("Block", [("blocks.0",), ("blocks.1",)]),
        (Block, [("blocks.0",), ("blocks.1",)]),
        (["Block", nn.LayerNorm], None),
        (lambda module: isinstance(module, Block), [("blocks.0",), ("blocks.1",)]),
    ],
    ids=["name", "class", "list", "function"],
)
def test_wrap_selects(wrap: object, expected: list[tuple[str, ...]] | None) -> None:
    units = plan(Regressor(), wrap)
    if expected is None:
        assert units[:2] == [("blocks.0.norm",), ("blocks.0",)] and len(units) == 4
    else:
        assert units == expected


def test_a_base_class_selects_its_subclasses() -> None:
    class Special(Block):
        pass

    model = nn.Sequential(Special(), Block())
    assert plan(model, "Block") == plan(model, Block) == [("0",), ("1",)]


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        ("Blok", "wrap='Blok': the model contains no module of that class. Did you mean 'Block'? Or use wrap='auto'."),
        (nn.Conv2d, "wrap='Conv2d': the model contains no module of that class. It contains: Block, "),
        (["Block", "Conv9"], "wrap='Conv9'"),
        (lambda module: False, "wrap= selected no module"),
        (nn.ModuleList, "selected a ModuleList, which has no forward of its own"),
    ],
    ids=["misspelt", "absent", "one of a list", "function", "list of modules"],
)
def test_a_wrap_that_selects_nothing_says_so(wrap: object, told: str) -> None:
    with pytest.raises(MiCSConfigError) as caught:
        plan(Regressor(), wrap)
    assert told in str(caught.value)


def test_ties_inside_the_root_stay_with_the_root() -> None:
    model = tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(len(unit) == 1 for unit in plan(model))


def test_modules_of_two_units_that_share_a_parameter_become_one_unit() -> None:
    assert plan(TiedBlocks())[0] == ("blocks.0.down", "blocks.1.down")
    assert sorted(plan(TiedBlocks())[1:]) == [("blocks.0",), ("blocks.1",)]


def test_units_are_listed_innermost_first_and_finish_backward_from_the_end() -> None:
    model = TiedBlocks()
    units = plan_units(model)
    earlier: list[nn.Module] = []
    for unit in units:
        assert not any(root in outer.modules() for outer in earlier for root in unit)
        earlier += unit
    assert names_of(model, backward_order(model, [(model,), *units])) == [
        ("blocks.1",),
        ("blocks.0.down", "blocks.1.down"),
        ("blocks.0",),
        ("",),
    ]


def test_a_shared_module_is_one_unit() -> None:
    assert plan(SharedBlock()) == [("blocks.0",), ("blocks.1",)]


def test_a_tie_with_the_roots_own_parameter_is_refused() -> None:
    class Rooted(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.weight = self.blocks[0].down.weight

    with pytest.raises(MiCSConfigError, match="root module owns itself"):
        plan(Rooted())


class TwoDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        for block in self.blocks:
            block.norm.double()
        self.head = nn.Linear(8, 2).double()
        self.body = nn.Linear(8, 8)


def test_a_second_dtype_gets_units_of_its_own() -> None:
    model = TwoDtypes()
    units = plan_units(model)
    roots = {module for unit in units for module in unit}

    def dtypes_of(module: nn.Module) -> set[torch.dtype]:
        own = {param.dtype for param in module.parameters(recurse=False)}
        return own.union(*(dtypes_of(child) for child in module.children() if child not in roots))

    for unit in [*units, (model,)]:
        assert len(set().union(*map(dtypes_of, unit))) == 1
    assert sorted(names_of(model, units)) == [
        ("blocks.0",),
        ("blocks.0.norm",),
        ("blocks.1",),
        ("blocks.1.norm",),
        ("head",),
    ]


def test_frozen_parameters_of_another_dtype_need_no_unit() -> None:
    model = Regressor()
    model.blocks[0].norm.double().requires_grad_(False)
    assert plan(model) == [("blocks.0",), ("blocks.1",)]


def test_one_module_with_two_dtypes_is_refused() -> None:
    class Torn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.bias = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.bias

    with pytest.raises(MiCSConfigError, match=r"Torn holds trainable parameters of several dtypes.*module\.to"):
        plan(nn.Sequential(Torn(), nn.Linear(4, 4)))


def test_modules_without_parameters_are_no_units() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Dropout()), nn.Linear(2, 2))
    assert plan(model, [nn.Linear, nn.ReLU]) == [("1",)]


def named_units(model: nn.Module, wrap: object) -> list[str]:
    return unit_names(model, plan_units(model, wrap))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrap",
    ["auto", "Block", Block, lambda module: isinstance(module, Block)],
    ids=["auto", "name", "class", "function"],
)
def test_compiled_modules_are_the_units_that_plain_ones_are(wrap: object) -> None:
    whole, wrapped, outer = Regressor(), Regressor(), Regressor()
    whole.compile()
    wrapped.blocks = nn.ModuleList(map(torch.compile, wrapped.blocks))
    regional = compile_regions(Regressor())
    for model in (whole, wrapped, torch.compile(outer), regional):
        assert named_units(model, wrap) == ["blocks.0", "blocks.1"]
    for model in (wrapped, regional):  # hooks of the compiled module are outside of its graph
        assert [unit[0] for unit in plan_units(model)] == list(model.blocks)


def test_a_module_that_is_compiled_and_also_called_plainly_is_a_unit_inside() -> None:
    model = Regressor()
    plain = list(model.blocks)
    model.again, model.blocks = nn.ModuleList(plain), nn.ModuleList(map(torch.compile, plain))
    assert [unit[0] for unit in plan_units(model, "Block")] == plain
