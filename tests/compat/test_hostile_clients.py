"""Clients that send garbage, and clients that go away: the server must not notice either for long.

`tests.compat.serve` checks afterwards that no block leaked and the engine is the same process."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter

import httpx
import pytest

from tests.compat.target import Target

BODIES = int(os.environ.get("TEST_FUZZ_BODIES", "20000"))
DISCONNECTS = int(os.environ.get("TEST_DISCONNECTS", "1000"))
SEED = int(os.environ.get("TEST_SEED", "1"))
CLIENTS = 16

CHAT = "/v1/chat/completions"
WHOLE: list[tuple[str, dict[str, object]]] = [
    (CHAT, {"messages": [{"role": "user", "content": "hi ü 👩‍👩‍👧"}], "max_tokens": 1}),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "a"}], "stop": ["x"], "n": 2, "max_tokens": 2},
    ),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1, "seed": 3, "temperature": 0.5}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 1, "logit_bias": {"5": -100}}),
    ("/tokenize", {"prompt": "a b"}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 16}),
]
SPLICES = (
    b"null",
    b"-1",
    b"1e999",
    b"{}",
    b"[]",
    b'""',
    b"\\ud800",
    b"\x00",
    b"\xff",
    b'"a":',
    b"[[[[",
)


def damaged(body: bytes, rng: random.Random) -> bytes:
    """`body` after one to four random edits of its bytes."""
    data = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 20)]
            case 3:
                data[at:at] = rng.choice(SPLICES)
            case 4:
                data = data[:at]
            case _:
                data[at : at + rng.randint(1, 6)] = rng.choice(SPLICES)
    return bytes(data)


async def test_damaged_bodies(target: Target) -> None:
    rng = random.Random(SEED)
    statuses: Counter[int] = Counter()
    jobs = iter(range(BODIES))
    headers = {"authorization": f"Bearer {target.key}", "content-type": "application/json"}

    async def client() -> None:
        async with httpx.AsyncClient(base_url=target.url, headers=headers, timeout=120) as http:
            for _ in jobs:
                path, fields = rng.choice(WHOLE)
                body = damaged(json.dumps(fields, ensure_ascii=rng.random() < 0.5).encode(), rng)
                answer = await http.post(path, content=body)
                statuses[answer.status_code] += 1
                assert answer.status_code < 500 or answer.status_code == 503, (body, answer.text)
                assert "Traceback" not in answer.text
                if answer.status_code >= 400:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    print(f"{BODIES} damaged bodies, seed {SEED}: {dict(sorted(statuses.items()))}")
    assert statuses[400] > BODIES // 2


@pytest.mark.parametrize("stream", [True, False])
async def test_clients_that_go_away(target: Target, stream: bool) -> None:
    """They leave at a random moment: while queued, in prefill, in decode, with several answers."""
    rng = random.Random(SEED + stream)
    left = finished = 0
    jobs = iter(range(DISCONNECTS // 2))
    headers = {"authorization": f"Bearer {target.key}"}

    async def client() -> None:
        nonlocal left, finished
        async with httpx.AsyncClient(base_url=target.url, headers=headers, timeout=120) as http:
            for _ in jobs:
                prompt = "word " * rng.choice((1, 40, 400))
                body = {
                    "messages": [{"role": "user", "content": prompt + str(rng.random())}],
                    "n": rng.choice((1, 1, 3)),
                    "temperature": 1.5,
                    "max_tokens": rng.choice((5, 50, 300)),
                    "ignore_eos": True,
                    "stream": stream,
                }
                try:
                    async with asyncio.timeout(rng.expovariate(1 / rng.choice((0.05, 0.5, 3.0)))):
                        answer = await http.post(CHAT, json=body)
                        assert answer.status_code in (200, 503), answer.text
                        finished += 1
                except TimeoutError:
                    left += 1

    await asyncio.gather(*(client() for _ in range(3 * CLIENTS)))
    print(f"{left} clients left, {finished} stayed; stream: {stream}, seed {SEED + stream}")
    assert left > DISCONNECTS // 8
