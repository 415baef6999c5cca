"""What recomputed blocks keep waits in host memory, and comes back unchanged."""

from __future__ import annotations

import torch
from stream_placement import Kind
from stream_windows import CONFIGURATIONS
from stream_world import pretended_device
from torch import Tensor, nn

from lightning_mics import MiCSConfig, mics_shard

WIDTH, ROWS, NUM_BLOCKS = 16, 64, 4
INPUT_BYTES = ROWS * WIDTH * 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.down(nn.functional.dropout(torch.tanh(self.up(x)), 0.3)) * mask


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


def step(offload: bool, microsteps: int = 2) -> tuple[dict[Kind, int], list[Tensor]]:
    """Returns the bytes that a forward pass leaves in each kind of memory, and the gradients of a window."""
    configuration = CONFIGURATIONS["flat"]
    with pretended_device(configuration.world_size, configuration.rank) as checker:
        torch.manual_seed(0)
        recompute = {"activation_checkpointing": Block, "activation_checkpointing_offload": offload}
        model = mics_shard(
            Net(), MiCSConfig(shard_size=2, node_size=2, wrap=Block, verify=False, **recompute), device_type="cuda"
        )
        kept = dict.fromkeys(Kind, 0)
        with checker:
            for microstep in range(microsteps):
                torch.manual_seed(microstep)
                inputs = torch.randn(ROWS, WIDTH, device="cuda"), torch.ones(ROWS, WIDTH, device="cuda")
                before = checker.placement.live_bytes()
                loss = model(*inputs).square().mean()
                after = checker.placement.live_bytes()
                kept = {kind: after[kind] - before[kind] for kind in Kind}
                loss.backward()
        assert not checker.races, "\n".join(map(str, checker.races))
        return kept, [param.grad.to_local().clone() for param in model.parameters()]


def test_inputs_of_blocks_wait_in_pinned_memory_and_nothing_else_does() -> None:
    """Not the mask, which all blocks share, nor gathered parameters."""
    kept, expected = step(offload=False)
    moved, gradients = step(offload=True)
    assert kept[Kind.PINNED] == 0 and moved[Kind.PINNED] == NUM_BLOCKS * INPUT_BYTES
    # The last block's output, which the loss keeps, stays.
    assert kept[Kind.DEVICE] - moved[Kind.DEVICE] == NUM_BLOCKS * INPUT_BYTES
    assert all(torch.equal(one, other) for one, other in zip(expected, gradients, strict=True))
