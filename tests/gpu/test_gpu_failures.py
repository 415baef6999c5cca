"""Errors on NCCL ranks: a pass that ran out of memory is tried again, and a rank that raises ends the job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from gpu_tools import NEEDS_CARD, REHEARSES, on_cards
from torch import Tensor, nn

from lightning_mics import MiCSConfig, mics_shard
from lightning_mics.testing import WorkerPool, worker_device

pytestmark = NEEDS_CARD

SECONDS = 15
PLACES = ("forward", "backward", "optimizer")


class Greedy(nn.Module):
    """Asks for more memory than there is where it gets many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(256, 256)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 1 and len(x) > 64:
                kept = torch.ones(2**28, device=x.device)  # 1 GiB that the failed call holds
                raise torch.OutOfMemoryError(f"no room for {len(x)} rows beside {kept.nbytes} bytes")
        return x


def smaller_batch_after_running_out() -> tuple[int, float]:
    """Returns the bytes that a failed pass keeps once its error is handled, and the loss of the pass after it."""
    device = worker_device()
    torch.manual_seed(0)
    model = mics_shard(Greedy(), MiCSConfig(shard_size=2, wrap="Sequential"), device_type=device.type)
    model(torch.ones(8, 256, device=device)).square().mean().backward()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    with suppress(torch.OutOfMemoryError):
        model(torch.ones(128, 256, device=device))
    kept = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
    loss = model(torch.ones(8, 256, device=device)).square().mean()
    loss.backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
    return kept, loss.item()


def test_a_smaller_batch_fits_after_running_out_of_memory(pool: WorkerPool) -> None:
    torch.manual_seed(0)
    expected = Greedy()(torch.ones(8, 256)).square().mean().item()
    for kept, loss in on_cards(pool, smaller_batch_after_running_out, world_size=2):
        assert kept < 2**26
        assert abs(loss - expected) < 1e-4 * abs(expected)


SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from lightning_mics import MiCSConfig, mics_shard
from lightning_mics.testing import pretended_host

place, backend = sys.argv[1:]
rank = int(os.environ["RANK"])
os.environ.update(pretended_host(rank), LOCAL_RANK="0")
device = torch.device("cuda" if backend == "nccl" else "cpu")
dist.init_process_group(backend)
model = mics_shard(
    torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)),
    MiCSConfig(shard_size=2, node_size=2),
    device_type=device.type,
)
optimizer = torch.optim.SGD(model.parameters(), 0.1)

def fail(*_):
    if rank == 1 and step == 2:
        raise ValueError(f"no luck in {place}")

if place == "forward":
    model[0].register_forward_hook(fail)
elif place == "backward":
    model[0].register_full_backward_hook(fail)
elif place == "optimizer":
    optimizer.register_step_pre_hook(fail)

for step in range(4):
    model(torch.ones(4, 64, device=device)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print("the end")
"""


def run_to_its_end(folder: Path, place: str) -> tuple[float, str]:
    """Returns the seconds from the error to the end of all processes, and what stood on the screen."""
    script = folder / f"{place}.py"
    script.write_text(SCRIPT)
    backend = "gloo" if REHEARSES else "nccl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    # Under the multi-process service a process that dies takes the others of its card along.
    environment.pop("CUDA_MPS_PIPE_DIRECTORY", None)
    with subprocess.Popen(
        [*command, str(script), place, backend],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        shown, failed_at = [], None
        assert process.stdout is not None
        for line in process.stdout:
            shown.append(line)
            if failed_at is None and f"no luck in {place}" in line:
                failed_at = time.monotonic()
        process.wait(60)
        ended_at = time.monotonic()
    assert process.returncode != 0
    assert failed_at is not None, "".join(shown)
    return ended_at - failed_at, "".join(shown)


def test_a_rank_that_raises_ends_the_job_and_its_error_stands_last(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads:
        outcomes = list(threads.map(lambda place: run_to_its_end(tmp_path, place), PLACES))
    for place, (seconds, screen) in zip(PLACES, outcomes, strict=True):
        assert seconds < SECONDS, f"{place}: {seconds:.1f} s\n{screen}"
        assert "the end" not in screen
        assert f"no luck in {place}" in "".join(screen.splitlines(keepends=True)[-25:]), screen
