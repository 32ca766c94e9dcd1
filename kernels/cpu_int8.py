"""Products of bfloat16 rows with an int8 matrix (`kernels.int8`), for CPUs with AVX512-BF16.

At few rows a product only reads the matrix, here half as many bytes as in bfloat16. It lies in
panels of 64 outputs as in `kernels.cpu_linear`, pairs of inputs together:

    inputs 0, 1 of 64 outputs: 128 bytes | inputs 2, 3 | ..

A byte is a sign and 7 bits. All 128 sizes are exact in bfloat16, so two tables give the upper and
the lower byte of the bfloat16 number, 64 at a time, and zipping both gives two vectors as the
product wants them. The bytes lie in the order that this zip within quarters of a vector undoes.
Few rows multiply while they convert; for many, parts of a panel are converted first, into a cache.
"""

from functools import cache

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, cfunc, from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from kernels import cpu_formats, cpu_linear, cpu_pages, cpu_pairs, cpu_simd, cpu_vectors
from kernels.cpu_formats import BFLOAT16, store, store_row
from kernels.cpu_linear import PAIR_BYTES, PANEL, add_bias
from kernels.cpu_pages import address, helper, scratch
from kernels.cpu_pairs import MOST_HEIGHT, add_products, has_bfloat16, multiply_pairs
from kernels.cpu_simd import float_pointer, take
from kernels.cpu_team import WORKER, fingerprint, run
from kernels.cpu_vectors import (
    I8,
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

DIRECT_ROWS = 4
"""Rows that multiply while they convert: their sums, the tables and a panel fit into registers."""
ROW_BLOCK = 256
"""Rows whose sums are kept at once."""
WIDE_PAIRS = 64
"""Pairs of inputs that are converted at once: 16 KiB of bfloat16, which the first cache holds."""

_VECTORS = PANEL // LANES
_BYTES = 64  # of a vector
_PAIR_BYTES = PANEL * 2
_AHEAD_BYTES = 4096
_BYTES_PER_THREAD = 256 << 10

_INTEGERS = ("address", "tasks", "rows", "pairs", "x", "x_stride", "panels", "scales", "bias")
JOB = np.dtype(
    [("next", np.int64), ("pad", np.int64, 7)]  # the counter has a cache line of its own
    + [(name, np.int64) for name in (*_INTEGERS, "outputs", "out")]
)
_RECORD = from_dtype(JOB)


def serves(codes: Tensor) -> bool:
    """Whether this CPU has the instructions, and the matrix whole pairs of inputs."""
    return codes.shape[1] % 2 == 0 and _has_instructions()


@cache
def _has_instructions() -> bool:
    features = binding.get_host_cpu_features()
    return has_bfloat16() and all(features.get(name) for name in ("avx512vbmi", "avx512bw"))


class Int8Linear:
    """`x @ weight.T + bias` in bfloat16, for any number of rows.

    Args:
        codes, scales: `kernels.int8`; the codes are copied
        bias: bfloat16 [outputs]

    Attributes:
        panels, scales, bias: addresses; a bias of 0 is none
        in_panels: whether they are whole panels, as the compiled step takes them
    """

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None):
        self.outputs, self.inputs = codes.shape
        missing = -self.outputs % PANEL
        panels = _panels(torch.nn.functional.pad(codes, (0, 0, 0, missing)))
        scales = torch.nn.functional.pad(scales, (0, missing))
        padded = None if bias is None else torch.nn.functional.pad(bias, (0, missing))
        self.in_panels = missing == 0
        self._owners = panels, scales, padded
        self.panels, self.scales = panels.data_ptr(), scales.data_ptr()
        self.bias = 0 if padded is None else padded.data_ptr()
        self._job = np.zeros((), JOB)  # what is the same in every call
        self._job["tasks"], self._job["pairs"] = len(panels), self.inputs // 2
        self._job["outputs"], self._job["panels"] = self.outputs, self.panels
        self._job["scales"], self._job["bias"] = self.scales, self.bias
        self._multiply = _worker()  # compiled now, not during a request
        self._shares = -(-self.outputs * self.inputs // _BYTES_PER_THREAD)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs]"""
        rows = x.shape[0]
        if x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty(rows, self.outputs, dtype=torch.bfloat16)
        job = self._job.copy()
        job["address"] = job.ctypes.data
        job["rows"], job["x"], job["x_stride"] = rows, x.data_ptr(), x.stride(0)
        job["out"] = out.data_ptr()
        run(self._multiply, job, self._shares * -(-rows // DIRECT_ROWS))
        return out


def _panels(codes: Tensor) -> Tensor:
    """int8 [outputs, inputs], whole panels -> uint8 [panels, pairs, 128], on a cache line."""
    outputs, inputs = codes.shape
    raw = torch.empty(outputs * inputs + _BYTES, dtype=torch.uint8)
    skip = -raw.data_ptr() % _BYTES
    shape = outputs // PANEL, inputs // 2, _PAIR_BYTES
    made = raw[skip : skip + outputs * inputs].view(shape)
    for panel, rows in zip(made, codes.split(PANEL), strict=True):
        # [pairs, vector of 64 bytes, half of it, quarter, 8 bytes] -> quarters before halves
        pairs = rows.view(PANEL, -1, 2).transpose(0, 1).reshape(-1, 2, 2, 4, 8)
        ordered = pairs.transpose(2, 3).reshape(panel.shape)
        panel.copy_(ordered.abs() + (ordered < 0) * 128)
    return made


@cache
def _worker():
    """The compiled C function, or the one from Numba's cache on disk."""
    primitives = fingerprint(cpu_vectors, cpu_formats, cpu_simd, cpu_pairs, cpu_pages, cpu_linear)

    @cfunc(types.void(types.CPointer(_RECORD)), cache=True, error_model="numpy", nopython=True)
    def multiply(pointer):
        len(primitives)  # makes it part of the key of the cache
        _multiply(carray(pointer, 1)[0])

    return WORKER(multiply.address)


@helper
def _multiply(job):
    sums = scratch(min(job.rows, ROW_BLOCK) * PANEL)
    while True:
        task = take(job.address)
        if task >= job.tasks:
            return
        panel, count = int8_panel_at(job.panels, task, job.pairs), job.outputs - task * PANEL
        for first in range(0, job.rows, ROW_BLOCK):
            rows = min(ROW_BLOCK, job.rows - first)
            x = job.x + first * job.x_stride * 2
            multiply_int8_panel(rows, x, job.x_stride, panel, job.pairs, sums)
            scale_sums(sums, rows, job.scales, task)
            add_bias(sums, rows, job.bias, task)
            for r in range(rows):
                out = job.out + ((first + r) * job.outputs + task * PANEL) * 2
                source = address(sums, r * PANEL)
                store_row(BFLOAT16, source, out, min(PANEL, count), np.float32(1))


@helper
def int8_panel_at(panels, index, pairs):
    """Address of panel `index` of a matrix."""
    return panels + index * pairs * _PAIR_BYTES


@helper
def scale_sums(sums, rows, scales, panel):
    """Multiplies sums [rows, 64] with the scales of a panel's outputs."""
    factors = carray(float_pointer(scales + panel * PANEL * 4), PANEL)
    for r in range(rows):
        for i in range(PANEL):
            sums[r * PANEL + i] *= factors[i]


@helper
def multiply_int8_panel(rows, x, x_stride, panel, pairs, sums):
    """sums[r, i] = x[r] . panel[:, i] for r < rows and i < 64, without the scales; else as
    `cpu_linear.multiply_panel`."""
    if rows <= DIRECT_ROWS:
        _multiply_codes(rows, x, x_stride, panel, pairs, address(sums, 0))
        return
    wide = scratch(WIDE_PAIRS * PANEL)
    tiles = (rows + MOST_HEIGHT - 1) // MOST_HEIGHT
    height = (rows + tiles - 1) // tiles
    for first in range(0, pairs, WIDE_PAIRS):
        count = min(WIDE_PAIRS, pairs - first)
        _convert(panel + first * _PAIR_BYTES, count, address(wide, 0))
        for r in range(0, rows, height):
            here = x + 2 * (r * x_stride + 2 * first)
            target, tall = address(sums, r * PANEL), min(height, rows - r)
            source, keep = address(wide, 0), int(first > 0)
            row = 2 * x_stride
            multiply_pairs(
                tall, _VECTORS, here, row, 4, source, PAIR_BYTES, count, target, PANEL * 4, keep
            )


@intrinsic
def _convert(typingctx, codes, pairs, target):
    """Writes pairs of a panel to `target` in bfloat16, as `cpu_linear` has them."""

    def codegen(context, builder, signature, args):
        codes, pairs, target = args
        with cgutils.for_range(builder, pairs) as loop:
            place = builder.add(target, builder.mul(loop.index, I64(PAIR_BYTES)))
            for j, vector in enumerate(_load_codes(builder, codes, loop.index)):
                builder.store(vector, pointer(builder, place, I64(j * LANES), I32), align=64)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i), codegen


@intrinsic
def _multiply_codes(typingctx, rows, x, x_stride, panel, pairs, sums):
    """sums = x @ panel for at most DIRECT_ROWS rows."""

    def codegen(context, builder, signature, args):
        rows, rest = args[0], args[1:]
        for (height,) in cases(builder, (rows, tuple(range(1, DIRECT_ROWS + 1)))):
            _multiply_rows(builder, height, *rest)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i), codegen


def _multiply_rows(builder, height, x, x_stride, panel, pairs, sums):
    # In the order of the inputs: a row's sums do not depend on how many rows there are.
    cells = variables(builder, [const(0.0)] * (height * _VECTORS))
    row_starts = [builder.mul(x_stride, I64(2 * r)) for r in range(height)]
    with cgutils.for_range(builder, pairs) as loop:
        weights = _load_codes(builder, panel, loop.index)
        for r, start in enumerate(row_starts):
            at = builder.add(builder.add(x, start), builder.mul(loop.index, I64(4)))
            both = builder.load(builder.inttoptr(at, I32.as_pointer()), align=2)
            factor = splat(builder, both)
            for j, weight in enumerate(weights):
                cell = cells[r * _VECTORS + j]
                total = add_products(builder, builder.load(cell), factor, weight)
                builder.store(total, cell)
    for index, cell in enumerate(cells):
        store(builder, builder.load(cell), sums, I64(index * LANES))


def _load_codes(builder, panel, pair):
    """A pair of inputs of 64 outputs: 4 vectors of 16 pairs of bfloat16, as int32. Asks for later
    ones."""
    place, vectors = builder.add(panel, builder.mul(pair, I64(_PAIR_BYTES))), []
    for start in range(0, _PAIR_BYTES, _BYTES):
        line = builder.add(place, I64(start))
        prefetch_line(builder, builder.add(line, I64(_AHEAD_BYTES)))
        codes = builder.load(pointer(builder, line, I64(0), I8, _BYTES), align=64)
        low, high = (_look_up(builder, codes, table) for table in _tables())
        high = builder.or_(high, builder.and_(codes, const(-128, I8, _BYTES)))
        vectors += [_zip(builder, low, high, upper) for upper in (False, True)]
    return vectors


def _tables():
    """The lower and the upper byte of 0 .. 127 in bfloat16."""
    numbers = torch.arange(128).bfloat16().view(torch.int16)
    return (numbers & 255).tolist(), (numbers >> 8).tolist()


def _look_up(builder, codes, table):
    """table[code], the sign bit left out."""
    halves = [ir.Constant(vec(I8, _BYTES), table[start : start + _BYTES]) for start in (0, _BYTES)]
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    return call(builder, name, vec(I8, _BYTES), halves[0], codes, halves[1])


def _zip(builder, low, high, upper):
    """Alternates bytes of the lower or the upper halves of the quarters of two vectors."""
    order = [
        quarter * 16 + upper * 8 + byte + from_high * _BYTES
        for quarter in range(4)
        for byte in range(8)
        for from_high in (False, True)
    ]
    mask = ir.Constant(vec(I32, _BYTES), order)
    return builder.bitcast(builder.shuffle_vector(low, high, mask), vec(I32))
