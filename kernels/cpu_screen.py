"""The largest of many scores without reading the whole matrix, for CPUs with AVX512-VNNI.

A head is kept a second time here, in 8 bits: half the bytes to read, and twice the products per
instruction. The distance of such a score to the true one is known, so all outputs
but a few can be left out for certain. Those that are left are computed from the bfloat16 matrix:

    8-bit rows | 8-bit scores, each with a bound | panels that may hold the largest, exactly

Hence the answer is exactly that of `PackedLinear.best`. For a weight w, kept as q, and a row x,
used as y (an 8-bit number for each of its numbers or, where reading takes longer than multiplying,
two):

    |w.x - q.y|  =  |(w - q).x + q.(x - y)|  <=  |w - q| |x| + |q| |x - y|        (Cauchy-Schwarz)

and the rounding of sums in float32 adds at most a small part of |w| |x|.

    panel of 64 outputs | inputs 0 .. 3 of output 0 | inputs 0 .. 3 of output 1 | .. of output 63
                        | inputs 4 .. 7 of output 0 | ..
"""

from functools import cache

import numpy as np
import torch
from llvmlite import binding
from numba import carray, cfunc, from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from kernels import (
    cpu_formats,
    cpu_linear,
    cpu_pages,
    cpu_pairs,
    cpu_phase,
    cpu_simd,
    cpu_vectors,
    int8,
)
from kernels.cpu_formats import BFLOAT16, load, load_row
from kernels.cpu_linear import MOST_ROWS, PANEL, PackedLinear, multiply_panel, panel_at
from kernels.cpu_pages import address, helper, scratch
from kernels.cpu_phase import PHASE_BYTES, meet
from kernels.cpu_simd import float_pointer, long_pointer, take
from kernels.cpu_team import WORKER, fingerprint, run
from kernels.cpu_vectors import (
    F32,
    I32,
    I64,
    LANES,
    call,
    cases,
    const,
    maximum,
    pointer,
    prefetch_line,
    reduce,
    splat,
    variables,
    vec,
)

FINE_ROWS = 8
"""Rows up to which reading the matrix takes longer than multiplying with it: they are kept in twice
8 bits."""

_VECTORS = PANEL // LANES
_MOST_SUMS = 6  # of _VECTORS vectors: what fits into registers
_QUAD_BYTES = PANEL * 4  # four inputs of every output in a panel
_AHEAD_BYTES = 4096
_MIDDLE = 128  # added to codes: the instruction wants one operand without signs
_CHUNK_OUTPUTS = 4096  # that are converted at once
_SLACK = 1.001  # for norms, whose own rounding is smaller
_LARGEST = 1e15  # of the numbers of a row: beyond it float32 may overflow
# After a search that had to compute more than this share of rows and panels exactly, so many
# searches are left to `PackedLinear`.
_WASTED_SHARE, PAUSE = 0.1, 64

_FACTORS = 4  # of a row, see `_split`
_INTEGERS = ("counters", "give_way", "rows", "inputs", "outputs", "panels", "x", "x_stride")
_MATRIX = ("matrix", "limits", "exact")
_ADDRESSES = ("codes", "shifts", "factors", "highs", "lows", "tops", "places", "out", "read")
JOB = np.dtype([(name, np.int64) for name in (*_INTEGERS, *_MATRIX, *_ADDRESSES)])
_RECORD = from_dtype(JOB)


class ScreenedLinear:
    """`PackedLinear.best` for half the work, for at most MOST_ROWS rows.

    Args:
        weight: bfloat16 [outputs, inputs]; read now, not kept
        exact: of the same weight, without a bias

    Attributes:
        exactly: of the last search, how many times a row met a panel of the bfloat16 matrix; -1 if
            it could not be searched
        bounds: float32 [2, panels * MOST_ROWS], of the last search, by panel and row: what the
            largest score is at most, and at least
    """

    def __init__(self, weight: Tensor, exact: PackedLinear):
        self.exact = exact
        matrix, limits = _convert(weight)
        self._panels = len(matrix)
        self._counters = cpu_phase.phases(3)
        codes = torch.empty(MOST_ROWS * 2 * weight.shape[1], dtype=torch.int8)
        shifts = torch.empty(MOST_ROWS * 2, dtype=torch.int32)
        factors = torch.empty(MOST_ROWS * _FACTORS)
        self.bounds = torch.empty(2, self._panels * MOST_ROWS)
        tops = torch.empty(self._panels * MOST_ROWS)
        places = torch.empty(self._panels * MOST_ROWS, dtype=torch.int64)
        self._read = torch.empty(1, dtype=torch.int64)
        self._pause = self.exactly = 0
        job = self._job = np.zeros((), JOB)
        job["counters"], job["give_way"] = self._counters.ctypes.data, cpu_phase.give_way()
        job["outputs"], job["inputs"] = weight.shape
        job["panels"], job["exact"] = self._panels, exact.panels
        self._owners = matrix, limits, codes, shifts, factors, *self.bounds, tops, places
        names = "matrix", "limits", *_ADDRESSES[:-2]
        for name, tensor in zip(names, self._owners, strict=True):
            job[name] = tensor.data_ptr()
        job["read"] = self._read.data_ptr()
        self._search = _worker()

    @staticmethod
    def serves(weight: Tensor, bias: Tensor | None) -> bool:
        """Whether this CPU has the instructions, and the weight no bias and finite numbers."""
        return bias is None and _has_instructions() and bool(weight.isfinite().all())

    def best(self, x: Tensor) -> Tensor:
        """The output of the largest score, the first of equal ones:
        [rows, inputs] -> int64 [rows]"""
        rows = len(x)
        if self._pause or not 0 < rows <= MOST_ROWS:
            self._pause = max(self._pause - 1, 0)
            return self.exact.best(x)
        if x.stride(1) != 1:
            x = x.contiguous()
        out, job = torch.empty(rows, dtype=torch.int64), self._job
        self._counters[:] = 0
        self._read[0] = 0
        job["rows"], job["x"], job["x_stride"] = rows, x.data_ptr(), x.stride(0)
        job["out"] = out.data_ptr()
        run(self._search, job, torch.get_num_threads())
        self.exactly = int(self._read[0])
        if self.exactly > _WASTED_SHARE * rows * self._panels:
            self._pause = PAUSE
        return out if self.exactly >= 0 else self.exact.best(x)


@cache
def _has_instructions() -> bool:
    return cpu_pairs.has_bfloat16() and bool(binding.get_host_cpu_features().get("avx512vnni"))


def _convert(weight: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 [outputs, inputs] -> uint8 [panels, inputs / 4, 256], on a cache line, and float32
    [3, panels * 64]: the scale of each output, and what |x| and |x - y| are multiplied with. The
    scale of what fills the last panel up is no number, which makes its scores lose every
    comparison."""
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    raw = torch.empty(panels * PANEL * inputs + 64, dtype=torch.uint8)
    skip = -raw.data_ptr() % 64
    made = raw[skip : skip + panels * PANEL * inputs].view(panels, inputs // 4, PANEL, 4)
    limits = torch.full((3, panels * PANEL), torch.nan)
    rounding = (inputs + 16) * 2**-23
    for first in range(0, outputs, _CHUNK_OUTPUTS):
        rows = weight[first : first + _CHUNK_OUTPUTS]
        codes, scales = int8.quantize(rows)
        kept, numbers = int8.dequantize(codes, scales), rows.float()
        norms = torch.maximum(kept.norm(dim=1), numbers.norm(dim=1)) * _SLACK
        errors = (numbers - kept).norm(dim=1) * _SLACK
        part = slice(first, first + len(rows))
        limits[:, part] = torch.stack([scales, errors + rounding * norms, norms])
        missing = -len(rows) % PANEL
        codes = torch.nn.functional.pad(codes, (0, 0, 0, missing)).view(-1, PANEL, inputs // 4, 4)
        at = first // PANEL
        made[at : at + len(codes)] = (codes.transpose(1, 2).short() + _MIDDLE).byte()
    return made.view(panels, inputs // 4, _QUAD_BYTES), limits


@cache
def _worker():
    """The compiled C function, or the one from Numba's cache on disk."""
    modules = cpu_vectors, cpu_formats, cpu_simd, cpu_pairs, cpu_phase, cpu_pages, cpu_linear
    primitives = fingerprint(*modules)

    @cfunc(types.void(types.CPointer(_RECORD)), cache=True, error_model="numpy", nopython=True)
    def search(pointer):
        len(primitives)  # makes it part of the key of the cache
        _search(carray(pointer, 1)[0])

    return WORKER(search.address)


@helper
def _search(job):
    rows, panels, phase = job.rows, job.panels, job.counters
    parts = 2 if rows <= FINE_ROWS else 1
    read, line = carray(long_pointer(job.read), 1), scratch(job.inputs)
    done = 0
    while True:
        row = take(phase)
        if row >= rows:
            break
        if not _split(job, row, parts, line):
            read[0] = -1
        done += 1
    meet(phase, done, rows, job.give_way)
    if read[0] < 0:
        return

    phase += PHASE_BYTES
    height, done = _MOST_SUMS // parts, 0
    while True:
        panel = take(phase)
        if panel >= panels:
            break
        matrix = job.matrix + panel * (job.inputs // 4) * _QUAD_BYTES
        limits = job.limits + panel * PANEL * 4
        for row in range(0, rows, height):
            count, place = min(height, rows - row), (panel * rows + row) * 4
            codes, shifts = job.codes + row * 2 * job.inputs, job.shifts + row * 8
            factors, highs, lows = job.factors + row * 16, job.highs + place, job.lows + place
            _bound(
                parts,
                count,
                codes,
                shifts,
                factors,
                matrix,
                job.inputs,
                limits,
                panels,
                highs,
                lows,
            )
        done += 1
    meet(phase, done, panels, job.give_way)

    # Every thread finds the same.
    highs = carray(float_pointer(job.highs), panels * rows)
    lows = carray(float_pointer(job.lows), panels * rows)
    least = np.full(rows, -np.inf, np.float32)
    for panel in range(panels):
        for row in range(rows):
            least[row] = max(least[row], lows[panel * rows + row])
    likely, count, exactly = np.empty(panels, np.int64), 0, 0
    for panel in range(panels):
        before = exactly
        for row in range(rows):
            exactly += highs[panel * rows + row] >= least[row]
        if exactly > before:
            likely[count] = panel
            count += 1

    phase += PHASE_BYTES
    tops = carray(float_pointer(job.tops), panels * rows)
    places = carray(long_pointer(job.places), panels * rows)
    sums, done = scratch(PANEL), 0
    while True:
        task = take(phase)
        if task >= count:
            break
        for row in range(rows):
            at = likely[task] * rows + row
            if highs[at] >= least[row]:
                tops[at], places[at] = _best_of_panel(job, row, likely[task], sums)
        done += 1
    meet(phase, done, count, job.give_way)

    # Every thread says the same.
    out, best = carray(long_pointer(job.out), rows), np.full(rows, -np.inf, np.float32)
    for task in range(count):
        for row in range(rows):
            at = likely[task] * rows + row
            if highs[at] >= least[row] and tops[at] > best[row]:
                best[row], out[row] = tops[at], places[at]
    read[0] = exactly


@helper
def _split(job, row, parts, line):
    """Writes x[row] as codes [2, inputs], x = factors[0] * codes[0] + factors[1] * codes[1] but for
    a rest; factors[2] and [3] are the lengths of x and of the rest, or a little more. `shifts` is
    what each of the two sums has too much, because of _MIDDLE. Of one part, the second codes are
    left out. Returns whether all numbers are small enough to be searched with."""
    inputs = job.inputs
    codes = carray(_byte_pointer(job.codes + row * 2 * inputs), 2 * inputs)
    shifts = carray(_int_pointer(job.shifts + row * 8), 2)
    factors = carray(float_pointer(job.factors + row * 4 * _FACTORS), _FACTORS)
    load_row(BFLOAT16, job.x + row * job.x_stride * 2, address(line, 0), inputs, np.float32(1))
    largest = np.float32(0)
    for i in range(inputs):
        if not abs(line[i]) <= _LARGEST:  # no number isn't, either
            return False
        largest = max(largest, abs(line[i]))
    coarse = np.float32(largest / 127)
    fine = np.float32(coarse / 254) if parts == 2 else np.float32(0)
    per_coarse = 1 / np.float64(coarse) if coarse > 0 else 0.0
    per_fine = 1 / np.float64(fine) if fine > 0 else 0.0
    length, rest, high_sum, low_sum = 0.0, 0.0, 0, 0
    for i in range(inputs):
        number = np.float64(line[i])
        high = max(-127, min(127, int(np.rint(number * per_coarse))))
        left = number - high * np.float64(coarse)
        low = max(-127, min(127, int(np.rint(left * per_fine))))
        left -= low * np.float64(fine)
        codes[i], codes[inputs + i] = high, low
        high_sum, low_sum = high_sum + high, low_sum + low
        length, rest = length + number * number, rest + left * left
    shifts[0], shifts[1] = _MIDDLE * high_sum, _MIDDLE * low_sum
    factors[0], factors[1] = coarse, fine
    factors[2], factors[3] = np.sqrt(length) * _SLACK, np.sqrt(rest) * _SLACK
    return True


@helper
def _best_of_panel(job, row, panel, sums):
    """The largest score of a panel's outputs, and the first output that has it."""
    x, pairs = job.x + row * job.x_stride * 2, job.inputs // 2
    multiply_panel(1, x, job.x_stride, panel_at(job.exact, panel, pairs), pairs, sums)
    top, place = np.float32(-np.inf), 0
    for i in range(min(PANEL, job.outputs - panel * PANEL)):
        if sums[i] > top:
            top, place = sums[i], panel * PANEL + i
    return top, place


@intrinsic
def _bound(
    typingctx, parts, rows, codes, shifts, factors, matrix, inputs, limits, panels, highs, lows
):
    """The largest that a score of a panel can be, and what the largest score is at least.

    Args:
        parts: 1 or 2, of the codes
        rows: at most _MOST_SUMS / parts, of codes int8 [rows, 2, inputs], shifts int32 [rows, 2]
            and factors float32 [rows, 4]
        matrix, limits: where the panel begins; the rows of limits are `panels` panels long
        highs, lows: float32 [rows]
    """

    def codegen(context, builder, signature, args):
        heights = tuple(range(1, _MOST_SUMS + 1))
        for parts, height in cases(builder, (args[0], (1, 2)), (args[1], heights)):
            if parts * height <= _MOST_SUMS:
                _bound_rows(builder, parts, height, *args[2:])
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i, i, i, i), codegen


def _bound_rows(
    builder, parts, height, codes, shifts, factors, matrix, inputs, limits, panels, highs, lows
):
    count = parts * height
    cells = variables(builder, [const(0, I32)] * (count * _VECTORS))
    starts = [
        builder.add(codes, builder.mul(inputs, I64(2 * r + part)))
        for r in range(height)
        for part in range(parts)
    ]
    with cgutils.for_range(builder, builder.sdiv(inputs, I64(4))) as loop:
        place = builder.add(matrix, builder.mul(loop.index, I64(_QUAD_BYTES)))
        weights = []
        for j in range(_VECTORS):
            line = builder.add(place, I64(64 * j))
            prefetch_line(builder, builder.add(line, I64(_AHEAD_BYTES)))
            weights.append(builder.load(pointer(builder, line, I64(0), I32), align=64))
        for index, start in enumerate(starts):
            quad = splat(builder, _load(builder, I32, start, loop.index))
            for j, weight in enumerate(weights):
                cell = cells[index * _VECTORS + j]
                name = "llvm.x86.avx512.vpdpbusd.512"
                total = call(builder, name, vec(I32), builder.load(cell), weight, quad)
                builder.store(total, cell)
    width = builder.mul(panels, I64(PANEL))
    for r in range(height):
        coarse, fine, length, rest = (
            splat(builder, _load(builder, F32, factors, I64(_FACTORS * r + i)))
            for i in range(_FACTORS)
        )
        high, low = const(-np.inf), const(-np.inf)
        for j in range(_VECTORS):
            scale, per_length, per_rest = (
                load(builder, limits, builder.add(builder.mul(width, I64(i)), I64(LANES * j)))
                for i in range(3)
            )
            score = const(0.0)
            for part, factor in zip(range(parts), (coarse, fine), strict=False):
                shift = splat(builder, _load(builder, I32, shifts, I64(2 * r + part)))
                total = builder.load(cells[(r * parts + part) * _VECTORS + j])
                total = builder.sitofp(builder.sub(total, shift), vec(F32))
                score = builder.fadd(score, builder.fmul(total, factor))
            score = builder.fmul(score, scale)
            error = builder.fadd(builder.fmul(length, per_length), builder.fmul(rest, per_rest))
            high = maximum(builder, builder.fadd(score, error), high)
            low = maximum(builder, builder.fsub(score, error), low)
        for place, vector in ((highs, high), (lows, low)):
            largest = reduce(builder, vector, lambda a, b: maximum(builder, a, b))
            at = builder.add(place, I64(4 * r))
            builder.store(largest, builder.inttoptr(at, F32.as_pointer()))


def _load(builder, scalar, base, index):
    """Element `index` of an array of int32 or float32."""
    place = builder.add(base, builder.mul(index, I64(4)))
    return builder.load(builder.inttoptr(place, scalar.as_pointer()))


@intrinsic
def _byte_pointer(typingctx, place):
    return _pointer_to(types.int8)


@intrinsic
def _int_pointer(typingctx, place):
    return _pointer_to(types.int32)


def _pointer_to(kind):
    """The address as a pointer, for `carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(kind)))

    return types.CPointer(kind)(types.int64), codegen
