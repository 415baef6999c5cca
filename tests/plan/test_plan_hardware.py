"""The hardware catalogue, and clusters from users' files."""

import subprocess
import sys

import pytest
import yaml

from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.hardware import (
    Accelerator,
    Cluster,
    Link,
    Node,
    cluster_to_yaml,
    find_accelerator,
    find_host,
    find_instance,
    known_names,
    load_cluster,
)

GIB = 2**30
EXPLICIT = """
name: mine
num_nodes: 4
accelerator:
  name: card
  memory: 40 GiB
  peak_flops: {bfloat16: 312 TFLOP/s, float32: 19.5e12}
  memory_bandwidth: 1555 GB/s
  compute_efficiency: 0.5
num_accelerators: 8
intra: {bandwidth: 300 GB/s, efficiency: 0.8, latency: 5 us}
inter: {bandwidth: 400 Gbit/s, efficiency: 0.9, latency: 1.5 ms, source: measured}
"""
NAMED = {"accelerator": "A100-40GB", "num_accelerators": 8, "intra": "nvlink-a100", "inter": "efa-400"}
LINK = {"bandwidth": "100 Gbit/s", "efficiency": 0.9, "latency": "20 us"}
CARD = {"name": "x", "memory": 1, "peak_flops": {"float32": 1}, "memory_bandwidth": 1, "compute_efficiency": 1}


@pytest.fixture
def load(tmp_path):
    """Loads a cluster from text, or from values to write as YAML."""

    def load_text(content, num_nodes=None):
        path = tmp_path / "my.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return load_cluster(path, num_nodes)

    return load_text


def refusal(load, content, num_nodes=None):
    """Returns what the refusal of a file says after the file's name."""
    with pytest.raises(MiCSConfigError, match=r"my\.yaml") as caught:
        load(content, num_nodes)
    return str(caught.value).partition("my.yaml")[2]


def test_reading_hardware_needs_no_torch():
    code = (
        "import sys; from lightning_mics.plan.hardware import *; find_instance('p4d.24xlarge', 2); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "yaml" in modules and "torch" not in modules


# The catalogue.


@pytest.mark.parametrize("name", known_names("instances"))
def test_every_instance_is_sound_and_says_where_its_figures_are_from(name):
    node = find_instance(name, 2).node
    card = node.accelerator
    assert node.name == name and node.num_accelerators in (4, 8)
    assert all(entry.source for entry in (node, card, node.intra, node.inter))
    assert node.intra.rate > node.inter.rate / node.num_accelerators
    assert node.intra.latency < node.inter.latency < 1e-3
    assert 10 * GIB < card.memory < 1000 * GIB and 1e11 < card.memory_bandwidth < 1e13


@pytest.mark.parametrize("section", ["accelerators", "networks", "fabrics"])
def test_every_entry_is_sourced_and_readable(section, load):
    key = {"accelerators": "accelerator", "networks": "inter", "fabrics": "intra"}[section]
    assert known_names(section)
    for name in known_names(section):
        entry = getattr(load({**NAMED, key: name}).node, key)
        assert entry.source, name
        if section == "accelerators":
            assert entry.name == name and 0.3 < entry.compute_efficiency < 0.7
            assert {"float32", "bfloat16", "float16"} <= set(entry.peak_flops)
            assert entry.peak_flops["float32"] == min(entry.peak_flops.values())
        else:
            assert 0.5 < entry.efficiency < 1 and entry.rate == entry.bandwidth * entry.efficiency


def test_the_figures_of_p4d():
    cluster = find_instance("p4d.24xlarge", 16)
    card, intra, inter = cluster.node.accelerator, cluster.node.intra, cluster.node.inter
    assert (card.memory, card.memory_bandwidth, card.device_type) == (40 * GIB, 1555e9, "cuda")
    assert (card.peak_flops["bfloat16"], card.peak_flops["float32"]) == (312e12, 19.5e12)
    assert (intra.bandwidth, inter.bandwidth) == (300e9, 50e9)
    assert "assumption" in inter.source
    assert find_instance("p4de.24xlarge", 1).node.accelerator.memory == 80 * GIB


def test_a_cluster_knows_its_ranks():
    cluster = find_instance("p4d.24xlarge", 4)
    assert (cluster.world_size, cluster.topology.num_nodes, cluster.topology.node_size) == (32, 4, 8)
    assert cluster.with_nodes(2).world_size == 16 and cluster.with_nodes(4) == cluster
    for wrong in (0, -1, True, 2.0):
        with pytest.raises(MiCSConfigError, match="num_nodes"):
            find_instance("p4d.24xlarge", wrong)


@pytest.mark.parametrize(
    ("device", "gib", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", 79.2, "A100-80GB"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100-32GB"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100-80GB"),
        ("NVIDIA H100 PCIe", 79.1, "H100-PCIe-80GB"),
        ("NVIDIA L4", 22.0, "L4-24GB"),
        ("NVIDIA L40S", 44.4, "L40S-48GB"),
        ("NVIDIA GeForce RTX 4090", 23.6, None),
        ("NVIDIA GB200", 184.0, None),
    ],
)
def test_the_accelerator_that_a_driver_names(device, gib, expected):
    found = find_accelerator(device, int(gib * GIB))
    assert (found and found.name) == expected


# Users' files.


def test_everything_in_full(load):
    card = Accelerator(
        name="card",
        memory=40 * GIB,
        peak_flops={"bfloat16": 312e12, "float32": 19.5e12},
        memory_bandwidth=1555e9,
        compute_efficiency=0.5,
    )
    intra = Link(bandwidth=300e9, efficiency=0.8, latency=pytest.approx(5e-6))
    inter = Link(bandwidth=50e9, efficiency=0.9, latency=1.5e-3, source="measured")
    node = Node(name="mine", accelerator=card, num_accelerators=8, intra=intra, inter=inter, host=find_host("ordinary"))
    assert load(EXPLICIT) == Cluster(node=node, num_nodes=4)


@pytest.mark.parametrize(
    ("bandwidth", "expected"),
    [
        (1e9, 1e9),
        (1000, 1000.0),
        ("1e9", 1e9),
        ("300 GB/s", 300e9),
        ("400 Gbit/s", 50e9),
        ("25gbit", 3.125e9),
        ("100Gbps", 12.5e9),
        ("10 MiB/s", 10 * 2.0**20),
    ],
)
def test_bandwidths_with_and_without_units(load, bandwidth, expected):
    assert load({**NAMED, "inter": {**LINK, "bandwidth": bandwidth}}).node.inter.bandwidth == expected


@pytest.mark.parametrize(("memory", "expected"), [("40 GiB", 40 * GIB), ("40 GB", 40 * 10**9), (12345, 12345)])
def test_memory_with_and_without_units(load, memory, expected):
    assert load({**NAMED, "accelerator": {**CARD, "memory": memory}}).node.accelerator.memory == expected


@pytest.mark.parametrize(("latency", "expected"), [("5 us", 5e-6), ("1.5 ms", 1.5e-3), (0, 0.0), ("1e-5", 1e-5)])
def test_latencies_with_and_without_units(load, latency, expected):
    node = load({**NAMED, "inter": {**LINK, "latency": latency}}).node
    assert node.inter.latency == pytest.approx(expected)


def test_names_of_the_catalogue(load):
    named = load({**NAMED, "name": "p4d.24xlarge", "source": "AWS EC2 P4 instances"})
    assert named == find_instance("p4d.24xlarge", 1)
    as_network = {"network" if key == "inter" else key: value for key, value in NAMED.items()}
    assert load(as_network) == load(NAMED)


def test_an_instance_and_what_differs(load):
    assert load("instance: p4d.24xlarge\nnum_nodes: 3\n") == find_instance("p4d.24xlarge", 3)
    for key in ("network", "inter"):
        node = load({"instance": "p4d.24xlarge", key: "ethernet-25g", "num_accelerators": 4}).node
        assert (node.name, node.num_accelerators, node.inter.bandwidth) == ("p4d.24xlarge", 4, 3.125e9)
        assert node.accelerator == find_instance("p4d.24xlarge", 1).node.accelerator
    assert load({"instance": "p4d.24xlarge", "name": "ours"}).node.name == "ours"


def test_own_sections_extend_the_catalogue(load):
    own = {
        "accelerators": {"card": {key: value for key, value in CARD.items() if key != "name"}},
        "networks": {"efa-400": {**LINK, "bandwidth": 1}, 5: LINK},
        "instances": {"box": {**NAMED, "accelerator": "card", "num_accelerators": 2}},
    }
    node = load({**own, "instance": "box"}).node
    assert (node.name, node.accelerator.name, node.inter.bandwidth) == ("box", "card", 1)
    assert load({**own, "instance": "box", "network": 5}).node.inter.bandwidth == 12.5e9
    assert find_instance("p4d.24xlarge", 1).node.inter.bandwidth == 50e9, "the catalogue itself must stay as it was"
    assert "box" not in known_names("instances")


def test_the_argument_wins_over_the_file(load):
    assert load(EXPLICIT).num_nodes == 4
    assert load(EXPLICIT, 2).num_nodes == 2
    assert load(NAMED).num_nodes == 1


@pytest.mark.parametrize("name", known_names("instances"))
def test_what_is_written_reads_back_the_same(load, name):
    cluster = find_instance(name, 3)
    text = cluster_to_yaml(cluster)
    assert load(text) == cluster
    assert "instance:" not in text and isinstance(yaml.safe_load(text)["inter"], dict)


def test_measured_figures_read_back_the_same(load):
    link = Link(bandwidth=1234567890.123, efficiency=1 / 3, latency=1.23e-7, source="gemessen: 4 µs")
    card = Accelerator(**{**CARD, "peak_flops": {"float32": 1e300 / 3}, "device_type": "cpu"})
    node = Node(name="8", accelerator=card, num_accelerators=1, intra=link, inter=link)
    assert load(cluster_to_yaml(Cluster(node=node, num_nodes=7))) == Cluster(node=node, num_nodes=7)


# What is refused.


def test_an_unknown_instance_suggests_and_lists():
    with pytest.raises(MiCSConfigError) as caught:
        find_instance("p4d.24xlarg", 1)
    assert "Did you mean 'p4d.24xlarge'" in str(caught.value) and "Known: p3dn.24xlarge, " in str(caught.value)
    with pytest.raises(MiCSConfigError, match=r"'zzz' is unknown\. Known: "):
        find_instance("zzz", 1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"instance": "P4D.24XLARGE "}, "'p4d.24xlarge'"),
        ({**NAMED, "accelerator": "a100_40gb"}, "'A100-40GB'"),
        ({**NAMED, "inter": "efa400"}, "'efa-400'"),
        ({**NAMED, "network": "efa400", "inter": None}, "network and inter"),
        ({**NAMED, "intra": "nvlink"}, "'nvlink-"),
        ({**NAMED, "num_acelerators": 8}, "'num_accelerators'"),
        ({"instnce": "p4d.24xlarge"}, "'instance'"),
        ({**NAMED, "inter": {**LINK, "bandwith": 1}}, "'inter.bandwith' is unknown. Did you mean 'bandwidth'?"),
        ({**NAMED, "accelerator": {**CARD, "memmory": 1}}, "'memory'"),
    ],
)
def test_unknown_names_and_keys_suggest_the_nearest(load, values, expected):
    assert expected in refusal(load, values)


@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}, True])
@pytest.mark.parametrize("key", ["instance", "accelerator", "intra", "inter"])
def test_values_that_are_no_names(load, key, value):
    assert key in refusal(load, {**(NAMED if key != "instance" else {}), key: value})


@pytest.mark.parametrize("key", ["accelerator", "num_accelerators", "intra", "inter"])
def test_a_missing_key_is_named(load, key):
    said = refusal(load, {name: value for name, value in NAMED.items() if name != key})
    assert f"{key} is missing" in said and "instance: p4d.24xlarge" in said


@pytest.mark.parametrize("key", ["bandwidth", "efficiency", "latency"])
def test_a_missing_figure_is_named(load, key):
    link = {name: value for name, value in LINK.items() if name != key}
    assert f"inter.{key} is missing" in refusal(load, {**NAMED, "inter": link})


WRONG = [0, -1, float("nan"), float("inf"), True, None, "fast", "5 parsecs", "-3 GB/s", "", [1], int("9" * 400)]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:10])
def test_a_wrong_number_is_refused_with_one_that_works(load, value):
    for key in ("bandwidth", "efficiency"):
        said = refusal(load, {**NAMED, "inter": {**LINK, key: value}})
        assert f"inter.{key} is " in said and "Try " in said and len(said) < 200
    said = refusal(load, {**NAMED, "accelerator": {**CARD, "memory": value}})
    assert "accelerator.memory is " in said and "'40 GiB'" in said
    said = refusal(load, {**NAMED, "accelerator": {**CARD, "peak_flops": {"bfloat16": value}}})
    assert "accelerator.peak_flops.bfloat16 is " in said
    if value != 0:  # a link without latency is an idealisation, not a mistake
        assert "intra.latency is " in refusal(load, {**NAMED, "intra": {**LINK, "latency": value}})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"inter": {**LINK, "efficiency": 1.01}}, "inter.efficiency is 1.01, and must be at most 1"),
        ({"inter": {**LINK, "bandwidth": "5 us"}}, "inter.bandwidth is '5 us'"),
        ({"inter": {**LINK, "latency": "5 GB"}}, "inter.latency is '5 GB'"),
        ({"accelerator": {**CARD, "memory": 0.5}}, "at least 1"),
        ({"accelerator": {**CARD, "peak_flops": {}}}, "Try peak_flops"),
        ({"accelerator": {**CARD, "peak_flops": 312e12}}, "Try peak_flops"),
        ({"accelerator": {**CARD, "device_type": "tpu"}}, "Values that work: cuda, cpu"),
        ({"num_accelerators": 0}, "num_accelerators=0 must be at least 1. Try num_accelerators=8."),
        ({"num_accelerators": "8"}, "num_accelerators='8'"),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"num_nodes": True}, "num_nodes=True"),
        ({"num_nodes": 1.5}, "num_nodes=1.5"),
        ({"num_nodes": None}, "num_nodes=None"),
        ({"network": "efa-100"}, "network and inter are two names of one thing"),
        ({"networks": 5}, "networks must hold names"),
        ({"networks": {"mine": 5}}, "networks must hold names"),
    ],
)
def test_other_wrong_values(load, values, expected):
    assert expected in refusal(load, {**NAMED, **values})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "- 1",
        "5",
        "a: [",
        "a:\tb: c",
        "? [a]\n: 1",
        "num_nodes: 2020-13-45",
        "a: &a [*a]",
        "[" * 2000,
        "instance: !!python/name:os.getcwd ",
    ],
    ids=lambda text: text[:12],
)
def test_files_that_hold_no_cluster(load, text):
    assert refusal(load, text)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("missing.yaml", "binary", ""):
        with pytest.raises(MiCSConfigError, match="cannot be read"):
            load_cluster(tmp_path / name)
    with pytest.raises(MiCSConfigError, match="cannot be read"):
        load_cluster("\0")
