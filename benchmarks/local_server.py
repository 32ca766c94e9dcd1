"""A server of our own to measure: `quire serve` with random weights, in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.sse import BenchError, Client

SHAPE: Final = "llama-56m"
ROOT: Final = Path(__file__).parents[1]
FOLDER: Final = ROOT / ".cache" / "bench"
START_SECONDS: Final = 600.0  # the first start compiles kernels


def make_checkpoint(shape: str = SHAPE) -> Path:
    """The folder of a random model (one of `benchmarks.shapes`), made once."""
    folder = FOLDER / shape
    if not folder.is_dir():
        print(f"making {folder.name}", file=sys.stderr)
        unfinished = folder.with_name(f"{shape}.unfinished")
        command = [sys.executable, "-m", "benchmarks.make_checkpoint", "--shape", shape]
        subprocess.run([*command, str(unfinished)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        unfinished.rename(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(model: Path, flags: Sequence[str]) -> Iterator[str]:
    """`quire serve`, ready; its URL.

    Raises:
        BenchError: it ended, or was not ready in time.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), FOLDER / "server.log"
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", str(port), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{port}"
        asyncio.run(_until_healthy(Client(url), process, log))
        yield url
    finally:
        process.terminate()
        process.wait()


async def _until_healthy(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"the server ended:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(BenchError):
            if (await client.get("/health"))[0] == 200:
                return
        await asyncio.sleep(0.2)
    raise BenchError(f"the server was not ready in {START_SECONDS:.0f} s; its log is {log}")
