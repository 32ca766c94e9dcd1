"""Products of a few rows with a bfloat16 matrix that oneDNN has packed, for CPUs with AVX512-BF16.

At one to four rows a product only reads memory, and oneDNN does that slower than it could. Its
layout, which it calls AB16b64a2b, is read here as it lies, so the weights stay in memory once:

    panel of 64 outputs | inputs 0, 1 of output 0 | inputs 0, 1 of output 1 | .. | of output 63
                        | inputs 2, 3 of output 0 | ..

One instruction multiplies 16 such pairs of the matrix with a pair of `x` and adds both products to
16 sums. A task is one panel; it reads its part of the matrix once, in order, for all rows.
"""

import ctypes
from functools import cache

import numpy as np
import torch
from llvmlite import binding
from numba import carray, cfunc, from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from kernels import cpu_formats, cpu_simd, cpu_vectors
from kernels.cpu_formats import BFLOAT16, load, store
from kernels.cpu_simd import take
from kernels.cpu_team import WORKER, fingerprint, run
from kernels.cpu_vectors import (
    F32,
    I32,
    I64,
    LANES,
    call,
    cases,
    const,
    pointer,
    prefetch_line,
    splat,
    variables,
    vec,
)

MOST_ROWS = 4
PANEL = 64
"""Outputs that lie together."""

_PANEL_VECTORS = PANEL // LANES
_PAIR_BYTES = PANEL * 2 * 2  # a pair of inputs of every output in the panel
_AHEAD_BYTES = 4096
_BYTES_PER_THREAD = 256 << 10  # of the matrix, worth waking another thread: about 10 microseconds

_INTEGERS = ("address", "tasks", "rows", "pairs", "x", "x_stride", "panels", "bias")
JOB = np.dtype(
    [("next", np.int64), ("pad", np.int64, 7)]  # the counter has a cache line of its own
    + [(name, np.int64) for name in (*_INTEGERS, "out", "out_stride")]
)
_RECORD = from_dtype(JOB)


class PackedLinear:
    """`x @ weight.T + bias` for at most MOST_ROWS rows of bfloat16.

    Args:
        packed: the matrix [outputs, inputs] in oneDNN's layout; kept alive
        bias: bfloat16 [outputs]
    """

    def __init__(self, packed: Tensor, outputs: int, inputs: int, bias: Tensor | None):
        self._owners = packed, bias
        self._outputs = outputs
        self._job = np.zeros((), JOB)  # what is the same in every call
        self._job["tasks"], self._job["pairs"] = outputs // PANEL, inputs // 2
        self._job["panels"] = torch.ops.mkldnn.data_ptr(packed)
        self._job["bias"] = 0 if bias is None else bias.data_ptr()
        self._job["out_stride"] = outputs
        self._multiply = _worker()  # compiled now, not during a request
        self._shares = -(-2 * outputs * inputs // _BYTES_PER_THREAD)

    @staticmethod
    def reads(weight: Tensor, packed: Tensor) -> bool:
        """Whether `packed`, made of `weight` [outputs, inputs], lies as this class reads it and
        this CPU has the instruction. Looks at the first and the last panel only."""
        outputs, inputs = weight.shape
        if weight.dtype != torch.bfloat16 or outputs % PANEL or inputs % 32:
            return False
        if not _has_bfloat16() or torch.ops.mkldnn._nbytes(packed) != weight.nbytes:
            return False
        first = torch.ops.mkldnn.data_ptr(packed)
        panel = PANEL * inputs
        for start in (0, outputs - PANEL):
            cells = (ctypes.c_int16 * panel).from_address(first + 2 * start * inputs)
            lies = torch.frombuffer(cells, dtype=torch.int16).view(inputs // 2, PANEL, 2)
            rows = weight[start : start + PANEL].view(torch.int16)
            if not lies.permute(1, 0, 2).reshape(PANEL, inputs).equal(rows):
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs]"""
        rows = x.shape[0]
        if x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty(rows, self._outputs, dtype=torch.bfloat16)
        job = self._job.copy()
        job["address"] = job.ctypes.data
        job["rows"], job["x"], job["x_stride"] = rows, x.data_ptr(), x.stride(0)
        job["out"] = out.data_ptr()
        run(self._multiply, job, self._shares)
        return out


@cache
def _has_bfloat16() -> bool:
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and hasattr(torch.ops.mkldnn, "data_ptr")


@cache
def _worker():
    """The compiled C function, or the one from Numba's cache on disk."""
    primitives = fingerprint(cpu_vectors, cpu_formats, cpu_simd)

    @cfunc(types.void(types.CPointer(_RECORD)), cache=True, error_model="numpy", nopython=True)
    def multiply(pointer):
        len(primitives)  # makes it part of the key of the cache
        job = carray(pointer, 1)[0]
        panel_bytes = job.pairs * _PAIR_BYTES
        while True:
            task = take(job.address)
            if task >= job.tasks:
                break
            at = task * PANEL * 2
            panel = job.panels + task * panel_bytes
            bias = job.bias + at if job.bias else 0
            _multiply(job.rows, job.x, job.x_stride, panel, job.pairs, bias, job.out + at,
                      job.out_stride)  # fmt: skip

    return WORKER(multiply.address)


@intrinsic
def _multiply(typingctx, rows, x, x_stride, panel, pairs, bias, out, out_stride):
    """out[r, :64] = bfloat16(x[r] . panel[:, :64] + bias[:64]) for r < rows, without bias where
    its address is 0."""

    def codegen(context, builder, signature, args):
        rows, rest = args[0], args[1:]
        for (height,) in cases(builder, (rows, tuple(range(1, MOST_ROWS + 1)))):
            _multiply_rows(builder, height, *rest)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i), codegen


def _multiply_rows(builder, height, x, x_stride, panel, pairs, bias, out, out_stride):
    unroll = 2 if height == 1 else 1  # enough sums that none waits for the one before
    sums = variables(builder, [const(0.0)] * (unroll * height * _PANEL_VECTORS))
    row_starts = [builder.mul(x_stride, I64(2 * r)) for r in range(height)]
    with cgutils.for_range(builder, builder.sdiv(pairs, I64(unroll))) as loop:
        for u in range(unroll):
            pair = builder.add(builder.mul(loop.index, I64(unroll)), I64(u))
            place = builder.add(panel, builder.mul(pair, I64(_PAIR_BYTES)))
            weights = [
                builder.load(pointer(builder, place, I64(j * LANES), I32), align=64)
                for j in range(_PANEL_VECTORS)
            ]
            for j in range(_PANEL_VECTORS):
                prefetch_line(builder, builder.add(place, I64(_AHEAD_BYTES + 64 * j)))
            for r, start in enumerate(row_starts):
                at = builder.add(builder.add(x, start), builder.mul(pair, I64(4)))
                both = builder.load(builder.inttoptr(at, I32.as_pointer()), align=2)
                factor = splat(builder, both)
                for j, weight in enumerate(weights):
                    cell = sums[(u * height + r) * _PANEL_VECTORS + j]
                    value = _add_products(builder, builder.load(cell), factor, weight)
                    builder.store(value, cell)
    for r in range(height):
        row = builder.add(out, builder.mul(out_stride, I64(2 * r)))
        for j in range(_PANEL_VECTORS):
            parts = sums[r * _PANEL_VECTORS + j :: height * _PANEL_VECTORS]
            total = builder.load(parts[0])
            for part in parts[1:]:
                total = builder.fadd(total, builder.load(part))
            store(builder, _with_bias(builder, total, bias, j), row, I64(j * LANES), BFLOAT16)


def _with_bias(builder, total, bias, j):
    """`total` plus vector `j` of the bias, if there is one."""
    given = builder.icmp_unsigned("!=", bias, I64(0))
    (cell,) = variables(builder, [total])
    with builder.if_then(given):
        offset = load(builder, bias, I64(j * LANES), BFLOAT16)
        builder.store(builder.fadd(total, offset), cell)
    return builder.load(cell)


def _add_products(builder, total, left, right):
    """total[i] + left[2 i] * right[2 i] + left[2 i + 1] * right[2 i + 1], of bfloat16 pairs."""
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return call(builder, name, vec(F32), total, left, right)
