"""Products of some rows with a bfloat16 matrix that oneDNN has packed, for CPUs with AVX512-BF16.

At few rows a product only reads memory, and oneDNN does that slower than it could. Its layout,
which it calls AB16b64a2b, is read here as it lies, so the weights stay in memory once:

    panel of 64 outputs | inputs 0, 1 of output 0 | inputs 0, 1 of output 1 | .. | of output 63
                        | inputs 2, 3 of output 0 | ..

The last panel is filled up with zeros. One instruction multiplies 16 such pairs of the matrix with
a pair of `x` and adds both products to 16 sums. A task is one panel; it reads its part of the
matrix once, in order, for all rows.
"""

import ctypes
from functools import cache

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, types
from numba.extending import intrinsic
from torch import Tensor

from kernels import cpu_formats, cpu_pages, cpu_pairs, cpu_simd, cpu_vectors
from kernels.cpu_formats import BFLOAT16, load_row, store, store_row
from kernels.cpu_pages import address, helper, scratch
from kernels.cpu_pairs import MOST_HEIGHT, has_bfloat16, multiply_tile
from kernels.cpu_simd import copy_bytes, row_max, take
from kernels.cpu_team import WORKER, fingerprint, run
from kernels.cpu_vectors import (
    I64,
    LANES,
    cases,
    const,
    variables,
)

MOST_ROWS = 64
PANEL = 64
"""Outputs that lie together."""

_VECTORS = PANEL // LANES
PAIR_BYTES = PANEL * 2 * 2  # a pair of inputs of every output in the panel
_AHEAD_BYTES = 4096
_BYTES_PER_THREAD = 256 << 10  # of the matrix, worth waking another thread: about 10 microseconds

_INTEGERS = ("address", "tasks", "rows", "pairs", "outputs", "x", "x_stride", "panels", "bias")
# What is wanted has an address: out is bfloat16 and scores float32 [rows, outputs]; tops float32
# and places int64 [threads, rows] are the largest score that each thread saw, and its output.
_RESULTS = ("out", "scores", "tops", "places")
JOB = np.dtype(
    # The counters, of tasks and of threads that have tops, have a cache line of their own.
    [("next", np.int64), ("seats", np.int64), ("pad", np.int64, 6)]
    + [(name, np.int64) for name in (*_INTEGERS, *_RESULTS)]
)
_RECORD = from_dtype(JOB)


class PackedLinear:
    """`x @ weight.T + bias` for rows of bfloat16; as a layer, of at most MOST_ROWS.

    Args:
        packed: the matrix [outputs, inputs] in oneDNN's layout; kept alive
        bias: bfloat16 [outputs]

    Attributes:
        panels, scales, bias: addresses; a bias of 0 is none, and there are no scales
        in_panels: whether they are whole panels, as the compiled step takes them
    """

    def __init__(self, packed: Tensor, outputs: int, inputs: int, bias: Tensor | None):
        missing = -outputs % PANEL
        padded = None if bias is None else torch.nn.functional.pad(bias, (0, missing))
        self.in_panels = missing == 0
        self._owners = packed, padded
        self.outputs, self.inputs = outputs, inputs
        self.panels = int(torch.ops.mkldnn.data_ptr(packed))
        self.bias = 0 if padded is None else padded.data_ptr()
        self.scales = 0
        self._job = np.zeros((), JOB)  # what is the same in every call
        self._job["tasks"], self._job["pairs"] = -(-outputs // PANEL), inputs // 2
        self._job["panels"], self._job["bias"] = self.panels, self.bias
        self._job["outputs"] = outputs
        self._multiply = _worker()  # compiled now, not during a request
        self._shares = -(-2 * outputs * inputs // _BYTES_PER_THREAD)

    @staticmethod
    def reads(weight: Tensor, packed: Tensor) -> bool:
        """Whether `packed`, made of `weight` [outputs, inputs], lies as this class reads it and
        this CPU has the instruction. Looks at the first and the last panel only."""
        outputs, inputs = weight.shape
        if weight.dtype != torch.bfloat16 or inputs % 32:
            return False
        if not has_bfloat16() or not hasattr(torch.ops.mkldnn, "data_ptr"):
            return False
        panels = -(-outputs // PANEL)
        if torch.ops.mkldnn._nbytes(packed) != panels * PANEL * inputs * 2:
            return False
        first = torch.ops.mkldnn.data_ptr(packed)
        for start in (0, (panels - 1) * PANEL):
            cells = (ctypes.c_int16 * (PANEL * inputs)).from_address(first + 2 * start * inputs)
            lies = torch.frombuffer(cells, dtype=torch.int16).view(inputs // 2, PANEL, 2)
            rows = weight[start : start + PANEL].view(torch.int16)
            filled = torch.nn.functional.pad(rows, (0, 0, 0, PANEL - len(rows)))
            if not lies.permute(1, 0, 2).reshape(PANEL, inputs).equal(filled):
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> bfloat16 [rows, outputs]"""
        out = torch.empty(len(x), self.outputs, dtype=torch.bfloat16)
        self._run(x, out=out.data_ptr())
        return out

    def scores(self, x: Tensor) -> Tensor:
        """The same in float32, which nothing has rounded."""
        out = torch.empty(len(x), self.outputs)
        self._run(x, scores=out.data_ptr())
        return out

    def best(self, x: Tensor) -> Tensor:
        """The output of the largest score, the first of equal ones, without writing them all:
        [rows, inputs] -> int64 [rows]"""
        threads = torch.get_num_threads()
        tops = np.full((threads, len(x)), -np.inf, np.float32)
        places = np.full((threads, len(x)), self.outputs - 1)
        self._run(x, tops=tops.ctypes.data, places=places.ctypes.data)
        first = np.where(tops == tops.max(0), places, self.outputs - 1).min(0)
        return torch.from_numpy(first)

    def _run(self, x: Tensor, **results: int) -> None:
        if x.stride(1) != 1:
            x = x.contiguous()
        job = self._job.copy()
        job["address"] = job.ctypes.data
        job["rows"], job["x"], job["x_stride"] = len(x), x.data_ptr(), x.stride(0)
        for name, place in results.items():
            job[name] = place
        run(self._multiply, job, self._shares)


@cache
def _worker():
    """The compiled C function, or the one from Numba's cache on disk."""
    primitives = fingerprint(cpu_vectors, cpu_formats, cpu_simd, cpu_pairs, cpu_pages)

    @cfunc(types.void(types.CPointer(_RECORD)), cache=True, error_model="numpy", nopython=True)
    def multiply(pointer):
        len(primitives)  # makes it part of the key of the cache
        _multiply(carray(pointer, 1)[0])

    return WORKER(multiply.address)


@helper
def _multiply(job):
    sums, outputs = scratch(min(job.rows, MOST_ROWS) * PANEL), job.outputs
    tops, places = np.full(job.rows, -np.inf, np.float32), np.zeros(job.rows, np.int64)
    while True:
        task = take(job.address)
        if task >= job.tasks:
            break
        panel, count = panel_at(job.panels, task, job.pairs), min(PANEL, outputs - task * PANEL)
        for first in range(0, job.rows, MOST_ROWS):
            rows, x = min(MOST_ROWS, job.rows - first), job.x + first * job.x_stride * 2
            multiply_panel(rows, x, job.x_stride, panel, job.pairs, sums)
            add_bias(sums, rows, job.bias, task)
            for r in range(rows):
                row, source = first + r, address(sums, r * PANEL)
                if job.out:
                    out = job.out + (row * outputs + task * PANEL) * 2
                    store_row(BFLOAT16, source, out, count, np.float32(1))
                if job.scores:
                    copy_bytes(job.scores + (row * outputs + task * PANEL) * 4, source, count * 4)
                if job.tops and row_max(source, PANEL // LANES) > tops[row]:
                    for i in range(count):
                        if sums[r * PANEL + i] > tops[row]:
                            tops[row], places[row] = sums[r * PANEL + i], task * PANEL + i
    if job.tops:
        seat = take(job.address + 8)
        copy_bytes(job.tops + seat * job.rows * 4, tops.ctypes.data, job.rows * 4)
        copy_bytes(job.places + seat * job.rows * 8, places.ctypes.data, job.rows * 8)
        tops[0], places[0] = 0, 0  # Numba frees an array after the last use of its name


@helper
def panel_at(panels, index, pairs):
    """Address of panel `index` of a matrix."""
    return panels + index * pairs * PAIR_BYTES


@helper
def add_bias(sums, rows, bias, panel):
    """Adds the bias of a panel's outputs to sums [rows, 64]; an address of 0 is no bias."""
    if bias:
        offsets = np.empty(PANEL, np.float32)
        load_row(BFLOAT16, bias + panel * PANEL * 2, address(offsets, 0), PANEL, np.float32(1))
        for r in range(rows):
            for i in range(PANEL):
                sums[r * PANEL + i] += offsets[i]


@helper
def multiply_panel(rows, x, x_stride, panel, pairs, sums):
    """sums[r, i] = x[r] . panel[:, i] for r < rows and i < 64.

    x is bfloat16 [rows, 2 * pairs] of row stride x_stride, in elements; sums are float32
    [rows, 64]. The panel comes from memory for the first tile of rows, then from a cache.
    """
    tiles = (rows + MOST_HEIGHT - 1) // MOST_HEIGHT
    height = (rows + tiles - 1) // tiles
    for r in range(0, rows, height):
        count = min(height, rows - r)
        _multiply_tile(
            count, x + 2 * r * x_stride, x_stride, panel, pairs, address(sums, r * PANEL)
        )


@intrinsic
def _multiply_tile(typingctx, rows, x, x_stride, panel, pairs, sums):

    def codegen(context, builder, signature, args):
        rows, rest = args[0], args[1:]
        for (height,) in cases(builder, (rows, tuple(range(1, MOST_HEIGHT + 1)))):
            _multiply_rows(builder, height, *rest)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i), codegen


def _multiply_rows(builder, height, x, x_stride, panel, pairs, sums):
    cells = variables(builder, [const(0.0)] * (height * _VECTORS))
    row, pair = builder.mul(x_stride, I64(2)), I64(4)
    b, b_pair = panel, I64(PAIR_BYTES)
    multiply_tile(builder, height, _VECTORS, x, row, pair, b, b_pair, pairs, cells, _AHEAD_BYTES)
    for index, cell in enumerate(cells):
        store(builder, builder.load(cell), sums, I64(index * LANES))
