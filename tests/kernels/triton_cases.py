"""The Triton kernels against the oracle: run by `test_triton.py`, in a process of its own.

On a CPU that process has TRITON_INTERPRET=1 in its environment from the start; on a CUDA device
the same cases run compiled. The interpreter is slow, so each case covers several things at once.
"""

import os

import pytest
import torch

from kernels import paged_decode, paged_prefill, reference, store_kv
from kernels.dispatch import backend, warm_up
from tests.kernels import problems

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF, FULL = torch.float16, torch.float32
DTYPES = (HALF, FULL) if INTERPRETED else (HALF, FULL, torch.bfloat16)
LENS = [1, 15, 0, 16, 17, 333]
CHUNKS = [1, 15, 0, 3, 17, 70]

# heads, kv_heads, head_dim, block_size, splits, options
DECODE = [
    (1, 1, 64, 16, 1, {}),
    (8, 8, 80, 16, 3, {}),
    (8, 2, 128, 64, 1, {"window": 20}),
    (14, 2, 128, 16, 11, {"softcap": 5.0}),
    (4, 2, 64, 16, 4, {"window": 200}),
    (2, 1, 256, 16, 2, {}),
    (2, 2, 96, 64, 3, {"window": 33, "softcap": 20.0}),
]
# heads, kv_heads, head_dim, block_size, chunks, options
PREFILL = [
    (1, 1, 64, 16, CHUNKS, {}),
    (8, 2, 80, 64, CHUNKS, {"window": 20}),
    (14, 2, 128, 16, [1, 1, 0, 1, 1, 2], {"softcap": 5.0}),
    (7, 1, 64, 16, CHUNKS, {"window": 100}),
    (2, 2, 128, 16, [1, 2, 0, 5, 9, 150], {}),
    (2, 1, 256, 64, CHUNKS, {}),
]


def with_dtypes(cases):
    """Every case in every dtype on a device; interpreted, the dtypes take turns."""
    if INTERPRETED:
        return [(*case, DTYPES[i % len(DTYPES)]) for i, case in enumerate(cases)]
    return [(*case, dtype) for case in cases for dtype in DTYPES]


@pytest.mark.parametrize("case", with_dtypes(DECODE), ids=str)
def test_decode(case):
    heads, kv_heads, dim, block, splits, options, dtype = case
    problem = problems.make(heads, kv_heads, dim, block, LENS, dtype=dtype)
    want = problems.naive(problem, **options)
    options = {**options, "num_splits": splits}
    got = problems.run_decode(paged_decode.paged_decode, problem.to(DEVICE), **options)
    assert problems.error(got, want) < TOLERANCE[dtype]
    assert not got[2].any()


@pytest.mark.parametrize("case", with_dtypes(PREFILL), ids=str)
def test_prefill(case):
    heads, kv_heads, dim, block, chunks, options, dtype = case
    problem = problems.make(heads, kv_heads, dim, block, LENS, chunks, dtype)
    got = problems.run_prefill(paged_prefill.paged_prefill, problem.to(DEVICE), **options)
    assert problems.error(got, problems.naive(problem, **options)) < TOLERANCE[dtype]


def test_splits_are_chosen_without_a_hint():
    problem = problems.make(2, 1, 64, 16, [40, 300])
    for hint in (None, 300, 100_000):
        got = problems.run_decode(
            paged_decode.paged_decode, problem.to(DEVICE), max_context_len=hint
        )
        assert problems.error(got, problems.naive(problem)) < 1e-5


def test_rows_beyond_the_last_chunk_are_left_alone():
    problem = problems.make(4, 2, 32, 16, [9, 20], [3, 5]).to(DEVICE)
    problem.query = torch.cat([problem.query, problem.query])
    out = torch.full_like(problem.query, 7.0)
    problems.run_prefill(paged_prefill.paged_prefill, problem, out=out)
    assert (out[8:] == 7.0).all() and not (out[:8] == 7.0).any()


@pytest.mark.parametrize("slots_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_store(dtype, slots_dtype):
    key, value = (half.to(DEVICE) for half in problems.fused_store(3, 80, 20, dtype))
    slots = torch.randperm(8 * 16)[:20].to(DEVICE, slots_dtype)
    slots[::7] = -1
    got, want = (torch.zeros(2, 8, 3, 16, 80, dtype=dtype, device=DEVICE) for _ in range(2))
    store_kv.store_kv(key, value, got, slots)
    reference.store_kv(key, value, want, slots)
    assert torch.equal(got, want)


def test_warm_up_and_dispatch_by_name():
    chosen = backend(DEVICE, "triton")
    assert chosen.name == "triton" and chosen.paged_decode is paged_decode.paged_decode
    warm_up(chosen, device=DEVICE, dtype=FULL, heads=4, kv_heads=2, head_dim=32, block_size=16)
