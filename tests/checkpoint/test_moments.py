"""States of optimizers go where they belong, by name, or nowhere: in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_tools import make_accelerator
from checkpoint_tools import trained
from lightning_tools import LanguageModel, loader, make_trainer
from torch import nn

from lightning_mics import CheckpointError, MiCSStrategy, load_checkpoint, save_checkpoint
from lightning_mics.checkpoint import load_raw
from lightning_mics.testing import WorkerPool

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
SHARDED = pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
Make = Callable[[Any], torch.optim.Optimizer]


def net(frozen: tuple[int, ...] = (), width: int = 4, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, width), nn.Linear(width, 4)).to(dtype)
    for index in frozen:
        model[index].requires_grad_(False)
    return model


def free(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def adamw(params: Any) -> torch.optim.Optimizer:
    return AdamW(params, lr=0.1)


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4, dtype=next(model.parameters()).dtype)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def saved(path: Path, model: nn.Module, *optimizers: torch.optim.Optimizer, sharded: bool = True) -> Path:
    step(model, *optimizers)
    save_checkpoint(path, model, optimizers, sharded=sharded)
    return path


KINDS: dict[str, tuple[Make, Make, str]] = {
    "SGD into AdamW": (lambda p: SGD(p, 0.1, momentum=0.9), adamw, "dampening, momentum, nesterov, and AdamW has"),
    "AdamW into SGD": (adamw, lambda p: SGD(p, 0.1), "and SGD has dampening, momentum, nesterov instead"),
    "Adagrad into RMSprop": (torch.optim.Adagrad, torch.optim.RMSprop, "RMSprop has"),
    "amsgrad": (adamw, lambda p: AdamW(p, amsgrad=True), "saved with amsgrad=False, and AdamW has amsgrad=True"),
    "momentum": (lambda p: SGD(p, 0.1), lambda p: SGD(p, 0.1, momentum=0.9), "momentum=0, and SGD has momentum=0.9"),
    "Adam into AdamW": (torch.optim.Adam, adamw, "decoupled_weight_decay=False"),
    "Adam into RAdam": (torch.optim.Adam, torch.optim.RAdam, "saved with amsgrad, unlike RAdam"),
    "RAdam into Adam": (torch.optim.RAdam, torch.optim.Adam, "saved without amsgrad, unlike Adam"),
    "Adamax into RAdam": (torch.optim.Adamax, torch.optim.RAdam, "exp_inf, step, and RAdam needs exp_avg_sq"),
    "groups": (adamw, lambda p: AdamW([{"params": p[:1]}, {"params": p[1:]}]), "1 parameter group(s), AdamW has 2"),
}


@SHARDED
@pytest.mark.parametrize("kind", KINDS)
def test_another_optimizer_is_an_error(tmp_path: Path, kind: str, sharded: bool, caplog: Any) -> None:
    before, after, words = KINDS[kind]
    model = net()
    path = saved(tmp_path / "saved.ckpt", model, before(free(model)), sharded=sharded)
    model = net()
    optimizer = after(free(model))
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path, model, optimizer)
    assert words in str(raised.value)
    if kind == "groups":
        return
    load_checkpoint(path, model, optimizer, strict=False)
    assert words in caplog.text
    assert settings == {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    step(model, optimizer)  # it begins anew


def in_groups(model: nn.Module, *names: str) -> torch.optim.Optimizer:
    """Trains parameters of these names in groups, each decayed in a way of its own."""
    groups = [[param for name, param in model.named_parameters() if name.endswith(end)] for end in names]
    return AdamW([{"params": params, "weight_decay": 0.1 * index} for index, params in enumerate(groups)])


@SHARDED
def test_settings_of_groups_go_to_their_parameters(tmp_path: Path, sharded: bool, caplog: Any) -> None:
    model = net()
    path = saved(tmp_path / "saved.ckpt", model, in_groups(model, "weight", "bias"), sharded=sharded)
    model = net()
    optimizer = in_groups(model, "bias", "weight")
    load_checkpoint(path, model, optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    mixed = AdamW([{"params": free(model)[:1]}, {"params": free(model)[1:]}])
    with pytest.raises(CheckpointError, match=r"group 1 of AdamW has parameters of the saved groups 0, 1, whose"):
        load_checkpoint(path, model, mixed)
    load_checkpoint(path, model, mixed, strict=False)
    assert "whose settings differ" in caplog.text


@SHARDED
def test_optimizers_more_and_fewer_are_errors(tmp_path: Path, sharded: bool, caplog: Any) -> None:
    model = net()
    first, second = adamw(free(model)[:2]), adamw(free(model)[2:])
    path = saved(tmp_path / "saved.ckpt", model, first, second, sharded=sharded)
    with pytest.raises(CheckpointError, match=r"holds 1 optimizer\(s\) more than it is loaded into: optimizer_1"):
        load_checkpoint(path, model, first)
    load_checkpoint(path, model, first, strict=False)
    assert "optimizer_1" in caplog.text
    with pytest.raises(CheckpointError, match="no states for 'optimizer_2'"):
        load_checkpoint(path, model, [first, second, adamw(free(model))])
    load_checkpoint(path, model)


@SHARDED
def test_other_parameters_are_told(tmp_path: Path, sharded: bool, caplog: Any) -> None:
    model = net(frozen=(0,))
    optimizer = adamw(free(model))
    path = saved(tmp_path / "saved.ckpt", model, optimizer, sharded=sharded)
    expected = {
        name: optimizer.state[param]["exp_avg"] for name, param in model.named_parameters() if param.requires_grad
    }
    for frozen, told in (
        ((), "begins anew for 0.bias, 0.weight (2)"),
        ((2,), "leaves out the states of 2.bias, 2.weight"),
    ):
        model = net(frozen)
        optimizer = adamw(free(model))
        caplog.clear()
        load_checkpoint(path, model, optimizer)
        assert told in caplog.text
        for name, param in model.named_parameters():
            assert (
                torch.equal(optimizer.state[param]["exp_avg"], expected[name])
                if name in expected and param.requires_grad
                else not optimizer.state[param]
            )
    model = net(frozen=(1, 2))
    with pytest.raises(CheckpointError, match=r"none for what it trains here: 0.bias, 0.weight \(2\)"):
        load_checkpoint(path, model, adamw(free(model)))


@SHARDED
def test_states_of_other_shapes_are_an_error(tmp_path: Path, sharded: bool) -> None:
    wide, narrow = net(width=6), net()
    optimizer = adamw(free(wide))
    step(wide, optimizer)
    small = adamw(free(narrow))
    for param, other in zip(free(narrow), free(wide), strict=True):
        small.state[param] = optimizer.state[other]
    save_checkpoint(tmp_path / "saved.ckpt", narrow, small, sharded=sharded)
    narrow = net()
    with pytest.raises(CheckpointError, match=r"other shapes of 1.bias, 1.weight, 2.weight \(3\)"):
        load_checkpoint(tmp_path / "saved.ckpt", narrow, adamw(free(narrow)))


@SHARDED
def test_rounding_is_an_error_with_optimizers_and_told_without(tmp_path: Path, sharded: bool, caplog: Any) -> None:
    model = net()
    path = saved(tmp_path / "saved.ckpt", model, adamw(free(model)), sharded=sharded)
    model = net(dtype=torch.bfloat16)
    optimizer = adamw(free(model))
    with pytest.raises(
        CheckpointError, match=r"weights of 0.bias.*\(6\) would be rounded from torch.float32 to torch.bfl"
    ):
        load_checkpoint(path, model, optimizer)
    load_checkpoint(path, model)
    assert "weights of 0.bias" in caplog.text and "AdamW's states" not in caplog.text
    load_checkpoint(path, model, optimizer, strict=False)
    assert "AdamW's states of 0.bias" in caplog.text
    path = saved(tmp_path / "half.ckpt", model, optimizer, sharded=sharded)
    model = net()  # wider is no loss
    load_checkpoint(path, model, adamw(free(model)))


def without_names(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Saves as Lightning and older versions do."""
    step(model, optimizer)
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, path)
    return path


def test_positions_count_where_they_are_certain(tmp_path: Path, caplog: Any) -> None:
    model = net()
    path = without_names(tmp_path / "all.ckpt", model, adamw(free(model)))
    model = net()
    load_checkpoint(path, model, adamw(free(model)))
    model = net(frozen=(0,))
    path = without_names(tmp_path / "some.ckpt", model, adamw(free(model)))
    for frozen in ((0,), (1,)):  # nobody can know
        model = net(frozen)
        with pytest.raises(CheckpointError, match=r"cannot be told whether .* strict=False"):
            load_checkpoint(path, model, adamw(free(model)))
    load_checkpoint(path, model, adamw(free(model)), strict=False)
    model = net()
    with pytest.raises(CheckpointError, match=r"states of 4 parameter\(s\) without their names, AdamW trains 6"):
        load_checkpoint(path, model, adamw(free(model)))
    model = net(frozen=(1, 2), width=5)
    path = without_names(tmp_path / "certain.ckpt", model, adamw([model[1].weight.requires_grad_()]))
    load_checkpoint(path, model, adamw([model[1].weight]))  # the only one of its shape


def test_raw_states_are_checked(tmp_path: Path) -> None:
    model = net()
    optimizer = adamw(free(model))
    step(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "raw.pt")
    with pytest.raises(CheckpointError, match="and SGD has dampening"):
        load_raw(tmp_path / "raw.pt", SGD(free(model), 0.1))
    model = net(width=6)
    with pytest.raises(CheckpointError, match="other shapes of parameter 2, parameter 3, parameter 4"):
        load_raw(tmp_path / "raw.pt", adamw(free(model)))


def fit(optimizer: str, path: str | None = None) -> Any:
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=2))
    trainer.fit(LanguageModel(optimizer), loader(1, 2), ckpt_path=path)
    return trainer


def load_other_kinds(folder: str) -> list[str]:
    """Returns what each way in says of the states of another optimizer."""
    model, optimizer = trained(1)
    save_checkpoint(f"{folder}/bare.ckpt", model, optimizer)
    accelerator = make_accelerator(settings={"shard_size": 2})
    prepared = accelerator.prepare(net())
    inner = accelerator.prepare(adamw(prepared.parameters()))
    prepared(torch.ones(2, 4)).sum().backward()
    inner.step()
    accelerator.save_state(f"{folder}/accelerate")
    accelerator._optimizers[0].optimizer = SGD(prepared.parameters(), 0.1)
    fit("adamw").save_checkpoint(f"{folder}/trainer.ckpt")
    said = []
    for load in (
        lambda: fit("sgd", f"{folder}/trainer.ckpt"),
        lambda: load_checkpoint(f"{folder}/bare.ckpt", model, SGD(model.parameters(), 0.1)),
        lambda: accelerator.load_state(f"{folder}/accelerate"),
    ):
        try:
            load()
        except CheckpointError as error:
            said.append(str(error))
    accelerator.load_state(f"{folder}/accelerate", strict=False)
    return said


def test_every_rank_is_told(pool: WorkerPool, tmp_path: Path) -> None:
    for said in pool.run(load_other_kinds, str(tmp_path), world_size=2):
        assert len(said) == 3 and all("SGD has dampening, momentum, nesterov instead" in words for words in said)
