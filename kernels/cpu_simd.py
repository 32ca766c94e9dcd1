"""SIMD primitives for Numba: products, softmax and memory operations on vectors of 16 floats.

Loops that matter (dot products, small matrix products, softmax) keep their accumulators in
registers by construction instead of hoping for the auto-vectorizer. All pointers are int64
addresses, all strides count elements. What a stored number means is up to `cpu_formats`.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu_formats import FLOAT32, FORMATS, INT4, load, load_vectors, store
from kernels.cpu_vectors import (
    F32,
    I32,
    I64,
    LANES,
    LOG2E,
    LOWEST,
    cases,
    const,
    exp2,
    fma,
    known,
    lane_sums,
    maximum,
    prefetch_line,
    reduce,
    splat,
    variables,
    vec,
)


@intrinsic
def take(typingctx, address):
    """Adds one to the int64 at `address` atomically and returns what was there."""

    def codegen(context, builder, signature, args):
        cell = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", cell, I64(1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def read_int32(typingctx, base, index):
    """Element `index` of the int32 array at address `base`."""

    def codegen(context, builder, signature, args):
        place = builder.add(args[0], builder.mul(args[1], I64(4)))
        return builder.sext(builder.load(builder.inttoptr(place, I32.as_pointer())), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def write_int32(typingctx, base, index, value):
    """Sets element `index` of the int32 array at address `base`."""

    def codegen(context, builder, signature, args):
        place = builder.add(args[0], builder.mul(args[1], I64(4)))
        value = builder.trunc(args[2], I32)
        builder.store(value, builder.inttoptr(place, I32.as_pointer()))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), codegen


@intrinsic
def float_pointer(typingctx, address):
    """The address as a pointer to float32, for `carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def long_pointer(typingctx, address):
    """The same to int64."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def prefetch(typingctx, address, count):
    """Asks for `count` bytes to be brought into the L2 cache, one 64-byte line at a time."""

    def codegen(context, builder, signature, args):
        address, count = args
        with cgutils.for_range(builder, builder.sdiv(count, I64(64))) as loop:
            prefetch_line(builder, builder.add(address, builder.mul(loop.index, I64(64))))
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
def dot_tile(
    typingctx, rows, fmt, queries, query_stride, keys, key_stride, grid, vectors, out, stride
):
    """Scores of `rows` (1, 2 or 4) float32 queries against 16 // rows keys of a format.

    out[r * stride + t] = sum_d queries[r * query_stride + d] * keys[t * key_stride + d], over
    `vectors` vectors of 16. The 16 accumulators stay in registers. `grid` is that of INT4 keys,
    from the first of these tokens on, whose rows (and the queries') follow each other closely.
    """

    def codegen(context, builder, signature, args):
        rows, fmt, vectors = args[0], args[1], args[7]
        for height, literal in cases(builder, (rows, (1, 2, 4)), (fmt, FORMATS)):
            if literal != INT4:
                _dot_tile(builder, height, literal, *args[2:])
                continue
            # Known strides: the addresses of int4 would take longer than the numbers.
            for count in known(builder, vectors, (4, 8)):
                stride = builder.mul(count, I64(LANES))
                tile = args[2], stride, args[4], stride, args[6], count
                _dot_tile(builder, height, literal, *tile, *args[8:])
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i, i, i), codegen


def _dot_tile(
    builder, height, fmt, queries, query_stride, keys, key_stride, grid, vectors, out, stride
):
    tokens = LANES // height
    step = 2 if fmt == INT4 else 1  # vectors per iteration
    sums = variables(builder, [const(0.0)] * LANES)
    key_rows = [builder.mul(key_stride, I64(t)) for t in range(tokens)]
    query_rows = [builder.mul(query_stride, I64(r)) for r in range(height)]
    groups = builder.sdiv(vectors, I64(2))
    half = builder.mul(groups, I64(LANES))
    with cgutils.for_range(builder, builder.sdiv(vectors, I64(step))) as loop:
        index = builder.mul(loop.index, I64(LANES * step))
        q = [
            load_vectors(builder, queries, builder.add(index, row), FLOAT32, step)
            for row in query_rows
        ]
        for t, row in enumerate(key_rows):
            entry = builder.add(loop.index, builder.mul(groups, I64(t)))
            place = builder.add(index, row)
            key = load_vectors(builder, keys, place, fmt, step, (grid, entry, half))
            for r in range(height):
                cell = sums[r * tokens + t]
                for ours, theirs in zip(q[r], key, strict=True):
                    builder.store(fma(builder, ours, theirs, builder.load(cell)), cell)
    scores = lane_sums(builder, [builder.load(cell) for cell in sums])
    for r in range(height):
        lanes = ir.Constant(vec(I32, tokens), list(range(r * tokens, (r + 1) * tokens)))
        part = builder.shuffle_vector(scores, scores, lanes)
        store(builder, part, out, builder.mul(stride, I64(r)))


@intrinsic
def multiply_tile(typingctx, rows, vecs, fmt, c, ldc, a, a_row, a_col, b, ldb, grid, depth, keep):
    """C (+)= A @ B for a tile [rows, 16 * vecs] of C that stays in registers.

    c  float32, row stride ldc; added to when keep is 1, else overwritten
    a  float32 [rows, depth], strides a_row and a_col
    b  of a format [depth, 16 * vecs], row stride ldb; `grid` is that of INT4, from b's group on
    rows is 1, 2 or 4 and vecs 4, or else 1 (2 for INT4, whose vectors come in pairs).
    """

    def codegen(context, builder, signature, args):
        rows, vecs, fmt = args[:3]
        options = (rows, (1, 2, 4)), (vecs, (1, 2, 4)), (fmt, FORMATS)
        for height, width, literal in cases(builder, *options):
            if width != (1 if literal == INT4 else 2):
                _multiply_tile(builder, height, width, literal, *args[3:])
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i, i, i, i, i, i), codegen


def _multiply_tile(builder, height, width, fmt, c, ldc, a, a_row, a_col, b, ldb, grid, depth, keep):
    places = [
        builder.add(builder.mul(ldc, I64(i)), I64(j * LANES))
        for i in range(height)
        for j in range(width)
    ]
    sums = variables(builder, [const(0.0)] * len(places))
    with builder.if_then(builder.icmp_signed("!=", keep, I64(0))):
        for cell, place in zip(sums, places, strict=True):
            builder.store(load(builder, c, place), cell)
    a_rows = [builder.mul(a_row, I64(i)) for i in range(height)]
    groups = builder.sdiv(ldb, I64(2 * LANES))
    half = builder.mul(groups, I64(LANES))
    with cgutils.for_range(builder, depth) as loop:
        b_row, entry = builder.mul(loop.index, ldb), builder.mul(loop.index, groups)
        b_vecs = load_vectors(builder, b, b_row, fmt, width, (grid, entry, half))
        a_index = builder.mul(loop.index, a_col)
        for i in range(height):
            factor = load(builder, a, builder.add(a_index, a_rows[i]), FLOAT32, 1)
            factor = splat(builder, builder.extract_element(factor, I32(0)))
            for j in range(width):
                cell = sums[i * width + j]
                builder.store(fma(builder, factor, b_vecs[j], builder.load(cell)), cell)
    for cell, place in zip(sums, places, strict=True):
        store(builder, builder.load(cell), c, place)


@intrinsic
def row_max(typingctx, row, vectors):
    """The largest of `vectors` * 16 floats."""

    def codegen(context, builder, signature, args):
        row, vectors = args
        (best,) = variables(builder, [const(LOWEST)])
        with cgutils.for_range(builder, vectors) as loop:
            value = load(builder, row, builder.mul(loop.index, I64(LANES)))
            builder.store(maximum(builder, value, builder.load(best)), best)
        return reduce(builder, builder.load(best), lambda a, b: maximum(builder, a, b))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def row_exp2(typingctx, row, vectors, top):
    """row = 2**(row - top) in place; returns its sum."""

    def codegen(context, builder, signature, args):
        row, vectors, top = args
        top = splat(builder, top)
        (total,) = variables(builder, [const(0.0)])
        with cgutils.for_range(builder, vectors) as loop:
            index = builder.mul(loop.index, I64(LANES))
            value = exp2(builder, builder.fsub(load(builder, row, index), top))
            store(builder, value, row, index)
            builder.store(builder.fadd(value, builder.load(total)), total)
        return reduce(builder, builder.load(total), lambda a, b: builder.fadd(a, b))

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def softcap_row(typingctx, row, vectors, cap, factor):
    """row = factor * cap * tanh(row / cap) in place, tanh(y) = 1 - 2 / (2**(2 y log2 e) + 1)."""

    def codegen(context, builder, signature, args):
        row, vectors, cap, factor = args
        double = splat(builder, builder.fdiv(F32(-2 * LOG2E), cap))
        height = splat(builder, builder.fmul(cap, factor))
        one = const(1.0)
        with cgutils.for_range(builder, vectors) as loop:
            index = builder.mul(loop.index, I64(LANES))
            value = load(builder, row, index)
            negative = builder.fcmp_ordered("olt", value, const(0.0))
            value = builder.select(negative, builder.fsub(const(0.0), value), value)
            decay = exp2(builder, builder.fmul(value, double))  # e**(-2 |y|)
            tanh = builder.fdiv(builder.fsub(one, decay), builder.fadd(one, decay))
            tanh = builder.fmul(tanh, height)
            tanh = builder.select(negative, builder.fsub(const(0.0), tanh), tanh)
            store(builder, tanh, row, index)
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
            lane = builder.mul(column.index, I64(LANES))
            before = load(builder, tops, lane)
            top, total = variables(builder, [before, const(0.0)])
            with cgutils.for_range(builder, count) as loop:
                index = builder.add(lane, builder.mul(loop.index, stride))
                builder.store(
                    maximum(builder, load(builder, scores, index), builder.load(top)), top
                )
            after = builder.load(top)
            with cgutils.for_range(builder, count) as loop:
                index = builder.add(lane, builder.mul(loop.index, stride))
                value = exp2(builder, builder.fsub(load(builder, scores, index), after))
                store(builder, value, scores, index)
                builder.store(builder.fadd(value, builder.load(total)), total)
            decay = exp2(builder, builder.fsub(before, after))
            store(builder, after, tops, lane)
            store(builder, decay, decays, lane)
            old = load(builder, totals, lane)
            store(builder, fma(builder, old, decay, builder.load(total)), totals, lane)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i), codegen
