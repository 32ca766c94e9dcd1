"""SIMD primitives for Numba, written as LLVM vector code.

Loops that matter (dot products, small matrix products, softmax) keep their accumulators in
registers by construction instead of hoping for the auto-vectorizer. Vectors are 16 floats wide;
LLVM splits them where the machine's registers are narrower. All pointers are int64 addresses, all
strides count elements, and a "format" is the storage type of cached numbers: the only place where
the CPU backend knows how a page encodes its values.
"""

from itertools import product

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
FORMATS = FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
LOG2E = 1.4426950408889634
LOWEST = -1e30  # a running maximum that nothing visible has raised yet

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F16, _F32 = ir.HalfType(), ir.FloatType()
_FAST = ("contract", "reassoc", "nsz")


def _vec(scalar, lanes=LANES):
    return ir.VectorType(scalar, lanes)


def _splat(builder, scalar, lanes=LANES):
    first = builder.insert_element(
        ir.Constant(_vec(scalar.type, lanes), ir.Undefined), scalar, _I32(0)
    )
    return builder.shuffle_vector(first, first, ir.Constant(_vec(_I32, lanes), [0] * lanes))


def _const(value, scalar=_F32, lanes=LANES):
    return ir.Constant(_vec(scalar, lanes), [value] * lanes)


def _width(scalar):
    return {_I16: 2, _F16: 2, _I32: 4, _F32: 4, _I64: 8}[scalar]


def _at(builder, base, index, scalar, lanes=LANES):
    """Pointer to `lanes` elements that start at element `index`."""
    address = builder.add(base, builder.mul(index, _I64(_width(scalar))))
    return builder.inttoptr(address, _vec(scalar, lanes).as_pointer())


def _load(builder, base, index, fmt=FLOAT32, lanes=LANES):
    """Loads `lanes` numbers of a cache format as float32."""
    if fmt == FLOAT32:
        return builder.load(_at(builder, base, index, _F32, lanes), align=4)
    if fmt == FLOAT16:
        half = builder.load(_at(builder, base, index, _F16, lanes), align=2)
        return builder.fpext(half, _vec(_F32, lanes))
    bits = builder.load(_at(builder, base, index, _I16, lanes), align=2)
    bits = builder.shl(builder.zext(bits, _vec(_I32, lanes)), _const(16, _I32, lanes))
    return builder.bitcast(bits, _vec(_F32, lanes))


def _store(builder, value, base, index, fmt=FLOAT32):
    """Stores float32 lanes in a format, rounding to nearest even."""
    lanes = value.type.count
    if fmt == FLOAT32:
        builder.store(value, _at(builder, base, index, _F32, lanes), align=4)
        return
    if fmt == FLOAT16:
        half = builder.fptrunc(value, _vec(_F16, lanes))
        builder.store(half, _at(builder, base, index, _F16, lanes), align=2)
        return
    bits = builder.bitcast(value, _vec(_I32, lanes))
    odd = builder.and_(builder.lshr(bits, _const(16, _I32, lanes)), _const(1, _I32, lanes))
    rounded = builder.add(builder.add(bits, _const(0x7FFF, _I32, lanes)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(is_nan, _const(0x7FC00000, _I32, lanes), rounded)
    rounded = builder.trunc(builder.lshr(rounded, _const(16, _I32, lanes)), _vec(_I16, lanes))
    builder.store(rounded, _at(builder, base, index, _I16, lanes), align=2)


def _fma(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=_FAST), c, flags=_FAST)


def _max(builder, a, b):
    return builder.select(builder.fcmp_ordered("ogt", a, b), a, b)


def _call(builder, name, result, *args):
    """Calls an LLVM intrinsic by its full name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _exp2(builder, x):
    """2**x for x <= 0, lane by lane; below 2**-126 gives 0. Relative error about 2e-7.

    Splits x into the nearest integer and a fraction in [-1/2, 1/2], where six Taylor terms of
    exp(f ln 2) are enough, and puts the integer into the exponent bits.
    """
    live = builder.fcmp_ordered("oge", x, _const(-126.0))
    x = builder.select(live, x, _const(0.0))
    whole = _call(builder, "llvm.rint.v16f32", x.type, x)
    fraction = builder.fsub(x, whole)
    poly = _const(1.5403530393381608e-4)
    for coefficient in (
        1.3333558146428443e-3,
        9.618129107628477e-3,
        5.550410866482158e-2,
        2.402265069591007e-1,
        6.931471805599453e-1,
        1.0,
    ):
        poly = _fma(builder, poly, fraction, _const(coefficient))
    exponent = builder.add(builder.fptosi(whole, _vec(_I32)), _const(127, _I32))
    power = builder.bitcast(builder.shl(exponent, _const(23, _I32)), x.type)
    return builder.select(live, builder.fmul(poly, power), _const(0.0))


def _lane_sums(builder, vectors):
    """One vector whose lane i is the sum of vectors[i], by a tree of shuffles (16 in)."""
    width = LANES  # lanes that still belong to one source
    while len(vectors) > 1:
        low = [s * width + j for s in range(LANES // width) for j in range(width // 2)]
        low += [lane + LANES for lane in low]
        high = [lane + width // 2 for lane in low]
        low, high = (ir.Constant(_vec(_I32), mask) for mask in (low, high))
        vectors = [
            builder.fadd(
                builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high), flags=_FAST
            )
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width //= 2
    return vectors[0]


def _reduce(builder, vector, combine):
    """Folds the 16 lanes of one vector into a scalar."""
    width = LANES
    while width > 1:
        width //= 2
        mask = ir.Constant(_vec(_I32), [(lane + width) % LANES for lane in range(LANES)])
        vector = combine(vector, builder.shuffle_vector(vector, vector, mask))
    return builder.extract_element(vector, _I32(0))


def _variables(builder, values):
    """Mutable cells that LLVM turns into registers, set to `values` wherever this is emitted."""
    cells = [cgutils.alloca_once(builder, value.type) for value in values]
    for value, cell in zip(values, cells, strict=True):
        builder.store(value, cell)
    return cells


def _cases(builder, *choices):
    """Emits a branch per combination of (runtime value, its possible literals), yielding those."""
    for literals in product(*(options for _, options in choices)):
        match = ir.Constant(ir.IntType(1), 1)
        for (value, _), literal in zip(choices, literals, strict=True):
            match = builder.and_(match, builder.icmp_signed("==", value, _I64(literal)))
        with builder.if_then(match):
            yield literals


def _strips(builder, count):
    """Loops over `count` numbers, whole vectors first, yielding (lanes, index of the first)."""
    whole = builder.sdiv(count, _I64(LANES))
    with cgutils.for_range(builder, whole) as loop:
        yield LANES, builder.mul(loop.index, _I64(LANES))
    done = builder.mul(whole, _I64(LANES))
    with cgutils.for_range(builder, builder.sub(count, done)) as loop:
        yield 1, builder.add(done, loop.index)


@intrinsic
def take(typingctx, address):
    """Adds one to the int64 at `address` atomically and returns what was there."""

    def codegen(context, builder, signature, args):
        cell = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", cell, _I64(1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def read_int32(typingctx, base, index):
    """Element `index` of the int32 array at address `base`."""

    def codegen(context, builder, signature, args):
        place = builder.add(args[0], builder.mul(args[1], _I64(4)))
        return builder.sext(builder.load(builder.inttoptr(place, _I32.as_pointer())), _I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def write_int32(typingctx, base, index, value):
    """Sets element `index` of the int32 array at address `base`."""

    def codegen(context, builder, signature, args):
        place = builder.add(args[0], builder.mul(args[1], _I64(4)))
        value = builder.trunc(args[2], _I32)
        builder.store(value, builder.inttoptr(place, _I32.as_pointer()))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), codegen


@intrinsic
def float_pointer(typingctx, address):
    """The address as a pointer to float32, for `carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], _F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def prefetch(typingctx, address, count):
    """Asks for `count` bytes to be brought into the L2 cache, one 64-byte line at a time."""

    def codegen(context, builder, signature, args):
        address, count = args
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, locality, data = _I32(0), _I32(2), _I32(1)
        with cgutils.for_range(builder, builder.sdiv(count, _I64(64))) as loop:
            line = builder.add(address, builder.mul(loop.index, _I64(64)))
            builder.call(hint, [builder.inttoptr(line, byte), read, locality, data])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def copy_bytes(typingctx, target, source, count):
    """memcpy between two addresses."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(a, byte) for a in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), codegen


@intrinsic
def load_row(typingctx, fmt, source, target, dim, factor):
    """target[i] = float32(source[i]) * factor for i < dim, then zeros up to a whole vector."""

    def codegen(context, builder, signature, args):
        fmt, source, target, dim, factor = args
        rest = builder.srem(dim, _I64(LANES))
        with builder.if_then(builder.icmp_signed("!=", rest, _I64(0))):
            _store(builder, _const(0.0), target, builder.sub(dim, rest))
        for (literal,) in _cases(builder, (fmt, FORMATS)):
            for lanes, index in _strips(builder, dim):
                value = _load(builder, source, index, literal, lanes)
                value = builder.fmul(value, _splat(builder, factor, lanes))
                _store(builder, value, target, index)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, types.float32), codegen


@intrinsic
def store_row(typingctx, fmt, source, target, dim, factor):
    """target[i] = format(source[i] * factor) for i < dim."""

    def codegen(context, builder, signature, args):
        fmt, source, target, dim, factor = args
        for (literal,) in _cases(builder, (fmt, FORMATS)):
            for lanes, index in _strips(builder, dim):
                value = _load(builder, source, index, FLOAT32, lanes)
                value = builder.fmul(value, _splat(builder, factor, lanes))
                _store(builder, value, target, index, literal)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, types.float32), codegen


@intrinsic
def dot_tile(typingctx, rows, fmt, queries, query_stride, keys, key_stride, vectors, out, stride):
    """Scores of `rows` (1, 2 or 4) float32 queries against 16 // rows keys of a format.

    out[r * stride + t] = sum_d queries[r * query_stride + d] * keys[t * key_stride + d], over
    `vectors` vectors of 16. The 16 accumulators stay in registers.
    """

    def codegen(context, builder, signature, args):
        rows, fmt = args[:2]
        for height, literal in _cases(builder, (rows, (1, 2, 4)), (fmt, FORMATS)):
            _dot_tile(builder, height, literal, *args[2:])
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i, i), codegen


def _dot_tile(builder, height, fmt, queries, query_stride, keys, key_stride, vectors, out, stride):
    tokens = LANES // height
    sums = _variables(builder, [_const(0.0)] * LANES)
    key_rows = [builder.mul(key_stride, _I64(t)) for t in range(tokens)]
    query_rows = [builder.mul(query_stride, _I64(r)) for r in range(height)]
    with cgutils.for_range(builder, vectors) as loop:
        index = builder.mul(loop.index, _I64(LANES))
        q = [_load(builder, queries, builder.add(index, row)) for row in query_rows]
        for t, row in enumerate(key_rows):
            k = _load(builder, keys, builder.add(index, row), fmt)
            for r in range(height):
                cell = sums[r * tokens + t]
                builder.store(_fma(builder, q[r], k, builder.load(cell)), cell)
    scores = _lane_sums(builder, [builder.load(cell) for cell in sums])
    for r in range(height):
        lanes = ir.Constant(_vec(_I32, tokens), list(range(r * tokens, (r + 1) * tokens)))
        part = builder.shuffle_vector(scores, scores, lanes)
        _store(builder, part, out, builder.mul(stride, _I64(r)))


@intrinsic
def multiply_tile(typingctx, rows, vecs, fmt, c, ldc, a, a_row, a_col, b, ldb, depth, keep):
    """C (+)= A @ B for a tile [rows, 16 * vecs] of C that stays in registers.

    c  float32, row stride ldc; added to when keep is 1, else overwritten
    a  float32 [rows, depth], strides a_row and a_col
    b  of a format [depth, 16 * vecs], row stride ldb
    rows is 1, 2 or 4 and vecs 1 or 4.
    """

    def codegen(context, builder, signature, args):
        rows, vecs, fmt = args[:3]
        options = (rows, (1, 2, 4)), (vecs, (1, 4)), (fmt, FORMATS)
        for height, width, literal in _cases(builder, *options):
            _multiply_tile(builder, height, width, literal, *args[3:])
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i, i, i, i, i), codegen


def _multiply_tile(builder, height, width, fmt, c, ldc, a, a_row, a_col, b, ldb, depth, keep):
    places = [
        builder.add(builder.mul(ldc, _I64(i)), _I64(j * LANES))
        for i in range(height)
        for j in range(width)
    ]
    sums = _variables(builder, [_const(0.0)] * len(places))
    with builder.if_then(builder.icmp_signed("!=", keep, _I64(0))):
        for cell, place in zip(sums, places, strict=True):
            builder.store(_load(builder, c, place), cell)
    a_rows = [builder.mul(a_row, _I64(i)) for i in range(height)]
    with cgutils.for_range(builder, depth) as loop:
        b_row = builder.mul(loop.index, ldb)
        b_vecs = [_load(builder, b, builder.add(b_row, _I64(j * LANES)), fmt) for j in range(width)]
        a_index = builder.mul(loop.index, a_col)
        for i in range(height):
            factor = _load(builder, a, builder.add(a_index, a_rows[i]), FLOAT32, 1)
            factor = _splat(builder, builder.extract_element(factor, _I32(0)))
            for j in range(width):
                cell = sums[i * width + j]
                builder.store(_fma(builder, factor, b_vecs[j], builder.load(cell)), cell)
    for cell, place in zip(sums, places, strict=True):
        _store(builder, builder.load(cell), c, place)


@intrinsic
def row_max(typingctx, row, vectors):
    """The largest of `vectors` * 16 floats."""

    def codegen(context, builder, signature, args):
        row, vectors = args
        (best,) = _variables(builder, [_const(LOWEST)])
        with cgutils.for_range(builder, vectors) as loop:
            value = _load(builder, row, builder.mul(loop.index, _I64(LANES)))
            builder.store(_max(builder, value, builder.load(best)), best)
        return _reduce(builder, builder.load(best), lambda a, b: _max(builder, a, b))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def row_exp2(typingctx, row, vectors, top):
    """row = 2**(row - top) in place; returns its sum."""

    def codegen(context, builder, signature, args):
        row, vectors, top = args
        top = _splat(builder, top)
        (total,) = _variables(builder, [_const(0.0)])
        with cgutils.for_range(builder, vectors) as loop:
            index = builder.mul(loop.index, _I64(LANES))
            value = _exp2(builder, builder.fsub(_load(builder, row, index), top))
            _store(builder, value, row, index)
            builder.store(builder.fadd(value, builder.load(total)), total)
        return _reduce(builder, builder.load(total), lambda a, b: builder.fadd(a, b))

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def softcap_row(typingctx, row, vectors, cap, factor):
    """row = factor * cap * tanh(row / cap) in place, tanh(y) = 1 - 2 / (2**(2 y log2 e) + 1)."""

    def codegen(context, builder, signature, args):
        row, vectors, cap, factor = args
        double = _splat(builder, builder.fdiv(_F32(-2 * LOG2E), cap))
        height = _splat(builder, builder.fmul(cap, factor))
        one = _const(1.0)
        with cgutils.for_range(builder, vectors) as loop:
            index = builder.mul(loop.index, _I64(LANES))
            value = _load(builder, row, index)
            negative = builder.fcmp_ordered("olt", value, _const(0.0))
            value = builder.select(negative, builder.fsub(_const(0.0), value), value)
            decay = _exp2(builder, builder.fmul(value, double))  # e**(-2 |y|)
            tanh = builder.fdiv(builder.fsub(one, decay), builder.fadd(one, decay))
            tanh = builder.fmul(tanh, height)
            tanh = builder.select(negative, builder.fsub(_const(0.0), tanh), tanh)
            _store(builder, tanh, row, index)
        return context.get_dummy_value()

    f, i = types.float32, types.int64
    return types.none(i, i, f, f), codegen


@intrinsic
def softmax_columns(typingctx, scores, stride, count, vectors, tops, totals, decays):
    """One online-softmax step down the columns of scores [count, 16 * vectors].

    scores become 2**(score - top); tops, totals and decays are float32 [16 * vectors]: the
    running maximum, the running sum, and the factor that older sums must be multiplied with.
    """

    def codegen(context, builder, signature, args):
        scores, stride, count, vectors, tops, totals, decays = args
        with cgutils.for_range(builder, vectors) as column:
            lane = builder.mul(column.index, _I64(LANES))
            before = _load(builder, tops, lane)
            top, total = _variables(builder, [before, _const(0.0)])
            with cgutils.for_range(builder, count) as loop:
                index = builder.add(lane, builder.mul(loop.index, stride))
                builder.store(_max(builder, _load(builder, scores, index), builder.load(top)), top)
            after = builder.load(top)
            with cgutils.for_range(builder, count) as loop:
                index = builder.add(lane, builder.mul(loop.index, stride))
                value = _exp2(builder, builder.fsub(_load(builder, scores, index), after))
                _store(builder, value, scores, index)
                builder.store(builder.fadd(value, builder.load(total)), total)
            decay = _exp2(builder, builder.fsub(before, after))
            _store(builder, after, tops, lane)
            _store(builder, decay, decays, lane)
            old = _load(builder, totals, lane)
            _store(builder, _fma(builder, old, decay, builder.load(total)), totals, lane)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i), codegen
