"""What a process does after its script's last line."""

from __future__ import annotations

import subprocess
import sys

# A thread of gloo waits for Python's lock to let go of a tensor, and the script ends before it gets it.
_SCRIPT = """
import sys, time, torch, torch.distributed as dist
from lightning_mics import MiCSConfig
from lightning_mics.core.mesh import build_mesh
from lightning_mics.topology import ClusterTopology

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh = build_mesh(MiCSConfig(), ClusterTopology(world_size=1, node_size=1).layout(1), "cpu")
group = mesh.device_mesh.get_group("shard")
sys.setswitchinterval(1000)
dist.all_reduce(torch.ones(10), group=group, async_op=True)
end = time.monotonic() + 0.5
while time.monotonic() < end:
    pass
"""


def test_threads_of_gloo_let_go_of_their_tensors_before_python_ends() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
