"""Trains on streams of other lengths on each rank, resumes if it can, and dies: ``resuming.py WORKERS KILL_AT``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from joined_tools import LENGTHS, MODEL, Stream, make_optimizer, stateful
from models import build, loss_of

from lightning_mics import JoinedLoader, MiCSConfig, has_data, load_checkpoint, mics_shard, save_checkpoint

WORKERS, KILL_AT = int(sys.argv[1]), int(sys.argv[2])

dist.init_process_group("gloo")
rank = dist.get_rank()
model = mics_shard(build(MODEL), MiCSConfig(shard_size=2, node_size=2, uneven_inputs="longest"))
optimizer = make_optimizer(model)
loader = stateful(Stream(rank, LENGTHS[rank]), num_workers=WORKERS)
batches = JoinedLoader(loader, model)
step, seen = 0, []
if Path("run.ckpt").exists():
    meta = load_checkpoint("run.ckpt", model, optimizer, dataloaders=batches)
    step, seen = meta["step"], meta["seen"][rank]
while step < 2 * max(LENGTHS):
    for batch in batches:
        loss_of(MODEL, model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        seen += [round(batch.sum().item(), 4)] * has_data(model)
        if step % 3 == 2:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, seen)
            save_checkpoint("run.ckpt", model, optimizer, {"step": step, "seen": everyone}, dataloaders=batches)
        if step == KILL_AT and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
Path(f"seen-{rank}").write_text(str(seen))
dist.destroy_process_group()
