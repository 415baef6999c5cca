"""S3 as s3fs speaks it, behind a line that throttles, fails and is cut, with writers that are killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from torch import nn

from lightning_mics import load_checkpoint, save_checkpoint
from lightning_mics.checkpoint import storage

URL = "s3://bucket/run/last.ckpt"
_BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_FAILED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Line:
    """A proxy. Of connections, some are answered by an error; the others are slow, and cut after some bytes."""

    def __init__(self, port: int, seed: int) -> None:
        self._target, self._random = port, random.Random(seed)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.refused = self.cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client, self._random.random()), daemon=True).start()

    def _serve(self, client: socket.socket, chance: float) -> None:
        with client, suppress(OSError):
            if chance < 0.2:
                self.refused += 1
                client.recv(1 << 16)
                client.sendall(_BUSY if chance < 0.1 else _FAILED)
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                left = [int(self._random.uniform(2_000, 120_000))]
                back = threading.Thread(target=self._pump, args=(server, client, left), daemon=True)
                back.start()
                self._pump(client, server, left)
                back.join()

    def _pump(self, source: socket.socket, target: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 13):
                time.sleep(0.001)
                target.sendall(data[: left[0]])
                left[0] -= len(data)
                if left[0] <= 0:
                    self.cut += 1
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "made-up")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


def options(port: int) -> dict[str, Any]:
    return {"endpoint_url": f"http://127.0.0.1:{port}"}


def of_step(step: int) -> nn.Module:
    model = nn.Linear(100, 100)
    for param in model.parameters():
        nn.init.constant_(param, step)
    return model


def save_from(first: int, port: int, num_steps: int = 1_000_000) -> int:
    for step in range(first, first + num_steps):
        save_checkpoint(URL, of_step(step), meta={"step": step}, storage_options=options(port))
    return step


def load_step(port: int) -> int:
    model = of_step(0)
    step = int(load_checkpoint(URL, model, storage_options=options(port))["step"])
    assert {float(value) for param in model.parameters() for value in param.unique()} == {float(step)}
    return step


def list_objects(port: int) -> list[str]:
    return sorted(storage.place("s3://bucket/run", options(port)).tree())


def make_bucket(port: int) -> None:
    import s3fs

    s3fs.S3FileSystem(**options(port)).mkdir("bucket")


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Runs something in a process of its own: s3fs has threads, which a fork would lose."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


@pytest.mark.campaign
def test_kills_on_a_bad_line_keep_a_whole_checkpoint(
    server: int, record_property: Callable[[str, object], None]
) -> None:
    apart(make_bucket, server)
    apart(save_from, 1, server, 1)
    line, generator, kills, seen, leftovers = Line(server, seed=0), random.Random(1), 30, [1], 0
    for _ in range(kills):
        writer = multiprocessing.get_context("fork").Process(target=save_from, args=(seen[-1] + 1, line.port))
        writer.start()
        time.sleep(generator.uniform(0.3, 3.0))
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        leftovers += any("incomplete" in name for name in apart(list_objects, server))
        seen.append(apart(load_step, line.port))
        assert seen[-1] >= seen[-2]
    apart(save_from, seen[-1] + 1, line.port, 1)
    line.close()
    left = apart(list_objects, server)
    assert len(left) == 5 and not any("incomplete" in name for name in left), left
    record_property(
        "figures",
        f"{kills} writers killed (SIGKILL) while they saved to an S3 server (moto) behind a proxy that answered "
        f"{line.refused} requests with 500 or 503 and cut {line.cut} connections half-way; {len(set(seen))} different "
        f"checkpoints read, 0 lost, 0 mixed; {leftovers} kills left something, all of it deleted by the next save",
    )
