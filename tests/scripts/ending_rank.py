"""A rank that ends in some way: ``ending_rank.py WAY``."""

from __future__ import annotations

import atexit
import sys
import time

import torch.distributed as dist

from lightning_mics.core import failures, groups

WAY = sys.argv[1]


def work_at_exit(name: str) -> None:
    time.sleep(2)
    print(f"done at exit: {name}", flush=True)


class Slow:
    def __del__(self) -> None:
        time.sleep(60)


failures._LAST = 1
atexit.register(work_at_exit, "registered before the groups")
dist.init_process_group("gloo")
groups.end_well()
if WAY == "slow destructor":
    slow = Slow()
    atexit.register(work_at_exit, "registered after the groups")
    raise ValueError("no luck")
if WAY == "slow groups":
    groups.destroy_groups = lambda: time.sleep(60)
    raise ValueError("no luck")
if WAY == "follows":
    print("printed, and not flushed")
    if dist.get_rank() == 1:
        raise ValueError("no luck\nin the second line")
    time.sleep(60)
if WAY == "outlives rank 0" and dist.get_rank() == 1:
    time.sleep(6)
