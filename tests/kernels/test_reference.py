"""The oracle itself, against attention in float64 that knows nothing of pages."""

import pytest
import torch

from kernels import reference
from kernels.pages import FORMATS
from tests.kernels import problems

SHAPES = [(1, 1, 64, 16), (8, 8, 80, 16), (8, 2, 128, 64), (14, 2, 96, 16), (4, 2, 24, 5)]
OPTIONS = [{}, {"window": 20}, {"softcap": 5.0}, {"window": 1, "softcap": 30.0}]
LENS = [1, 15, 0, 16, 17, 70]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_decode(shape, options):
    problem = problems.make(*shape, LENS)
    got = problems.run_decode(reference.paged_decode, problem, **options)
    assert problems.error(got, problems.naive(problem, **options)) < 1e-5
    assert not got[2].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_prefill(shape, options):
    problem = problems.make(*shape, LENS, [1, 4, 0, 16, 3, 33])
    got = problems.run_prefill(reference.paged_prefill, problem, **options)
    assert problems.error(got, problems.naive(problem, **options)) < 1e-5


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] % 32 == 0])
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_pages(shape, name):
    for options in OPTIONS:
        problem = problems.quantized(problems.make(*shape, LENS), name)
        got = problems.run_decode(reference.paged_decode, problem, **options)
        assert problems.error(got, problems.naive(problem, **options)) < 1e-5
        problem = problems.quantized(problems.make(*shape, LENS, [1, 4, 0, 16, 3, 33]), name)
        got = problems.run_prefill(reference.paged_prefill, problem, **options)
        assert problems.error(got, problems.naive(problem, **options)) < 1e-5


def test_float64_stays_float64():
    problem = problems.make(4, 2, 32, 16, [40, 3], dtype=torch.float64)
    got = problems.run_decode(reference.paged_decode, problem)
    assert problems.error(got, problems.naive(problem)) < 1e-13


def test_rows_beyond_the_last_chunk_are_left_alone():
    problem = problems.make(4, 2, 32, 16, [9, 20], [3, 5])
    problem.query = torch.cat([problem.query, problem.query])
    out = torch.full_like(problem.query, 7.0)
    got = problems.run_prefill(reference.paged_prefill, problem, out=out)
    assert got is out
    assert (out[8:] == 7.0).all() and not (out[:8] == 7.0).any()


def test_store_writes_slots_and_skips_padding():
    key, value = problems.fused_store(2, 16, 4, torch.float32)
    pages = torch.zeros(2, 3, 2, 8, 16)
    reference.store_kv(key, value, pages, torch.tensor([17, -1, 0, 23]))
    for token, block, offset in ((0, 2, 1), (2, 0, 0), (3, 2, 7)):
        assert torch.equal(pages[0, block, :, offset], key[token])
        assert torch.equal(pages[1, block, :, offset], value[token])
    assert int((pages != 0).any(-1).sum()) == 2 * 2 * 3
