"""Runs requests through a real engine loop on this thread."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.settings import Settings
from engine.build import build
from engine.loop import EngineLoop
from engine.protocol import Submit
from scheduler.request import Request, SamplingParams
from tests.engine.poison import poison


def engine(path: Path, **settings: Any) -> EngineLoop:
    """An engine on a checkpoint: float32, one thread (the test runner has the other cores), NaN
    in blocks that hold nothing.

    `TEST_DEVICE=cuda` puts it on a GPU, which is how `benchmarks.gpu_check` runs the tests.
    """
    device = os.environ.get("TEST_DEVICE", "cpu")
    wanted = Settings.of(model=str(path), dtype="float32", cpu_threads=1, device=device, **settings)
    return poison(build(wanted))


def request(name: str, prompt: Iterable[int], **sampling: Any) -> Request:
    params = {"temperature": 0.0, "seed": 0, "max_tokens": 16, "ignore_eos": True, **sampling}
    return Request(id=name, prompt_ids=tuple(prompt), sampling=SamplingParams(**params))


def answers(loop: EngineLoop, requests: list[Request]) -> dict[str, list[int]]:
    """Submits all at once and steps until everything is answered: token ids by request id."""
    loop.take(Submit(requests))
    tokens: dict[str, list[int]] = {r.id: [] for r in requests}
    while loop.has_work:
        loop.step()
        output = loop.collect()
        assert not output.refused, output.refused
        assert not output.failed, output.failed
        for delta in output.deltas:
            tokens[delta.request_id].extend(delta.tokens)
    loop.scheduler.check()
    assert loop.scheduler.cache.pool.num_used == 0
    return tokens
