"""`quire serve` from port to exit code, over an engine that only pretends."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from configs.settings import Settings
from engine.protocol import EngineInfo, Progress
from server.banner import box, facts
from server.keys import KeyRing
from server.progress import ProgressBars, ProgressLines

ROOT = Path(__file__).parents[2]

INFO = EngineInfo(
    model_path="/models/tiny",
    architecture="LlamaForCausalLM",
    device="cpu",
    dtype="float32",
    vocab_size=100,
    max_model_len=2048,
    eos_token_ids=[0],
    block_size=16,
    num_blocks=1000,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    kv_bytes_per_token=1024,
    weight_bytes=3 << 20,
    concurrency=7,
)

SCRIPT = """
import asyncio, gc, sys
from configs.settings import Settings
from engine.client import EngineStartError
from engine.protocol import Progress
from server import launch
from tests.server.test_launch import INFO

class Engine:
    info, alive, quiet_seconds, exit_code = INFO, True, 0.0, 0
    async def close(self):
        if self.alive:
            print("engine closed", flush=True)
        self.alive = False

async def connect(settings, on_progress):
    on_progress(Progress("weights", 0, 2048))
    if settings.model.model == "missing":
        raise EngineStartError("no such model", expected=True)
    if settings.model.model == "broken":
        raise EngineStartError("Traceback of the engine", expected=False)
    if settings.model.model == "slow":
        print("loading", flush=True)
        await asyncio.sleep(600)
    on_progress(Progress("weights", 2048, 2048, "tiny"))
    return Engine()

async def route(scope, receive, send):
    headers = [(b"content-length", b"6")]
    body = b"frozen" if gc.get_freeze_count() else b"moving"
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})

launch.connect = connect
launch.build_app = lambda settings, keys, spans, lifecycle, engine, startup: route
sys.exit(launch.serve(Settings.of(port=0, model=sys.argv[1], log_format="text")))
"""


@contextlib.contextmanager
def serving(model: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, model],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def lines_until(process: subprocess.Popen[str], word: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(
        f"ended without {word!r}: {lines} {process.stderr and process.stderr.read()}"
    )


def address(lines: list[str]) -> str:
    return next(line.split()[2] for line in lines if "address" in line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_closes_the_engine_and_exits_0(number: signal.Signals) -> None:
    with serving("embedded") as process:
        url = address(lines_until(process, "curl"))
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == b"frozen"  # what the start left
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "engine closed\n")
        [started] = err.splitlines()
        assert "INFO quire.start: weights: 2 KiB, tiny (" in started


def test_a_signal_while_the_engine_starts_exits_0_at_once() -> None:
    with serving("slow") as process:
        lines_until(process, "loading")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 10


def test_an_expected_start_error_is_one_line_and_2() -> None:
    with serving("missing") as process:
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (2, "quire: no such model\n")


def test_an_unexpected_one_is_a_traceback_and_1() -> None:
    with serving("broken") as process:
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "Traceback of the engine" in err


def test_the_box_tells_sizes_and_a_first_request() -> None:
    settings = Settings.of(host="0.0.0.0", api_key="4711", served_model_name=["a", "b"])
    shown = box(facts(settings, KeyRing.read(settings.http), INFO, ("0.0.0.0", 8000)))
    *lines, request = shown.split("\n")
    assert len({len(line) for line in lines}) == 1
    assert "http://127.0.0.1:8000" in shown
    assert "1,000 blocks x 16 = 16,000 tokens, 15.6 MiB" in shown
    assert "a, b" in shown and "2,048 tokens at most" in shown
    assert "7 sequences of 2,048 tokens" in shown
    assert "4711" not in shown and "$QUIRE_API_KEY" in request
    assert "$" not in facts(settings, KeyRing(), INFO, ("0.0.0.0", 8000))["try"]


def test_groups_of_layers_share_the_blocks() -> None:
    info = msgspec.structs.replace(INFO, kv_groups=4)
    told = facts(Settings.of(), KeyRing(), info, ("127.0.0.1", 8000))
    assert told["KV cache"].startswith("1,000 blocks x 16 / 4 layer groups = 4,000 tokens")


@pytest.mark.parametrize(
    ("cache", "row"),
    [
        ({"host_kv_bytes": "4GiB"}, "host 4 GiB = 90 blocks"),
        ({"disk_kv_path": "/d"}, "host 256 MiB = 90 blocks, disk 16 GiB at /d"),
        (
            {"host_kv_bytes": "1GiB", "disk_kv_path": "/d", "disk_kv_bytes": "20GiB"},
            "host 1 GiB = 90 blocks, disk 20 GiB at /d",
        ),
    ],
)
def test_the_box_tells_the_tiers_there_are(cache: dict[str, str], row: str) -> None:
    info = msgspec.structs.replace(INFO, num_host_blocks=90)
    assert facts(Settings.of(**cache), KeyRing(), info, ("::1", 8000))["KV tiers"] == row
    assert "KV tiers" not in facts(Settings.of(), KeyRing(), INFO, ("::1", 8000))


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as bars:
        bars.show(Progress("download", 0, 0))
        bars.show(Progress("download", 4096, 4096, "model.safetensors"))
        bars.show(Progress("memory", 1, 1))
    shown = capsys.readouterr().err
    assert "download: 100%" in shown and "4.00k/4.00k" in shown


def test_progress_is_one_line_for_each_phase_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "quire.start")
    with ProgressLines() as lines:
        lines.show(Progress("weights", 0, 0))
        for done in (0, 1024, 2048, 2048):
            lines.show(Progress("weights", done, 2048))
        lines.show(Progress("memory", 1, 1, "64 blocks"))
    first, second = caplog.messages
    assert first.startswith("weights: 2 KiB (")
    assert second.startswith("memory: 64 blocks (")
