"""The replayed stream is one that the client reads."""

from __future__ import annotations

import asyncio
import multiprocessing

from benchmarks import answers, client_cost
from benchmarks.sse import Client


async def test_every_event_comes_to_every_stream() -> None:
    here, there = multiprocessing.Pipe()
    server = asyncio.create_task(client_cost.replay(5, there))
    await asyncio.sleep(0)
    port = await asyncio.to_thread(here.recv)
    replies, seconds = await client_cost.receive(Client(f"http://127.0.0.1:{port}"), 3)
    server.cancel()
    assert [len(answers.read(reply).times) for reply in replies] == [5, 5, 5]
    assert all(len(reply.times) >= 5 for reply in replies) and seconds > 0
