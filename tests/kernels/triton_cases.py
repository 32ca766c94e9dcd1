"""The Triton kernels against the oracle: run by `test_triton.py`, in a process of its own.

On a CPU that process has TRITON_INTERPRET=1 in its environment from the start; on a CUDA device
the same cases run compiled. The interpreter is slow, so each case covers several things at once.
"""

import os
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from kernels import (
    copy_blocks,
    fused_layers,
    int8,
    int8_linear,
    paged_decode,
    paged_prefill,
    reference,
    store_kv,
)
from kernels.decode_choices import Choice, SplitPlan
from kernels.dispatch import backend, warm_up
from kernels.pages import FORMATS, Codes, Pages, decode, tile_bytes
from tests.kernels import problems

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF, FULL = torch.float16, torch.float32
DTYPES = (HALF, FULL) if INTERPRETED else (HALF, FULL, torch.bfloat16)
LENS = [1, 15, 0, 16, 17, 333]
ALL = 1 << 20  # splits wanted: every sequence gets as many as it may
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
    options = {**options, "splits": SplitPlan(splits, wanted=ALL, least=1)}
    got = problems.run_decode(paged_decode.paged_decode, problem.to(DEVICE), **options)
    assert problems.error(got, want) < TOLERANCE[dtype]
    assert not got[2].any()


@pytest.mark.parametrize("case", with_dtypes(PREFILL), ids=str)
def test_prefill(case):
    heads, kv_heads, dim, block, chunks, options, dtype = case
    problem = problems.make(heads, kv_heads, dim, block, LENS, chunks, dtype)
    got = problems.run_prefill(paged_prefill.paged_prefill, problem.to(DEVICE), **options)
    assert problems.error(got, problems.naive(problem, **options)) < TOLERANCE[dtype]


def formats_of(cases):
    """Every case in every format on a device; interpreted, the formats take turns."""
    pairs = [(case, FORMATS[i % 3]) for i, case in enumerate(cases)]
    if not INTERPRETED:
        pairs = [(case, name) for case in cases for name in FORMATS]
    return [(case, name) for case, name in pairs if name != "int4" or case[2] % 32 == 0]


@pytest.mark.parametrize("dtype", (FULL, HALF))
@pytest.mark.parametrize(("case", "name"), formats_of(DECODE), ids=str)
def test_quantized_decode(case, name, dtype):
    heads, kv_heads, dim, block, splits, options = case
    problem = problems.make(heads, kv_heads, dim, block, LENS, dtype=dtype)
    problem = problems.quantized(problem, name)
    want = problems.naive(problem, **options)
    options = {**options, "splits": SplitPlan(splits, wanted=ALL, least=1)}
    got = problems.run_decode(paged_decode.paged_decode, problem.to(DEVICE), **options)
    assert problems.error(got, want) < TOLERANCE[dtype]
    assert not got[2].any()


@pytest.mark.parametrize(("case", "name"), formats_of(PREFILL), ids=str)
def test_quantized_prefill(case, name):
    heads, kv_heads, dim, block, chunks, options = case
    problem = problems.make(heads, kv_heads, dim, block, LENS, chunks)
    problem = problems.quantized(problem, name)
    got = problems.run_prefill(paged_prefill.paged_prefill, problem.to(DEVICE), **options)
    assert problems.error(got, problems.naive(problem, **options)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_store(name, dtype):
    for dim, block in ((64, 16), (96, 8), (80, 16)):
        if name == "int4" and dim % 32:
            continue
        key, value = problems.fused_store(3, dim, 20, dtype)
        key = key * torch.logspace(-6, 4, 20)[:, None, None].to(dtype)
        value[3] = 0
        slots = torch.randperm(8 * block)[:20].int()
        slots[::7] = -1
        got, want = (problems.empty_pages(name, 8, 3, block, dim) for _ in range(2))
        reference.store_kv(key, value, want, slots)
        got = replace(got, tiles=got.tiles.to(DEVICE))
        store_kv.store_kv(key.to(DEVICE), value.to(DEVICE), got, slots.to(DEVICE))
        assert torch.equal(got.tiles.cpu(), want.tiles)


@pytest.mark.parametrize("name", FORMATS)
def test_copied_blocks_take_their_scales_along(name):
    tiles = torch.randint(0, 255, (3, 2, 6, 2, tile_bytes(name, 8, 64)), dtype=torch.uint8)
    source, target = torch.tensor([4, 1]), torch.tensor([0, 5])
    want, got = tiles.clone(), tiles.clone().to(DEVICE)
    reference.copy_blocks(want, source, target)
    copy_blocks.copy_blocks(got, source.to(DEVICE), target.to(DEVICE))
    assert torch.equal(got.cpu(), want) and not torch.equal(want, tiles)


@pytest.mark.parametrize("blocks", (1, 6))
def test_blocks_move_out_of_the_pool_and_back(blocks):
    """A block's piece is odd and larger than what one program of the kernel moves."""
    pool = torch.arange(3 * 2 * blocks * 3 * 701).view(3, 2, blocks, 3, 701)
    ids = torch.randperm(blocks)[:4]
    want, got = (torch.zeros(5, 3, 2, 3, 701, dtype=pool.dtype) for _ in range(2))
    got = got.to(DEVICE)
    reference.gather_blocks(pool, ids, want)
    copy_blocks.gather_blocks(pool.to(DEVICE), ids.to(DEVICE), got)
    assert torch.equal(got.cpu(), want)
    assert torch.equal(want[0], pool[:, :, ids[0]]) and not want[len(ids) :].any()
    back = torch.zeros_like(pool).to(DEVICE)
    copy_blocks.scatter_blocks(got, back, ids.to(DEVICE))
    reference.scatter_blocks(want, empty := torch.zeros_like(pool), ids)
    assert torch.equal(back.cpu(), empty)
    assert torch.equal(empty[:, :, ids], pool[:, :, ids]) and len(empty.unique()) > 1


@triton.jit
def show_splits(lens, shown, seqs, bound, wanted, least, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """shown [seqs, 2]: tiles that a sequence sees, and tiles per split."""
    for seq in range(seqs):
        first, end = paged_decode.tile_range(tl.load(lens + seq), TILE, WINDOW)
        tiles = end - first
        size = paged_decode.tiles_per_split(lens, tiles, seqs, bound, wanted, least, TILE, WINDOW)
        tl.store(shown + 2 * seq, tiles)
        tl.store(shown + 2 * seq + 1, size)


# lens, (bound, wanted, least), window -> splits of each sequence
SPLITS = [
    ([1280], (33, 16, 1), 0, [16]),  # 80 tiles of 16
    ([1280], (5, 16, 1), 0, [5]),
    ([1280], (33, 16, 8), 0, [10]),
    ([1280], (33, 1000, 1), 161, [11]),  # the window's 11 tiles
    ([1280, 16, 0, 16], (33, 16, 1), 0, [14, 1, 0, 1]),  # the long one gets nearly all
    ([1280] * 4, (33, 16, 1), 0, [4] * 4),
]


@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_the_device_splits_by_the_lengths_of_the_batch(case):
    lengths, plan, window, want = case
    lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    shown = torch.zeros(len(lengths), 2, dtype=torch.int32, device=DEVICE)
    show_splits[(1,)](lens, shown, len(lengths), *plan, TILE=16, WINDOW=window)
    tiles, size = shown.cpu().unbind(1)
    assert (-(-tiles // size)).tolist() == want


@pytest.mark.parametrize("window", [0, 50])
def test_one_launch_serves_any_lengths(window):
    """Bounds come from the width of the tables: here three sequences share what one could use."""
    problem = problems.make(4, 2, 64, 16, [600, 0, 40])
    want = problems.naive(problem, window=window)
    options = {"choice": Choice(16, 4, 2, 2), "splits": SplitPlan(9, wanted=9, least=2)}
    device = problem.to(DEVICE)
    got = problems.run_decode(paged_decode.paged_decode, device, window=window, **options)
    assert problems.error(got, want) < 1e-5 and not got[1].any()


def test_bounds_are_chosen_from_shapes():
    problem = problems.make(2, 1, 64, 16, [40, 3000])
    got = problems.run_decode(paged_decode.paged_decode, problem.to(DEVICE))
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


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 200), (2, 1031)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(rows, size, dtype):
    x, residual = torch.randn(2, rows, size).to(dtype)
    weight = torch.rand(size)
    sums = residual.clone()
    want = reference.add_rms_norm(x, sums, weight, 1e-5)
    residual = residual.to(DEVICE)
    got = fused_layers.add_rms_norm(x.to(DEVICE), residual, weight.to(DEVICE), 1e-5)
    assert torch.equal(residual.cpu(), sums)
    assert problems.error(got, want.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", reference.GATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(dtype, activation):
    gate_up = 4 * torch.randn(3, 2 * 1100)
    gate_up[0, :2] = torch.tensor([-200.0, 200.0])
    gate_up = gate_up.to(dtype)
    got = fused_layers.gated(gate_up.to(DEVICE), activation)
    want = reference.gated(gate_up, activation)
    assert problems.error(got, want.double()) < TOLERANCE[dtype]


# heads, kv_heads, head_dim, block_size, normalized, rotated, format
TURNS = [
    (1, 1, 64, 16, False, True, "plain"),
    (6, 2, 80, 16, True, True, "plain"),
    (14, 2, 96, 8, True, True, "int4"),
    (4, 4, 128, 16, False, False, "plain"),
    (4, 2, 64, 16, True, False, "fp8_e4m3"),
    (3, 1, 80, 16, True, True, "int8"),
]


@pytest.mark.parametrize("case", with_dtypes(TURNS), ids=str)
def test_turn_and_store(case):
    heads, kv_heads, dim, block, normed, rotated, name, dtype = case
    tokens = 5
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype)
    slots = torch.randperm(4 * block)[:tokens]
    slots[3] = -1
    angles = torch.rand(tokens, 1, dim // 2) * 6
    cos, sin = angles.cos(), angles.sin()
    rotation = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)) if rotated else None
    weight = torch.rand(heads + kv_heads, dim) if normed else None
    if name == "plain":
        want_pages = torch.full((2, 4, kv_heads, block, dim), 7.0, dtype=dtype)
        got_pages = want_pages.clone().to(DEVICE)
    else:
        want_pages = problems.empty_pages(name, 4, kv_heads, block, dim)
        got_pages = replace(want_pages, tiles=want_pages.tiles.clone().to(DEVICE))
    want = reference.turn_and_store(qkv, rotation, weight, 1e-6, want_pages, slots)
    got = fused_layers.turn_and_store(
        qkv.to(DEVICE),
        rotation and tuple(half.to(DEVICE) for half in rotation),
        None if weight is None else weight.to(DEVICE),
        1e-6,
        got_pages,
        slots.to(DEVICE),
    )
    assert problems.error(got, want.double()) < TOLERANCE[dtype]
    assert cached_error(got_pages, want_pages) < TOLERANCE[dtype] * (1 if name == "plain" else 20)


def cached_error(got: Pages, want: Pages) -> float:
    """A code may differ by one where its number lies between two; what nobody stored stays."""
    if isinstance(got, torch.Tensor):
        return problems.error(got, want.double())
    numbers = [
        decode(Codes(*(part if part is None else part.cpu() for part in pages.parts)), want.format)
        for pages in (got, want)
    ]
    assert torch.equal(*(n.isnan() for n in numbers))
    return problems.error(*(n.nan_to_num(nan=1.0).double() for n in numbers))


def test_warm_up_and_dispatch_by_name():
    chosen = backend(DEVICE, "triton")
    assert chosen.name == "triton" and chosen.paged_decode is paged_decode.paged_decode
    for kv_format in (None, "int8"):
        warm_up(
            chosen,
            device=DEVICE,
            dtype=FULL,
            heads=4,
            kv_heads=2,
            head_dim=32,
            block_size=16,
            kv_format=kv_format,
        )


# rows, outputs, inputs, whether there is a bias
INT8 = [
    (1, 7, 33, False),
    (5, 100, 600, True),
    (16, 64, 256, False),
    (17, 33, 130, True),
    (int8_linear.MOST_ROWS, 48, 64, False),
    (int8_linear.MOST_ROWS + 1, 20, 40, True),
]


@pytest.mark.parametrize("case", with_dtypes(INT8), ids=str)
def test_int8_matrix(case):
    rows, outputs, inputs, biased, dtype = case
    rng = torch.Generator().manual_seed(rows)
    codes, scales = int8.quantize(torch.randn(outputs, inputs, generator=rng))
    bias = torch.randn(outputs, generator=rng).to(dtype) if biased else None
    x = torch.randn(rows, 2 * inputs, generator=rng).to(dtype)[:, :inputs]
    want = x.double() @ int8.dequantize(codes, scales).double().t()
    if bias is not None:
        want += bias.double()
    on_device = [None if part is None else part.to(DEVICE) for part in (codes, scales, bias)]
    linear = int8_linear.Int8Linear(*on_device)
    got = linear(x.to(DEVICE))
    assert got.dtype == dtype and got.shape == (rows, outputs)
    assert (got.cpu().double() - want).norm() / want.norm() < TOLERANCE[dtype]
