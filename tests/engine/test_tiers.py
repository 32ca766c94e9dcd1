"""Blocks that leave the pool and come back change no answer."""

from pathlib import Path
from typing import Any

import pytest

from engine.build import StartError
from engine.loop import EngineLoop
from scheduler.request import Request
from tests.engine.drive import answers, engine, request
from tests.models import checkpoints

SYSTEM = list(range(30, 110))
# Room for one long prompt or three short ones: everything else is evicted.
SMALL = {
    "admission_watermark": 0,
    "num_gpu_blocks_override": 24,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 6,
}


@pytest.fixture(scope="module", params=["llama", "qwen2-sliding"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make(request.param, tmp_path_factory.mktemp("tiers"))


def chats(count: int = 6) -> list[Request]:
    return [request(f"r{i}", [40 + i, *SYSTEM, 200 + i], max_tokens=60) for i in range(count)]


def alone(path: Path, items: list[Request], **settings: Any) -> dict[str, list[int]]:
    loop = engine(path, enable_prefix_caching=False, **settings)
    return {item.id: answers(loop, [item])[item.id] for item in items}


def in_turn(loop: EngineLoop, items: list[Request]) -> dict[str, list[int]]:
    return {item.id: answers(loop, [item])[item.id] for item in items}


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_prefixes_come_back_from_host_memory(path: Path, cache_dtype: str):
    items = chats()
    want = alone(path, items, kv_cache_dtype=cache_dtype)
    loop = engine(path, host_kv_bytes="8MiB", kv_cache_dtype=cache_dtype, **SMALL)
    assert in_turn(loop, items) == want
    computed = loop.scheduler.cache.tiers.host_hits
    assert in_turn(loop, items) == want
    stats = loop.collect().stats
    assert stats.host_hits >= computed + 5 * 64, "the prompts should come back"
    assert 0 < stats.host_blocks_used <= stats.host_blocks_total == loop.info.num_host_blocks


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_crowd_that_is_preempted(path: Path, mode: str, prefix_cache: bool):
    items = chats()
    want = alone(path, items)
    loop = engine(
        path,
        host_kv_bytes="8MiB",
        preemption=mode,
        enable_prefix_caching=prefix_cache,
        **SMALL,
    )
    assert answers(loop, items) == want
    stats = loop.collect().stats
    swapped, recomputed = stats.preemptions_swap, stats.preemptions_recompute
    assert stats.preemptions == swapped + recomputed > 0
    assert swapped if mode == "swap" else not swapped


def test_a_tier_smaller_than_one_block_is_refused(path: Path):
    with pytest.raises(StartError, match="--host-kv-bytes must hold at least one KV block"):
        engine(path, host_kv_bytes="100B")


def test_more_host_memory_than_there_is_is_refused(path: Path):
    with pytest.raises(StartError, match="of host memory are free"):
        engine(path, host_kv_bytes="900TiB")
