"""Small hardware and models that planner tests share."""

from lightning_mics.plan.hardware import Accelerator, Cluster, Link, Node
from lightning_mics.plan.profile import Amount, ModelProfile, Param, Unit

GIB = 2**30


def make_cluster(num_nodes=2, node_size=4, *, memory=80 * GIB, device_type="cuda", **links):
    """Rates of 100 and 10 GB/s, steps of 1 and 10 us, 100 TFLOP/s at half of it."""
    accelerator = Accelerator(
        name="test",
        memory=memory,
        peak_flops={"bfloat16": 100e12, "float32": 50e12},
        memory_bandwidth=1e12,
        compute_efficiency=0.5,
        device_type=device_type,
    )
    intra = links.get("intra", Link(bandwidth=100e9, efficiency=1.0, latency=1e-6))
    inter = links.get("inter", Link(bandwidth=20e9, efficiency=0.5, latency=1e-5))
    node = Node(name="test", accelerator=accelerator, num_accelerators=node_size, intra=intra, inter=inter)
    return Cluster(node=node, num_nodes=num_nodes)


def make_profile(layers=4, width=1024, *, saved=10e6, vocabulary=1000):
    """A stack of equal blocks of 12 width^2 parameters, with a head."""
    block = Unit(
        name="block",
        params=(Param(shape=(4 * width, width)), Param(shape=(width, 4 * width)), Param(shape=(4 * width, width))),
        forward_flops=24e9,
        backward_flops=48e9,
        saved=Amount(per_sample=saved),
        checkpoint=Amount(per_sample=saved / 10),
        backward_extra=Amount(per_sample=saved / 5),
    )
    root = Unit(
        name="(root)",
        params=(Param(shape=(vocabulary, width)),),
        forward_flops=2e9,
        backward_flops=4e9,
        saved=Amount(per_sample=saved),
        can_checkpoint=False,
    )
    return ModelProfile(name="stack", root=root, blocks=(block,) * layers, sequence_length=128)
