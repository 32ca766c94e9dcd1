"""RMSNorm and rotary embedding of few rows on a CPU, each one call of a compiled function.

At one row, a call of a torch operation costs more than its arithmetic, and torch's RMSNorm and our
rotation are several. Here a row is converted to float32, stays in the L1 cache, and is rounded
once, at the end. bfloat16 results of `rms_norm` and of `rotate` without a norm equal torch's but
for sums that round differently.

One thread does the work. torch spreads larger inputs over several, hence `LARGEST`.
"""

import ctypes
from functools import cache

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

LARGEST = 1 << 18  # numbers: 0.1 ms, hardly worth waking other threads
_IS_BFLOAT16 = {torch.float32: 0, torch.bfloat16: 1}
_helper = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Division of rows by their root mean square, times `weight`.

    Args:
        x: [rows, size], each row contiguous
        weight: float32 [size]
    """
    rows, size = x.shape
    out = torch.empty(rows, size, dtype=x.dtype)
    pointers = x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr()
    _functions()[0](_IS_BFLOAT16[x.dtype], *pointers, rows, size, eps)
    return out


def rotate(
    heads: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """Rotary embedding of every head, behind an RMSNorm of it if there is a `weight`.

    Args:
        heads: [tokens, heads, head_dim], the heads of a token contiguous
        cos, sin: float32 [tokens, 1, head_dim]; the sign of the pair is in `sin`
        weight: float32 [heads, head_dim]
    """
    tokens, count, dim = heads.shape
    out = torch.empty(tokens, count, dim, dtype=heads.dtype)
    pointers = heads.data_ptr(), heads.stride(0), cos.data_ptr(), sin.data_ptr()
    scales = (None, 0) if weight is None else (weight.data_ptr(), 1)
    _functions()[1](
        _IS_BFLOAT16[heads.dtype], *pointers, *scales, out.data_ptr(), tokens, count, dim, eps
    )
    return out


@_helper
def _load(bfloat16, pointer, start, row):
    """row = numbers `start`, `start` + 1, .. of a tensor, as float32."""
    end = start + len(row)
    if bfloat16:
        source, bits = carray(pointer, end, np.uint16)[start:], row.view(np.uint32)
        for i in range(len(row)):
            bits[i] = np.uint32(source[i]) << np.uint32(16)
    else:
        source = carray(pointer, end, np.float32)[start:]
        for i in range(len(row)):
            row[i] = source[i]


@_helper
def _store(bfloat16, pointer, start, row):
    """Writes a row to numbers `start`, .. of a tensor, rounded to nearest even."""
    end = start + len(row)
    if bfloat16:
        target, bits = carray(pointer, end, np.uint16)[start:], row.view(np.uint32)
        for i in range(len(row)):
            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
            rounded = (bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            target[i] = rounded if row[i] == row[i] else np.uint32(0x7FC0)
    else:
        target = carray(pointer, end, np.float32)[start:]
        for i in range(len(row)):
            target[i] = row[i]


@_helper
def _normalize(row, scale, eps):
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i] * row[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(len(row)) + np.float32(eps))
    for i in range(len(row)):
        row[i] *= factor * scale[i]


@_helper
def _turn(turned, row, cos, sin):
    half = len(row) // 2
    left, right = row[:half], row[half:]
    first, second = turned[:half], turned[half:]
    for i in range(half):
        first[i] = left[i] * cos[i] + right[i] * sin[i]
    cos, sin = cos[half:], sin[half:]
    for i in range(half):
        second[i] = right[i] * cos[i] + left[i] * sin[i]


def _rms_norm(bfloat16, x, stride, weight, out, rows, size, eps):
    row, scale = np.empty(size, np.float32), carray(weight, size, np.float32)
    for r in range(rows):
        _load(bfloat16, x, r * stride, row)
        _normalize(row, scale, eps)
        _store(bfloat16, out, r * size, row)


def _rotate(bfloat16, heads, stride, cos, sin, weight, normed, out, tokens, count, dim, eps):
    row, turned = np.empty(dim, np.float32), np.empty(dim, np.float32)
    cosines = carray(cos, (tokens, dim), np.float32)
    sines = carray(sin, (tokens, dim), np.float32)
    scales = carray(weight, (count, dim), np.float32)
    for t in range(tokens):
        for h in range(count):
            _load(bfloat16, heads, t * stride + h * dim, row)
            if normed:
                _normalize(row, scales[h], eps)
            _turn(turned, row, cosines[t], sines[t])
            _store(bfloat16, out, (t * count + h) * dim, turned)


@cache
def _functions():
    """(rms_norm, rotate), compiled or loaded from Numba's cache on disk.

    As ctypes functions they keep the interpreter lock, being so short.
    """
    options = {"cache": True, "error_model": "numpy", "nopython": True}
    p, i, f = types.voidptr, types.int64, types.float64
    kinds = {p: ctypes.c_void_p, i: ctypes.c_int64, f: ctypes.c_double}

    def compiled(function, *arguments):
        made = cfunc(types.void(*arguments), **options)(function)
        callee = ctypes.PYFUNCTYPE(None, *(kinds[kind] for kind in arguments))(made.address)
        callee.owner = made  # of the machine code
        return callee

    return (
        compiled(_rms_norm, i, p, i, p, p, i, i, f),
        compiled(_rotate, i, p, i, p, p, p, i, p, i, i, i, f),
    )
