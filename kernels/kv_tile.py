"""Triton: one tile of cached keys or values. The only place where cache formats differ.

A tile is any run of token positions of one sequence and one K/V head; it may span many small
blocks or lie inside a large one. The attention kernels see numbers in their compute dtype and
never learn how a page encodes them (`kernels.pages` defines that); what they multiply is either
the number or, in formats with a scale per token, a code whose scale `fold_scales` puts into the
scores or the softmax weights, which are far fewer.

    keys = pages[0], values = pages[1]:  [num_blocks, kv_heads, block_size, head_dim]
                                         |---------------- rows --------------|
    row = (block * kv_heads + head) * block_size + offset

Codes are taken apart and put together by integer arithmetic: fp8 types need sm_89, and Triton's
interpreter rounds them wrongly.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(32)  # numbers of int4 that share a scale and a zero point
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to even


@triton.jit
def tile_rows(table, tokens, seen, head, kv_heads, BLOCK_SIZE: tl.constexpr):
    """Row index in the pages of each token position of one sequence: [tile] int64."""
    block = tl.load(table + tokens // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
    return (block * kv_heads + head) * BLOCK_SIZE + tokens % BLOCK_SIZE


@triton.jit
def _numbers_at(rows, FORMAT: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr):
    """Where the numbers of each row start, in elements of the pages."""
    if FORMAT == "plain":
        return rows * DIM
    elif FORMAT == "int4":
        return rows * (DIM // 2) + rows // BLOCK_SIZE * (BLOCK_SIZE * (DIM // GROUP * 3))
    else:
        return rows * DIM + rows // BLOCK_SIZE * (BLOCK_SIZE * 2)


@triton.jit
def _scales_at(rows, FORMAT: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr):
    """Where the scales of each row start, in units of 2 bytes."""
    if FORMAT == "int4":
        GROUPS: tl.constexpr = DIM // GROUP
        tile = rows // BLOCK_SIZE * (BLOCK_SIZE * (DIM // 2 + GROUPS * 3) // 2)
        return tile + BLOCK_SIZE * DIM // 4 + rows % BLOCK_SIZE * GROUPS
    else:
        tile = rows // BLOCK_SIZE * (BLOCK_SIZE * (DIM + 2) // 2)
        return tile + BLOCK_SIZE * DIM // 2 + rows % BLOCK_SIZE


@triton.jit
def _zeros_at(rows, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr):
    """Where the zero points of each int4 row start, in bytes."""
    GROUPS: tl.constexpr = DIM // GROUP
    tile = rows // BLOCK_SIZE * (BLOCK_SIZE * (DIM // 2 + GROUPS * 3))
    return tile + BLOCK_SIZE * (DIM // 2 + GROUPS * 2) + rows % BLOCK_SIZE * GROUPS


@triton.jit
def _load_scales(pages, at, mask):
    """bfloat16 numbers, `at` in units of 2 bytes, as float32; 0 where masked."""
    bits = tl.load(pages.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0)
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _decode(raw, FORMAT: tl.constexpr):
    """Codes of 8 bits as numbers; those of fp8 come out divided by 256."""
    if FORMAT == "int8":
        return raw.to(tl.int8, bitcast=True)
    elif FORMAT == "fp8_e4m3":
        wide = raw.to(tl.int8, bitcast=True).to(tl.int16)
        return ((wide << 7) & -16385).to(tl.float16, bitcast=True)  # without bit 14
    else:
        return raw


@triton.jit
def _load_groups(
    pages,
    rows,
    seen,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """int4 rows: [tile, DIM_PAD]."""
    GROUPS: tl.constexpr = DIM_PAD // GROUP
    groups, bytes = tl.arange(0, GROUPS), tl.arange(0, GROUP // 2)
    mask = seen[:, None] & (groups < DIM // GROUP)[None, :]
    at = _scales_at(rows, "int4", BLOCK_SIZE, DIM)[:, None] + groups[None, :]
    scales = _load_scales(pages, at, mask)
    at = _zeros_at(rows, BLOCK_SIZE, DIM)[:, None] + groups[None, :]
    zeros = tl.load(pages + at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    at = _numbers_at(rows, "int4", BLOCK_SIZE, DIM)[:, None] + groups[None, :] * (GROUP // 2)
    places = pages + at[:, :, None] + bytes[None, None, :]
    packed = tl.load(places, mask=mask[:, :, None], other=0, eviction_policy=EVICTION)
    low = ((packed & 15).to(tl.float32) - zeros[:, :, None]) * scales[:, :, None]
    high = ((packed >> 4).to(tl.float32) - zeros[:, :, None]) * scales[:, :, None]
    numbers = tl.permute(tl.join(low.to(DTYPE), high.to(DTYPE)), (0, 1, 3, 2))
    return tl.reshape(numbers, (rows.shape[0], DIM_PAD))


@triton.jit
def load_keys(
    keys,
    rows,
    seen,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
    EVICTION: tl.constexpr = "",
):
    """The tile's keys, transposed for the score product: [DIM_PAD, tile], zeros where unseen."""
    if FORMAT == "int4":
        rows_first = _load_groups(keys, rows, seen, BLOCK_SIZE, DIM, DIM_PAD, DTYPE, EVICTION)
        return tl.trans(rows_first)
    else:
        dims = tl.arange(0, DIM_PAD)
        if DIM == DIM_PAD:
            mask = seen[None, :]
        else:
            mask = seen[None, :] & (dims < DIM)[:, None]
        places = keys + _numbers_at(rows, FORMAT, BLOCK_SIZE, DIM)[None, :] + dims[:, None]
        raw = tl.load(places, mask=mask, other=0, eviction_policy=EVICTION)
        return _decode(raw, FORMAT).to(DTYPE)


@triton.jit
def load_values(
    values,
    rows,
    seen,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
    EVICTION: tl.constexpr = "",
):
    """The tile's values: [tile, DIM_PAD], zeros where unseen."""
    if FORMAT == "int4":
        return _load_groups(values, rows, seen, BLOCK_SIZE, DIM, DIM_PAD, DTYPE, EVICTION)
    else:
        dims = tl.arange(0, DIM_PAD)
        if DIM == DIM_PAD:
            mask = seen[:, None]
        else:
            mask = seen[:, None] & (dims < DIM)[None, :]
        places = values + _numbers_at(rows, FORMAT, BLOCK_SIZE, DIM)[:, None] + dims[None, :]
        raw = tl.load(places, mask=mask, other=0, eviction_policy=EVICTION)
        return _decode(raw, FORMAT).to(DTYPE)


@triton.jit
def fold_scales(
    factors,
    pages,
    rows,
    seen,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Factors of the scores, or softmax weights [.., tile], times the scale of each token.

    In formats without such scales, the factors as they are.
    """
    if FORMAT == "int8" or FORMAT == "fp8_e4m3":
        scales = _load_scales(pages, _scales_at(rows, FORMAT, BLOCK_SIZE, DIM), seen)
        if FORMAT == "fp8_e4m3":
            scales = scales * 256
        return factors * scales[None, :]
    else:
        return factors


@triton.jit
def store_rows(
    pages,
    rows,
    numbers,
    keep,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Encodes numbers [rows, DIM_PAD], zeros from DIM on, into the keys or values at `rows`."""
    if FORMAT == "int4":
        _store_groups(pages, rows, numbers.to(tl.float32), keep, BLOCK_SIZE, DIM, DIM_PAD)
    else:
        dims = tl.arange(0, DIM_PAD)
        place = pages + _numbers_at(rows, FORMAT, BLOCK_SIZE, DIM)[:, None] + dims[None, :]
        mask = keep[:, None] & (dims < DIM)[None, :]
        if FORMAT == "plain":
            tl.store(place, numbers.to(pages.dtype.element_ty), mask=mask)
        else:
            largest: tl.constexpr = 127.0 if FORMAT == "int8" else 448.0
            numbers = numbers.to(tl.float32)
            scales = tl.div_rn(tl.max(tl.abs(numbers), axis=1), largest)
            at = _scales_at(rows, FORMAT, BLOCK_SIZE, DIM)
            divisors = _store_scales(pages, at, scales, keep)
            ratio = tl.div_rn(numbers, divisors[:, None])
            ratio = tl.minimum(tl.maximum(ratio, -largest), largest)
            if FORMAT == "int8":
                codes = _round(ratio).to(tl.int8).to(tl.uint8, bitcast=True)
            else:
                codes = _encode_fp8(ratio)
            tl.store(place, codes, mask=mask)


@triton.jit
def _store_groups(
    pages,
    rows,
    numbers,
    keep,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """int4 rows: numbers float32 [rows, DIM_PAD]."""
    GROUPS: tl.constexpr = DIM_PAD // GROUP
    COUNT: tl.constexpr = numbers.shape[0]
    groups, bytes = tl.arange(0, GROUPS), tl.arange(0, GROUP // 2)
    mask = keep[:, None] & (groups < DIM // GROUP)[None, :]
    numbers = tl.reshape(numbers, (COUNT, GROUPS, GROUP))
    low, high = tl.min(numbers, axis=2), tl.max(numbers, axis=2)
    scales = tl.maximum(tl.div_rn(high - low, 15.0), tl.div_rn(tl.abs(low), 127.0))
    at = _scales_at(rows, "int4", BLOCK_SIZE, DIM)[:, None] + groups[None, :]
    divisors = _store_scales(pages, at, scales, mask)
    zeros = _round(tl.div_rn(-low, divisors))
    zeros = tl.minimum(tl.maximum(zeros, -127.0), 127.0)
    at = _zeros_at(rows, BLOCK_SIZE, DIM)[:, None] + groups[None, :]
    tl.store(pages + at, zeros.to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)
    codes = _round(tl.div_rn(numbers, divisors[:, :, None])) + zeros[:, :, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), 15.0).to(tl.uint8)
    halves = tl.reshape(codes, (COUNT, GROUPS, 2, GROUP // 2))
    left, right = tl.split(tl.permute(halves, (0, 1, 3, 2)))
    at = _numbers_at(rows, "int4", BLOCK_SIZE, DIM)[:, None] + groups[None, :] * (GROUP // 2)
    place = pages + at[:, :, None] + bytes[None, None, :]
    tl.store(place, left | (right << 4), mask=mask[:, :, None])


@triton.jit
def _store_scales(pages, at, scales, mask):
    """Rounds scales to bfloat16 and stores them, `at` in units of 2 bytes.

    Returns what was stored as float32, or 1 for 0, to divide by.
    """
    bits = scales.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    tl.store(pages.to(tl.pointer_type(tl.uint16)) + at, bits.to(tl.uint16), mask=mask)
    stored = (bits << 16).to(tl.float32, bitcast=True)
    return tl.where(stored > 0, stored, 1.0)


@triton.jit
def _round(numbers):
    return (numbers + ROUNDER) - ROUNDER


@triton.jit
def _encode_fp8(numbers):
    """e4m3 of float32 numbers up to 448: the mantissa is rounded to 3 bits, or below 2**-6, where
    the steps are 2**-9 throughout, by the addition of a number whose last bit that is."""
    bits = numbers.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    size = tl.abs(numbers)
    small = (size + 16384.0).to(tl.uint32, bitcast=True) - ((127 + 14) << 23)
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)
