"""What a person sees of the demo: it prepares the text, starts torchrun twice and draws what the processes report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lightning_mics.errors import MiCSError
from lightning_mics.metrics import Hop, format_bytes
from lightning_mics.processes import end_with_children, end_with_parent
from lightning_mics.topology import ClusterTopology, GroupLayout

_RESUMED_STEPS = 20
_TEXT_BYTES = 2_000_000
_COLOURS = ("cyan", "magenta", "green", "yellow")
_TOPOLOGY = ClusterTopology(world_size=4, node_size=2)


class DemoError(MiCSError):
    """A process of the demo failed."""


def run_demo(steps: int, seed: int, keep: Path | None) -> None:
    """Runs the demo.

    Args:
        steps: Optimizer steps of the first run.
        seed: Seed of weights, data order and sampled text.
        keep: Where to leave checkpoints and logs; a temporary folder that is deleted, if not given.

    Raises:
        DemoError: If a process failed; with the end of its log.
    """
    console = Console(highlight=False)
    console.print(
        Panel(
            "Trains a small GPT-2 on the sources of Python's standard library, with four CPU processes standing for "
            "two nodes of two ranks. Then resumes its checkpoint with another shard size. By default this takes two to "
            "four minutes.",
            title="lightning-mics demo",
            border_style="bold",
        )
    )
    with _folder(keep) as folder:
        num_tokens = _prepare(console, folder)
        more = min(_RESUMED_STEPS, steps)
        total = steps + more
        checkpoint = folder / "first.ckpt"

        layout = _TOPOLOGY.layout(2)
        console.print(
            f'\n[bold]1. Training[/] {steps} steps with MiCSStrategy(shard_size=2, optimizer_shard_size="world"), '
            "4 microsteps a step"
        )
        _draw(console, layout, optimizer_shard_size=4)
        first = _train(
            console, folder, seed, shard_size=2, divide_states=True, until=steps, total=total, save=checkpoint
        )
        _summarise(console, first, checkpoint, num_tokens, steps)

        console.print("\n[bold]2. The text it writes now[/] (by mics consolidate and from_pretrained)")
        _sample(console, folder, checkpoint, seed)

        layout = _TOPOLOGY.layout(4)
        console.print(
            f"\n[bold]3. Resuming[/] the checkpoint with MiCSStrategy(shard_size=4): {more} more steps, one "
            "partition over both nodes"
        )
        _draw(console, layout)
        second = _train(console, folder, seed, shard_size=4, until=total, total=total, resume=checkpoint, begin=steps)
        _compare(console, first, second, steps)
        if keep is not None:
            console.print(f"\nCheckpoints and logs are in {folder}.")
    console.print(
        "\nNext: put [bold]Trainer(strategy=MiCSStrategy(shard_size=...))[/] into a script of yours; examples/ and "
        "docs/guide/ show how."
    )


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DemoError(f"--keep {keep}: the folder cannot be made ({error}). Name another one.") from error
        if any(keep.iterdir()):
            raise DemoError(f"--keep {keep}: the folder is not empty. Name a new one.")
        yield keep.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="mics-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(console: Console, folder: Path) -> int:
    """Writes the tokenizer and the tokens; returns their number."""
    with console.status("Reading the standard library and training a tokenizer ..."):
        import torch

        from lightning_mics.demo.data import VOCABULARY, encode, standard_library_text, train_tokenizer

        text = list(standard_library_text(_TEXT_BYTES))
        tokens = encode(train_tokenizer(text, folder / "tokenizer.json"), text)
        torch.save(tokens, folder / "tokens.pt")
    console.print(f"Text: {len(text)} source files, {len(tokens):,} tokens, {VOCABULARY:,} of them different.")
    return len(tokens)


def _draw(console: Console, layout: GroupLayout, optimizer_shard_size: int | None = None) -> None:
    """Draws nodes as boxes, with each rank's shard in the colour of its replica."""
    boxes = []
    for node in range(layout.topology.num_nodes):
        content = Text()
        for rank in range(node * layout.topology.node_size, (node + 1) * layout.topology.node_size):
            replica, shard = layout.replica_of(rank), layout.shard_of(rank)
            content.append(f"rank {rank}: ", style="bold")
            content.append(f"replica {replica}, shard {shard + 1} of {layout.shard_size}\n", style=_COLOURS[replica])
        content.rstrip()
        boxes.append(Panel(content, title=f"node {node}", expand=False))
    console.print(Columns(boxes))
    partitions = " ".join(f"{{{','.join(map(str, group))}}}" for group in layout.partition_groups)
    replications = " ".join(f"{{{','.join(map(str, group))}}}" for group in layout.replication_groups)
    console.print(f"partition groups {partitions}: gather and reduce-scatter, in every microstep")
    if optimizer_shard_size is not None:
        console.print(f"replication groups {replications}: reduce-scatter gradients and gather weights, once a step")
        console.print(f"optimizer states: 1/{optimizer_shard_size} on each rank")
    elif layout.num_replicas > 1:
        console.print(f"replication groups {replications}: all-reduce gradients, once a step")
    if layout.spans_nodes:
        console.print("a partition spans nodes: collectives run in two stages, across and inside them")


def _train(
    console: Console,
    folder: Path,
    seed: int,
    *,
    shard_size: int,
    until: int,
    total: int,
    divide_states: bool = False,
    begin: int = 0,
    resume: Path | None = None,
    save: Path | None = None,
) -> list[dict[str, Any]]:
    """Runs torchrun and draws its progress; returns the events that rank 0 reported."""
    arguments = ["--folder", folder, "--seed", seed, "--shard-size", shard_size, "--until", until]
    arguments += ["--total-steps", total, *(["--optimizer-shard-size", "world"] if divide_states else [])]
    for option, path in (("--resume", resume), ("--save", save)):
        arguments += [option, path] if path is not None else []
    events = folder / "events.jsonl"
    events.unlink(missing_ok=True)
    logs = folder / f"logs-{shard_size}"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    seen: list[dict[str, Any]] = []
    with _torchrun(arguments, logs) as process, Progress(*columns, console=console) as bar:
        task = bar.add_task("starting four processes", total=until - begin, loss="-")
        running = True
        while running:
            running = process.poll() is None
            for event in _new_events(events, len(seen)):
                seen.append(event)
                if event["kind"] == "step":
                    loss = f"{event['loss']:.3f}"
                    bar.update(task, completed=event["step"] - begin, loss=loss, description="training")
                    if not console.is_terminal and event["step"] % 20 == 0:
                        console.print(f"step {event['step']}: loss {loss}")
            time.sleep(0.2)
    if process.returncode != 0:
        raise DemoError(f"A process of the demo failed (exit code {process.returncode}).\n{_end_of_logs(logs)}")
    return seen


@contextmanager
def _torchrun(arguments: list[Any], logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Starts four processes whose output goes to files, and ends them when the context ends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["--redirects", "3", "--log-dir", str(logs), "-m", "lightning_mics.demo.train", *map(str, arguments)]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    logs.mkdir()
    with (logs / "torchrun.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, preexec_fn=end_with_parent
        )
        try:
            yield process
        finally:
            # Those that train would finish a step first, for which nobody waits.
            end_with_children(process, patience=3)


def _new_events(path: Path, already: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # a line without its end is still being written
    return [json.loads(line) for line in lines[already:]]


def _end_of_logs(logs: Path) -> str:
    """Returns the end of the log that tells most: the first process's that ends in an error, else torchrun's."""
    candidates = [path for path in sorted(logs.rglob("stderr.log")) if "Error" in path.read_text()]
    chosen = candidates[0] if candidates else logs / "torchrun.log"
    return "\n".join(chosen.read_text().splitlines()[-25:])


def _find(events: list[dict[str, Any]], kind: str, **facts: Any) -> dict[str, Any]:
    return next(
        event for event in events if event["kind"] == kind and all(event[name] == fact for name, fact in facts.items())
    )


def _summarise(console: Console, events: list[dict[str, Any]], checkpoint: Path, num_tokens: int, steps: int) -> None:
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    traffic = _find(events, "traffic")
    before, after = (_find(events, "validation", when=when)["loss"] for when in ("start", "end"))
    table = Table(title="What it took", title_justify="left", show_header=False)
    table.add_row("training loss, first and last step", f"{losses[0]:.3f} -> {losses[-1]:.3f}")
    table.add_row("loss on held-out text", f"{before:.3f} -> {after:.3f}")
    table.add_section()
    for hop in Hop:
        inside, outside = (count / steps for count in traffic[hop.name])
        sent = f"{format_bytes(inside)} inside a node, {format_bytes(outside)} out of it"
        table.add_row(f"{hop.value}, a step", sent)
    ours = sum(traffic[hop.name][1] for hop in Hop) / steps
    full = traffic["full_sharding"] / steps
    table.add_row("out of a node in all, a step", f"[bold]{format_bytes(ours)}[/]")
    table.add_row("full sharding would send", f"{format_bytes(full)}, [bold]{full / ours:.1f} times[/] as much")
    largest, whole = traffic["states"]
    table.add_row("optimizer states", f"{format_bytes(whole)}, {format_bytes(largest)} on the fullest rank")
    table.add_section()
    files = list(checkpoint.iterdir())
    size = sum(file.stat().st_size for file in files)
    shards = sum(file.suffix == ".distcp" for file in files)
    states = f"{traffic['parameters'] / 1e6:.2f} M parameters and their AdamW states"
    table.add_row("checkpoint", f"{format_bytes(size)} in {shards} shards: {states}, each shard once")
    console.print(table)


def _sample(console: Console, folder: Path, checkpoint: Path, seed: int) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    from lightning_mics.checkpoint import consolidate

    logging.disable_progress_bar()
    with console.status("Writing ..."):
        model = GPT2LMHeadModel.from_pretrained(str(consolidate(checkpoint, folder / "model")))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        torch.manual_seed(seed)
        prompt = torch.tensor([tokenizer.encode("def ").ids])
        sampled = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_length=model.config.n_positions,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            pad_token_id=0,
        )
    console.print(Panel(Text(tokenizer.decode(sampled[0].tolist())), expand=False))


def _compare(console: Console, first: list[dict[str, Any]], second: list[dict[str, Any]], steps: int) -> None:
    table = Table(title="The loss goes on from where it was", title_justify="left")
    for name in ("step", "shard size", "training loss", "loss on held-out text"):
        table.add_column(name, justify="right")
    runs = [event for event in [*first, *second] if event["kind"] == "step"]
    loss_at = {event["step"]: f"{event['loss']:.3f}" for event in runs}
    saved, loaded, end = (
        f"{_find(events, 'validation', when=when)['loss']:.5f}"
        for events, when in ((first, "end"), (second, "start"), (second, "end"))
    )
    last = max(loss_at)
    table.add_row(str(steps), "2, saved", loss_at[steps], saved)
    table.add_row(str(steps), "4, loaded", "", loaded)
    table.add_row(str(steps + 1), "4", loss_at[steps + 1], "")
    table.add_row(str(last), "4", loss_at[last], end)
    console.print(table)
