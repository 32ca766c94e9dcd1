"""Both engines behind the one client interface: in this process, and in one of their own."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from configs.settings import Settings
from engine.build import build
from engine.client import (
    EngineDead,
    EngineStartError,
    InprocEngine,
    ProcessEngine,
    TokenStream,
    connect,
)
from engine.protocol import TokenDelta
from scheduler.request import InvalidRequest
from tests.engine.drive import answers, engine, request
from tests.models import checkpoints

LIMITS = {"max_num_seqs": 8, "num_gpu_blocks_override": 40, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("llama", tmp_path_factory.mktemp("client"))


@contextlib.asynccontextmanager
async def running(kind: str, path: Path) -> AsyncIterator[InprocEngine | ProcessEngine]:
    settings = Settings.of(model=str(path), dtype="float32", cpu_threads=1, **LIMITS)
    if kind == "process":
        client = await connect(settings, lambda progress: None)
    else:
        client = InprocEngine(build(settings))
    try:
        yield client
    finally:
        await client.close()
        assert not client.alive


async def tokens(client, item) -> list[int]:
    return [t for delta in await deltas(await client.submit(item)) for t in delta.tokens]


async def deltas(stream: TokenStream, most: int | None = None) -> list[TokenDelta]:
    """All, or the next `most`."""
    taken: list[TokenDelta] = []

    def take(delta: TokenDelta) -> bool:
        taken.append(delta)
        return len(taken) == most

    await stream.each(take)
    return taken


async def idle(client) -> None:
    """Waits until no block is used."""
    for _ in range(500):
        if not client.stats().blocks_used and not client.stats().running:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still busy: {client.stats()}")


@pytest.mark.parametrize("kind", ["thread", "process"])
async def test_streams_side_by_side(kind: str, path: Path):
    items = [request(f"r{i}", range(3, 10 + 9 * i), max_tokens=20) for i in range(8)]
    want = answers(engine(path, **LIMITS), items)
    async with running(kind, path) as client:
        assert client.alive
        assert (client.info.num_blocks, client.info.vocab_size) == (40, checkpoints.VOCAB_SIZE)
        got = await asyncio.gather(*(tokens(client, item) for item in items))
        assert dict(zip(want, got, strict=True)) == want
        await _inspection(client)
        await _refusals(client)
        await _hang_ups(client)


async def _inspection(client) -> None:
    stream = await client.submit(request("seen", range(50, 90), max_tokens=400))
    assert len(await deltas(stream, 1)) == 1
    found = await client.inspect(verify=True)
    assert found.problem is None
    [seq] = found.view.sequences
    assert (seq.request_id, seq.status) == ("seen", "running")
    [listed] = await client.requests()
    assert (listed.id, listed.state, listed.prompt_tokens) == ("seen", "running", 40)
    held = {block for table in seq.tables for block in table}
    used = {block for block, state in enumerate(found.view.states) if state == 2}
    assert held == used
    assert len(found.view.states) == 40
    await stream.aclose()
    await idle(client)
    explained = await client.explain(request("again", [*range(50, 89), 7, 7]))
    assert explained.explanation.found == 32
    assert explained.outlook.verdict == "admit"
    assert [(piece.reason, piece.diverges_at) for piece in explained.explanation.missing] == [
        ("last_block", None)
    ]


async def _refusals(client) -> None:
    with pytest.raises(InvalidRequest, match="KV blocks") as refused:
        await client.submit(request("big", [5] * 500, max_tokens=400))
    assert refused.value.code == "kv_capacity_exceeded"
    stream = await client.submit(request("twice", [5], max_tokens=400))
    with pytest.raises(InvalidRequest, match="in use"):
        await client.submit(request("twice", [5]))
    await stream.aclose()
    await idle(client)


async def _hang_ups(client) -> None:
    """Streams that are closed, aborted by id, or cancelled free their blocks."""
    long = [request(f"long{i}", [7] * 20, max_tokens=400) for i in range(3)]
    closed, aborted = [await client.submit(item) for item in long[:2]]
    await deltas(closed, 1)
    await closed.aclose()
    client.abort("long1")
    client.abort("never seen")
    reasons = [delta.finish_reason for delta in await deltas(aborted)]
    assert reasons[-1] == "abort"
    task = asyncio.create_task(client.submit(long[2]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(client)


async def test_each_goes_on_where_the_one_before_had_enough(path: Path):
    async with running("thread", path) as client:
        stream = await client.submit(request("a", [5], max_tokens=6, ignore_eos=True))
        first = await deltas(stream, 2)
        await asyncio.sleep(0.05)  # what comes meanwhile is kept
        rest = await deltas(stream)
        assert [len(first), len(first + rest)] == [2, 6]
        assert [delta.finish_reason for delta in rest[-2:]] == [None, "length"]


async def test_what_a_taker_raises_is_its_own(path: Path):
    def refuse(delta: TokenDelta) -> bool:
        raise ValueError("no more")

    async with running("thread", path) as client:
        items = [request(name, [5], max_tokens=6, ignore_eos=True) for name in "ab"]
        broken, whole = [await client.submit(item) for item in items]
        taking = asyncio.create_task(deltas(whole))
        with pytest.raises(ValueError, match="no more"):
            await broken.each(refuse)
        await broken.aclose()
        assert (await taking)[-1].finish_reason == "length"


async def test_a_killed_engine_ends_every_stream(path: Path):
    async with running("process", path) as client:
        stream = await client.submit(request("a", [5], max_tokens=500))
        await deltas(stream, 1)
        os.kill(client._process.pid, signal.SIGKILL)
        with pytest.raises(EngineDead):
            await deltas(stream)
        assert not client.alive
        with pytest.raises(EngineDead):
            await client.submit(request("b", [5]))


async def test_a_start_that_fails_says_why_in_one_line(tmp_path: Path):
    settings = Settings.of(model=str(tmp_path / "nothing"))
    with pytest.raises(EngineStartError, match="nothing") as failed:
        await connect(settings, lambda progress: None)
    assert failed.value.expected
    assert "\n" not in failed.value.message
