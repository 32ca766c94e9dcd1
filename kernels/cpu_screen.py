"""The largest of many scores without reading the whole matrix, for CPUs with AVX512-VNNI.

At few rows a head only reads memory. Here it is kept a second time, in 8 bits, which is half the
bytes, and read in that form; the distance of such a score to the true one is known, so all outputs
but a few can be left out for certain. Those that are left are computed from the bfloat16 matrix:

    8-bit scores, each with a bound | panels that may hold the largest, exactly | the largest

Hence the answer is exactly that of `PackedLinear.best`. For a weight w, kept as q, and a row x,
used as y (two 8-bit numbers for each of its numbers):

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
from kernels.cpu_linear import PANEL, PackedLinear, multiply_panel, panel_at
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

MOST_ROWS = 8
"""Rows up to which reading the matrix takes longer than multiplying with it."""

_HEIGHT = 3  # rows whose sums fit into registers: 8 vectors each
_VECTORS = PANEL // LANES
_QUAD_BYTES = PANEL * 4  # four inputs of every output in a panel
_AHEAD_BYTES = 4096
_MIDDLE = 128  # added to codes: the instruction wants one operand without signs
_CHUNK_OUTPUTS = 4096  # that are converted at once
_SLACK = 1.001  # for norms, whose own rounding is smaller
_LARGEST = 1e15  # of the numbers of a row: beyond it float32 may overflow
# After a search that had to compute more than this share of the panels exactly, so many searches
# are left to `PackedLinear`.
_WASTED_SHARE, PAUSE = 0.2, 64

_FACTORS = 4  # of a row, see `_split`
_INTEGERS = ("counters", "give_way", "rows", "inputs", "outputs", "panels", "x", "x_stride")
_ADDRESSES = ("codes", "limits", "matrix", "highs", "lows", "tops", "places", "out", "read")
JOB = np.dtype([(name, np.int64) for name in (*_INTEGERS, *_ADDRESSES)])
_RECORD = from_dtype(JOB)


class ScreenedLinear:
    """`PackedLinear.best` at half the bytes for at most MOST_ROWS rows.

    Args:
        weight: bfloat16 [outputs, inputs]; read now, not kept
        exact: of the same weight, without a bias

    Attributes:
        panels_read: in the last search, of the bfloat16 matrix; -1 if it could not be searched
        found: float32 [3, panels * MOST_ROWS], what the last search knows of the largest score of
            each row and panel: at most, at least, and exactly where it was computed
    """

    def __init__(self, weight: Tensor, exact: PackedLinear):
        self.exact = exact
        self._codes, self._limits = _convert(weight)
        panels = len(self._codes)
        self._counters = cpu_phase.phases(2)
        self.found = torch.empty(3, panels * MOST_ROWS)
        self._places = torch.empty(panels * MOST_ROWS, dtype=torch.int64)
        self._read = np.zeros(1, np.int64)
        self._pause = self.panels_read = 0
        job = self._job = np.zeros((), JOB)
        job["counters"], job["give_way"] = self._counters.ctypes.data, cpu_phase.give_way()
        job["outputs"], job["inputs"] = weight.shape
        job["panels"] = panels
        job["codes"], job["limits"] = self._codes.data_ptr(), self._limits.data_ptr()
        job["matrix"] = exact.panels
        job["highs"], job["lows"], job["tops"] = (part.data_ptr() for part in self.found)
        job["places"], job["read"] = self._places.data_ptr(), self._read.ctypes.data
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
        job["rows"], job["x"], job["x_stride"] = rows, x.data_ptr(), x.stride(0)
        job["out"] = out.data_ptr()
        run(self._search, job, torch.get_num_threads())
        self.panels_read = int(self._read[0])
        if self.panels_read > _WASTED_SHARE * len(self._codes):
            self._pause = PAUSE
        return out if self.panels_read >= 0 else self.exact.best(x)


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
    rows, panels = job.rows, job.panels
    codes, line = np.empty(2 * rows * job.inputs, np.int8), scratch(job.inputs)
    shifts, factors = np.empty(2 * rows, np.int32), np.empty(_FACTORS * rows, np.float32)
    read = carray(long_pointer(job.read), 1)
    for row in range(rows):
        if not _split(job, row, line, codes, shifts, factors):
            read[0] = -1
            return
    first, second = job.counters, job.counters + PHASE_BYTES
    done = 0
    while True:
        panel = take(first)
        if panel >= panels:
            break
        for row in range(0, rows, _HEIGHT):
            _bound(
                min(_HEIGHT, rows - row),
                codes.ctypes.data + 2 * row * job.inputs,
                shifts.ctypes.data + 8 * row,
                address(factors, _FACTORS * row),
                job.codes + panel * (job.inputs // 4) * _QUAD_BYTES,
                job.inputs,
                job.limits + panel * PANEL * 4,
                panels,
                (row * panels + panel) * 4 + job.highs,
                (row * panels + panel) * 4 + job.lows,
            )
        done += 1
    meet(first, done, panels, job.give_way)
    codes[0], shifts[0], factors[0] = 0, 0, 0  # Numba frees an array after its name's last use

    highs = carray(float_pointer(job.highs), rows * panels)
    lows = carray(float_pointer(job.lows), rows * panels)
    least = np.full(rows, -np.inf, np.float32)
    for at in range(rows * panels):
        least[at // panels] = max(least[at // panels], lows[at])
    likely, count = np.empty(panels, np.int64), 0
    for panel in range(panels):
        for row in range(rows):
            if highs[row * panels + panel] >= least[row]:
                likely[count] = panel
                count += 1
                break

    tops = carray(float_pointer(job.tops), rows * panels)
    places = carray(long_pointer(job.places), rows * panels)
    sums, done = scratch(PANEL), 0
    while True:
        task = take(second)
        if task >= count:
            break
        panel = likely[task]
        for row in range(rows):
            at = row * panels + panel
            if highs[at] >= least[row]:
                tops[at], places[at] = _best_of_panel(job, row, panel, sums)
        done += 1
    meet(second, done, count, job.give_way)

    # Every thread says the same.
    out = carray(long_pointer(job.out), rows)
    read[0] = count
    for row in range(rows):
        top = np.float32(-np.inf)
        for task in range(count):
            at = row * panels + likely[task]
            if highs[at] >= least[row] and tops[at] > top:
                top, out[row] = tops[at], places[at]


@helper
def _split(job, row, line, codes, shifts, factors):
    """Writes x[row] as codes [2, inputs], x = factors[0] * codes[0] + factors[1] * codes[1] but for
    a rest; factors[2] and [3] are the lengths of x and of the rest, or a little more. `shifts` is
    what each of the two sums has too much, because of _MIDDLE. Returns whether all numbers are
    small enough to be searched with."""
    inputs, of = job.inputs, _FACTORS * row
    load_row(BFLOAT16, job.x + row * job.x_stride * 2, address(line, 0), inputs, np.float32(1))
    largest = np.float32(0)
    for i in range(inputs):
        if not abs(line[i]) <= _LARGEST:  # no number isn't, either
            return False
        largest = max(largest, abs(line[i]))
    coarse = np.float32(largest / 127)
    fine = np.float32(coarse / 254)
    per_coarse = 1 / np.float64(coarse) if coarse > 0 else 0.0
    per_fine = 1 / np.float64(fine) if fine > 0 else 0.0
    length, rest, high_sum, low_sum = 0.0, 0.0, 0, 0
    for i in range(inputs):
        number = np.float64(line[i])
        high = max(-127, min(127, int(np.rint(number * per_coarse))))
        left = number - high * np.float64(coarse)
        low = max(-127, min(127, int(np.rint(left * per_fine))))
        left -= low * np.float64(fine)
        codes[2 * row * inputs + i], codes[(2 * row + 1) * inputs + i] = high, low
        high_sum, low_sum = high_sum + high, low_sum + low
        length, rest = length + number * number, rest + left * left
    shifts[2 * row], shifts[2 * row + 1] = _MIDDLE * high_sum, _MIDDLE * low_sum
    factors[of], factors[of + 1] = coarse, fine
    factors[of + 2] = np.sqrt(length) * _SLACK
    factors[of + 3] = np.sqrt(rest) * _SLACK
    return True


@helper
def _best_of_panel(job, row, panel, sums):
    """The largest score of a panel's outputs, and the first output that has it."""
    x, pairs = job.x + row * job.x_stride * 2, job.inputs // 2
    multiply_panel(1, x, job.x_stride, panel_at(job.matrix, panel, pairs), pairs, sums)
    top, place = np.float32(-np.inf), 0
    for i in range(min(PANEL, job.outputs - panel * PANEL)):
        if sums[i] > top:
            top, place = sums[i], panel * PANEL + i
    return top, place


@intrinsic
def _bound(typingctx, rows, codes, shifts, factors, matrix, inputs, limits, panels, highs, lows):
    """The largest that a score of a panel can be, and what the largest score is at least.

    Args:
        rows: at most _HEIGHT, of codes int8 [rows, 2, inputs], shifts int32 [rows, 2] and factors
            float32 [rows, 4]
        matrix, limits: where the panel begins; the rows of limits are `panels` panels long
        highs, lows: of the first row; `panels` float32 further is the next
    """

    def codegen(context, builder, signature, args):
        rows, rest = args[0], args[1:]
        for (height,) in cases(builder, (rows, tuple(range(1, _HEIGHT + 1)))):
            _bound_rows(builder, height, *rest)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i, i, i), codegen


def _bound_rows(
    builder, height, codes, shifts, factors, matrix, inputs, limits, panels, highs, lows
):
    cells = variables(builder, [const(0, I32)] * (height * 2 * _VECTORS))
    starts = [builder.add(codes, builder.mul(inputs, I64(part))) for part in range(2 * height)]
    with cgutils.for_range(builder, builder.sdiv(inputs, I64(4))) as loop:
        place = builder.add(matrix, builder.mul(loop.index, I64(_QUAD_BYTES)))
        weights = []
        for j in range(_VECTORS):
            line = builder.add(place, I64(64 * j))
            prefetch_line(builder, builder.add(line, I64(_AHEAD_BYTES)))
            weights.append(builder.load(pointer(builder, line, I64(0), I32), align=64))
        for part, start in enumerate(starts):
            quad = splat(builder, _load(builder, I32, start, loop.index))
            for j, weight in enumerate(weights):
                cell = cells[part * _VECTORS + j]
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
            sums = []
            for part in (2 * r, 2 * r + 1):
                shift = splat(builder, _load(builder, I32, shifts, I64(part)))
                exact = builder.sub(builder.load(cells[part * _VECTORS + j]), shift)
                sums.append(builder.sitofp(exact, vec(F32)))
            both = [builder.fmul(total, by) for total, by in zip(sums, (coarse, fine), strict=True)]
            score = builder.fmul(builder.fadd(*both), scale)
            error = builder.fadd(builder.fmul(length, per_length), builder.fmul(rest, per_rest))
            high = maximum(builder, builder.fadd(score, error), high)
            low = maximum(builder, builder.fsub(score, error), low)
        for place, vector in ((highs, high), (lows, low)):
            largest = reduce(builder, vector, lambda a, b: maximum(builder, a, b))
            at = builder.add(place, builder.mul(panels, I64(4 * r)))
            builder.store(largest, builder.inttoptr(at, F32.as_pointer()))


def _load(builder, scalar, base, index):
    """Element `index` of an array of int32 or float32."""
    place = builder.add(base, builder.mul(index, I64(4)))
    return builder.load(builder.inttoptr(place, scalar.as_pointer()))
