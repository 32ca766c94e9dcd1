"""Quantized pages through the whole engine: same answers however requests share the pages."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from configs.settings import Settings
from engine import build
from kernels import dispatch
from kernels.pages import QuantizedPages
from paged_cache.layout import QUANTIZED
from scheduler.request import Request
from tests.engine.drive import answers, engine, request
from tests.engine.test_sharing import by_index
from tests.models import checkpoints

REAL = dispatch.backend
BACKENDS = ("torch", "numba")
KIND = "qwen2-sliding"


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(dispatch, "backend", lambda device: REAL(device, name))


def prompts() -> list[tuple[int, ...]]:
    rng = random.Random(3)
    ids = range(3, checkpoints.VOCAB_SIZE)
    shared = rng.choices(ids, k=40)
    lengths = (1, 16, 33, 90, 5, 64)
    return [tuple([*shared, *rng.choices(ids, k=n)][: max(n, 1)]) for n in lengths]


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_do_not_depend_on_batching_sharing_or_preemption(
    backend: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, backend)
    path = checkpoints.make(KIND, tmp_path)
    asked = [request(f"r{i}", p, max_tokens=24) for i, p in enumerate(prompts())]
    roomy = engine(path, kv_cache_dtype=name, num_gpu_blocks_override=200)
    assert all(isinstance(pages, QuantizedPages) for pages in roomy.runner.inputs.pages)
    first = answers(roomy, asked)
    again = answers(roomy, asked)  # prefixes are found now
    tight = engine(
        path,
        kv_cache_dtype=name,
        num_gpu_blocks_override=24,
        max_num_batched_tokens=32,
        max_num_seqs=8,
    )
    assert answers(tight, asked) == again == first
    assert tight.scheduler.num_preemptions > 0
    forked = Request(id="forked", prompt_ids=asked[2].prompt_ids, sampling=asked[2].sampling, n=3)
    assert by_index(roomy, forked) == [first["r2"]] * 3


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_pool_is_as_large_as_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "torch")
    path = checkpoints.make("qwen3", tmp_path)
    budget = 1 << 18
    loop = engine(path, kv_cache_dtype=name, kv_cache_memory_bytes=budget, max_model_len=500)
    info, storage = loop.info, loop.runner.storage
    assert storage.num_bytes == info.num_blocks * info.block_size * info.kv_bytes_per_token
    assert budget - info.block_size * info.kv_bytes_per_token < storage.num_bytes <= budget


def test_heads_that_int4_does_not_hold_are_refused() -> None:
    with pytest.raises(build.StartError, match="int4 needs a head size that 32 divides"):
        build._kv_format("int4", torch.float32, 80)
    assert build._kv_format("auto", torch.bfloat16, 80).dtype == "bfloat16"
    assert Settings.of(kv_cache_dtype="int8").cache.kv_cache_dtype == "int8"
