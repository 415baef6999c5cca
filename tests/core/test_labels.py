"""Hops, units and microsteps have names in traces, which cost nothing while none is taken."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)


@pytest.fixture
def model() -> Iterator[nn.Module]:
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield mics_shard(Net(), MiCSConfig(shard_size=2, node_size=2, wrap=["Sequential"], verify=False), device_type="cpu")
    dist.destroy_process_group()


def window(model: nn.Module) -> None:
    for index in range(2):
        with defer_replication_sync(model, enabled=index == 0):
            model(torch.randn(2, 4)).sum().backward()
    model.zero_grad()


def test_a_trace_names_hops_units_and_microsteps(model: nn.Module) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        window(model)
        window(model)
    counts = {event.key: event.count for event in trace.key_averages() if event.key.startswith("mics::")}
    units = ["(root)", "blocks.0", "blocks.1"]
    assert counts == {
        **{f"mics::backward of microstep {number}": 2 for number in (1, 2)},
        **{f"mics::hop one ({unit})": 4 for unit in units},
        **{f"mics::hop two ({unit})": 2 for unit in units},
        **{f"mics::end of hop two ({unit})": 2 for unit in units},
    }


def test_without_a_trace_nothing_is_made(model: nn.Module) -> None:
    window(model)
    real = profiler.record_function
    with mock.patch.object(profiler, "record_function", side_effect=real) as made:
        window(model)
    assert not [call for call in made.call_args_list if str(call.args[0]).startswith("mics::")]
