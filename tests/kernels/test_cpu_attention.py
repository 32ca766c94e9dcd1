"""The Numba kernels against attention in float64 on the same inputs."""

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import cpu_attention, reference
from kernels.pages import FORMATS
from tests.kernels import problems

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
SHAPES = [
    *((1, 1, 64, 16), (8, 8, 80, 16), (8, 2, 128, 64), (14, 2, 128, 16), (16, 8, 256, 32)),
    *((4, 2, 96, 64), (32, 1, 32, 16), (4, 2, 40, 16), (3, 3, 8, 7)),
]
OPTIONS = [{}, {"window": 20}, {"softcap": 5.0}]
LENS = [1, 15, 0, 16, 17, 333, 1100]
CHUNKS = [1, 15, 0, 3, 17, 70, 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape, dtype):
    problem = problems.make(*shape, LENS, dtype=dtype)
    for options in OPTIONS:
        got = problems.run_decode(cpu_attention.paged_decode, problem, **options)
        assert got.dtype == dtype and not got[2].any()
        assert problems.error(got, problems.naive(problem, **options)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill(shape, dtype):
    problem = problems.make(*shape, LENS, CHUNKS, dtype=dtype)
    for options in OPTIONS:
        got = problems.run_prefill(cpu_attention.paged_prefill, problem, **options)
        assert got.dtype == dtype
        assert problems.error(got, problems.naive(problem, **options)) < TOLERANCE[dtype]


def holds(name: str, shape: tuple[int, ...]) -> bool:
    return name != "int4" or shape[2] % 32 == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_pages(name, shape):
    if not holds(name, shape):
        pytest.skip("int4 has no pages for this head size")
    for options in OPTIONS:
        problem = problems.quantized(problems.make(*shape, LENS), name)
        got = problems.run_decode(cpu_attention.paged_decode, problem, **options)
        assert problems.error(got, problems.naive(problem, **options)) < 1e-5
        problem = problems.quantized(problems.make(*shape, LENS, CHUNKS), name)
        got = problems.run_prefill(cpu_attention.paged_prefill, problem, **options)
        assert problems.error(got, problems.naive(problem, **options)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_store(name, dtype):
    for dim, block_size in ((64, 16), (96, 8), (80, 16)):
        if not holds(name, (0, 0, dim)):
            continue
        key, value = problems.fused_store(3, dim, 70, dtype)
        key = key * torch.logspace(-6, 4, 70)[:, None, None].to(dtype)
        value[3] = 0
        slots = torch.randperm(16 * block_size)[:70].int()
        slots[::7] = -1
        got, want = (problems.empty_pages(name, 16, 3, block_size, dim) for _ in range(2))
        cpu_attention.store_kv(key, value, got, slots)
        reference.store_kv(key, value, want, slots)
        assert torch.equal(got.tiles, want.tiles)


@pytest.mark.parametrize("slots_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_store(dtype, slots_dtype):
    key, value = problems.fused_store(3, 80, 70, dtype)
    slots = torch.randperm(8 * 16)[:70].to(slots_dtype)
    slots[::7] = -1
    got, want = (torch.zeros(2, 8, 3, 16, 80, dtype=dtype) for _ in range(2))
    cpu_attention.store_kv(key, value, got, slots)
    reference.store_kv(key, value, want, slots)
    assert torch.equal(got, want)


def test_writes_into_out_and_reads_strided_queries():
    problem = problems.make(4, 2, 64, 16, [9, 40], [3, 5])
    want = problems.naive(problem)
    fused = torch.zeros(8, 8, 64)
    fused[:, :4] = problem.query
    problem.query = fused[:, :4]
    out = torch.full((10, 4, 64), 7.0)
    got = problems.run_prefill(cpu_attention.paged_prefill, problem, out=out)
    assert got is out and (out[8:] == 7.0).all()
    assert problems.error(out[:8], want) < 1e-5


def test_result_depends_neither_on_the_batch_nor_on_the_threads(monkeypatch):
    monkeypatch.setattr(cpu_attention, "WORK_PER_THREAD", 1)
    problem = problems.make(4, 2, 64, 16, [1100, 3, 700, 90])
    together = problems.run_decode(cpu_attention.paged_decode, problem)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for i in range(4):
            alone = cpu_attention.paged_decode(
                problem.query[i : i + 1],
                problem.pages,
                problem.tables[i : i + 1],
                problem.lens[i : i + 1],
                scale=problem.scale,
            )
            assert torch.equal(alone[0], together[i])
    finally:
        torch.set_num_threads(threads)


def test_concurrent_calls(monkeypatch):
    problem = problems.make(8, 2, 64, 16, [600, 30, 1200])
    want = problems.run_decode(cpu_attention.paged_decode, problem)
    results = []

    def work():
        answers = (problems.run_decode(cpu_attention.paged_decode, problem) for _ in range(5))
        results.extend(answers)

    monkeypatch.setattr(cpu_attention, "WORK_PER_THREAD", 1)
    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 15
    assert all(torch.equal(result, want) for result in results)


@st.composite
def random_problems(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    lens = draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))
    chunks = [draw(st.integers(1, n)) for n in lens]
    head_dim = draw(st.sampled_from([8, 16, 32, 48, 64, 80]))
    shape = (kv_heads * group, kv_heads, head_dim, draw(st.sampled_from([1, 4, 16, 24, 64])))
    problem = problems.make(*shape, lens, chunks, seed=draw(st.integers(0, 99)))
    return problem, {"window": draw(st.sampled_from([0, 1, 7, 64]))}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(random_problems())
def test_random_shapes(case):
    problem, options = case
    got = problems.run_prefill(cpu_attention.paged_prefill, problem, **options)
    want = problems.run_prefill(reference.paged_prefill, problem, **options)
    assert problems.error(got, want.double()) < 1e-5
