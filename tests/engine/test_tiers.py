"""Blocks that leave the pool and come back change no answer."""

import os
from pathlib import Path
from typing import Any

import pytest

from configs.settings import Settings, SettingsError
from engine.build import StartError
from engine.loop import EngineLoop
from scheduler.request import Request
from tests.engine.drive import answers, engine, request
from tests.models import checkpoints

Answers = dict[str, list[int]]

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


@pytest.fixture(scope="module")
def want(path: Path) -> Answers:
    return alone(path, chats())


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
def test_a_crowd_that_is_preempted(path: Path, want: Answers, mode: str, prefix_cache: bool):
    items = chats()
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
    with pytest.raises(StartError, match="host_kv_bytes must hold at least one KV block"):
        engine(path, host_kv_bytes="100B")


def test_more_host_memory_than_there_is_is_refused(path: Path):
    with pytest.raises(StartError, match="of host memory that are free"):
        engine(path, host_kv_bytes="900TiB")


# ---------------------------------------------------------------------- disk


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    return {"disk_kv_path": str(tmp_path / "kv"), **SMALL}


def test_prefixes_come_back_from_disk_after_a_restart(
    path: Path, want: Answers, disk: dict[str, Any]
):
    items = chats()
    for life in range(2):
        loop = engine(path, host_kv_bytes="300KiB", **disk)
        assert in_turn(loop, items) == want
        stats = loop.collect().stats
        assert stats.disk_errors == 0
        assert life == 0 or stats.disk_hits >= 6 * 64, "the first prompts should be found"
        loop.close()
    loop = engine(path, **disk)
    assert answers(loop, items) == want, "all at once"
    assert loop.collect().stats.disk_hits > 0
    loop.close()


def test_a_tiny_host_tier_spills_to_disk_and_back(path: Path, want: Answers, disk: dict[str, Any]):
    """A few blocks of host memory: everything passes on to the disk while the server runs."""
    loop = engine(path, host_kv_bytes="150KiB", preemption="swap", **disk)
    assert loop.info.num_host_blocks < 24
    for _ in range(2):
        assert in_turn(loop, chats()) == want
    assert answers(loop, chats()) == want
    loop.close()
    assert loop.scheduler.cache.tiers.disk_hits > 0


@pytest.mark.parametrize("damage", ["bit", "cut", "model"])
def test_files_that_cannot_be_trusted_change_no_answer(
    path: Path, want: Answers, disk: dict[str, Any], damage: str, caplog
):
    items = chats(3)
    want = {item.id: want[item.id] for item in items}
    loop = engine(path, **disk)
    assert in_turn(loop, items) == want
    loop.close()
    files = sorted(Path(disk["disk_kv_path"], "blocks").iterdir())
    assert len(files) > 10
    for file in files:
        data = bytearray(file.read_bytes())
        if damage == "bit":
            data[len(data) // 2] ^= 16
        elif damage == "cut":
            del data[-1]
        else:
            at = data.index(b'"model": "') + len(b'"model": "')
            data[at : at + 4] = b"beef"
        file.write_bytes(data)
    loop = engine(path, **disk)
    assert in_turn(loop, items) == want
    assert loop.scheduler.cache.tiers.disk_hits == 0
    assert loop.collect().stats.disk_errors > 0 and "is not used" in caplog.text
    loop.close()


def test_another_model_does_not_find_them(
    path: Path, disk: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, caplog
):
    items = chats(1)
    loop = engine(path, **disk)
    in_turn(loop, items)
    loop.close()
    other = checkpoints.make("llama", tmp_path_factory.mktemp("other"))
    os.utime(other / "model.safetensors", (1, 1))
    loop = engine(other, **disk)
    assert in_turn(loop, items) == alone(other, items)
    assert loop.scheduler.cache.tiers.disk_hits == 0 and "is not used" not in caplog.text
    loop.close()


def test_a_second_server_on_the_folder_is_refused(path: Path, disk: dict[str, Any]):
    loop = engine(path, **disk)
    with pytest.raises(StartError, match="in use by another server"):
        engine(path, **disk)
    loop.close()


def test_a_disk_tier_smaller_than_one_block_is_refused(path: Path, disk: dict[str, Any]):
    with pytest.raises(StartError, match="disk_kv_bytes must hold at least one KV block"):
        engine(path, disk_kv_bytes=100, **disk)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"preemption": "swap"}, "preemption swap needs host_kv_bytes"),
        ({"disk_kv_bytes": "1GiB"}, "disk_kv_bytes needs disk_kv_path"),
        (
            {"disk_kv_path": "x", "enable_prefix_caching": False},
            "disk_kv_path needs enable_prefix_caching",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], line: str):
    with pytest.raises(SettingsError, match=line):
        Settings.of(**settings)
