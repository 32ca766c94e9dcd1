"""Products of bfloat16 pairs, for CPUs with AVX512-BF16: one instruction multiplies 16 pairs of
numbers with 16 others, adds the two products of each and adds that to 16 float32 sums.

Operands therefore lie as pairs of what is summed over: two inputs of a layer, two numbers of a
head, or two tokens. All pointers are int64 addresses, all strides bytes.
"""

from functools import cache

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu_formats import load, store
from kernels.cpu_vectors import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    call,
    cases,
    const,
    exp2,
    fma,
    lane_sums,
    maximum,
    pointer,
    prefetch_line,
    splat,
    variables,
    vec,
)

MOST_HEIGHT = 6
"""Rows whose sums of 64 columns fit into registers: 24 of 32, beside 4 of the other operand."""


@cache
def has_bfloat16() -> bool:
    """Whether this CPU has the instruction; elsewhere nothing of this file may be called."""
    return bool(binding.get_host_cpu_features().get("avx512bf16"))


def add_products(builder, total, left, right):
    """total[i] + left[2 i] * right[2 i] + left[2 i + 1] * right[2 i + 1], pairs as int32."""
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return call(builder, name, vec(F32), total, left, right)


def multiply_tile(builder, height, vecs, a, a_row, a_pair, b, b_pair, pairs, sums, ahead=0):
    """sums[r * vecs + j] += sum over p of the pair a[r, p] with vector j of b[p].

    Args:
        a, a_row, a_pair: address of pairs, distance of rows and of pairs in a row
        b, b_pair: address of vectors of pairs, each on a line of its own, and distance of b[p]
        sums: `height * vecs` variables
        ahead: bytes between use and prefetch of b; 0 leaves it to the hardware
    """
    # The order of additions is that of the pairs for every height: a row's sums do not depend on
    # the rows beside it.
    starts = [builder.add(a, builder.mul(a_row, I64(r))) for r in range(height)]
    with cgutils.for_range(builder, pairs) as loop:
        place = builder.add(b, builder.mul(loop.index, b_pair))
        vectors = [
            builder.load(pointer(builder, place, I64(j * LANES), I32), align=64)
            for j in range(vecs)
        ]
        for j in range(vecs if ahead else 0):
            prefetch_line(builder, builder.add(place, I64(ahead + 64 * j)))
        at = builder.mul(loop.index, a_pair)
        for r, start in enumerate(starts):
            both = builder.inttoptr(builder.add(start, at), I32.as_pointer())
            factor = splat(builder, builder.load(both, align=2))
            for j, vector in enumerate(vectors):
                cell = sums[r * vecs + j]
                builder.store(add_products(builder, builder.load(cell), factor, vector), cell)


@intrinsic
def multiply_pairs(typingctx, rows, vecs, a, a_row, a_pair, b, b_pair, pairs, c, c_row, keep):
    """C [rows, 16 * vecs] (+)= A @ B for at most MOST_HEIGHT rows; vecs is 1 or 4.

    c is float32; added to when keep is 1, else overwritten. The rest is that of `multiply_tile`.
    """

    def codegen(context, builder, signature, args):
        rows, vecs, a, a_row, a_pair, b, b_pair, pairs, c, c_row, keep = args
        heights = tuple(range(1, MOST_HEIGHT + 1))
        for height, width in cases(builder, (rows, heights), (vecs, (1, 4))):
            places = [
                (builder.add(c, builder.mul(c_row, I64(r))), I64(j * LANES))
                for r in range(height)
                for j in range(width)
            ]
            sums = variables(builder, [const(0.0)] * len(places))
            with builder.if_then(builder.icmp_signed("!=", keep, I64(0))):
                for cell, (row, column) in zip(sums, places, strict=True):
                    builder.store(load(builder, row, column), cell)
            multiply_tile(builder, height, width, a, a_row, a_pair, b, b_pair, pairs, sums)
            for cell, (row, column) in zip(sums, places, strict=True):
                store(builder, builder.load(cell), row, column)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i, i, i, i), codegen if has_bfloat16() else _nothing


@intrinsic
def dot_pairs(typingctx, rows, queries, query_row, keys, key_row, vectors, out, out_row):
    """out[r, t] = queries[r] . keys[t] for `rows` (1, 2 or 4) queries and 16 // rows keys.

    Both are bfloat16 of `vectors` vectors of 32 numbers; out is float32.
    """

    def codegen(context, builder, signature, args):
        rows, queries, query_row, keys, key_row, vectors, out, out_row = args
        for (height,) in cases(builder, (rows, (1, 2, 4))):
            tokens = LANES // height
            sums = variables(builder, [const(0.0)] * LANES)
            with cgutils.for_range(builder, vectors) as loop:
                at = builder.mul(loop.index, I64(64))
                query = [
                    _pairs(builder, queries, builder.add(at, builder.mul(query_row, I64(r))))
                    for r in range(height)
                ]
                for t in range(tokens):
                    key = _pairs(builder, keys, builder.add(at, builder.mul(key_row, I64(t))))
                    for r in range(height):
                        cell = sums[r * tokens + t]
                        total = add_products(builder, builder.load(cell), query[r], key)
                        builder.store(total, cell)
            scores = lane_sums(builder, [builder.load(cell) for cell in sums])
            for r in range(height):
                lanes = ir.Constant(vec(I32, tokens), list(range(r * tokens, (r + 1) * tokens)))
                part = builder.shuffle_vector(scores, scores, lanes)
                store(builder, part, builder.add(out, builder.mul(out_row, I64(r))), I64(0))
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i), codegen if has_bfloat16() else _nothing


@intrinsic
def mix_pairs(typingctx, rows, weights, weight_row, values, value_row, pairs, out, out_row, keep):
    """out[r, :64] (+)= sum over tokens t < 2 * pairs of weights[r, t] * values[t, :64], or of 32
    columns where `rows` is negated.

    weights and values are bfloat16, `rows` 1, 2 or 4; out is float32, added to when keep is 1.
    """

    def codegen(context, builder, signature, args):
        rows, weights, weight_row, values, value_row, pairs, out, out_row, keep = args
        for (literal,) in cases(builder, (rows, (1, 2, 4, -1, -2, -4))):
            height, halves = abs(literal), 2 if literal > 0 else 1
            places = [
                (builder.add(out, builder.mul(out_row, I64(r))), I64(j * LANES))
                for r in range(height)
                for j in range(2 * halves)
            ]
            sums = variables(builder, [const(0.0)] * len(places))
            with builder.if_then(builder.icmp_signed("!=", keep, I64(0))):
                for cell, (row, column) in zip(sums, places, strict=True):
                    builder.store(load(builder, row, column), cell)
            with cgutils.for_range(builder, pairs) as loop:
                first = builder.add(values, builder.mul(loop.index, builder.mul(value_row, I64(2))))
                both = []
                for half in range(halves):
                    even = _halves(builder, first, I64(64 * half))
                    odd = _halves(builder, builder.add(first, value_row), I64(64 * half))
                    both += _interleave(builder, even, odd)
                for r in range(height):
                    at = builder.add(weights, builder.mul(weight_row, I64(r)))
                    at = builder.add(at, builder.mul(loop.index, I64(4)))
                    pair = builder.load(builder.inttoptr(at, I32.as_pointer()), align=2)
                    factor = splat(builder, pair)
                    for j, vector in enumerate(both):
                        cell = sums[r * 2 * halves + j]
                        builder.store(
                            add_products(builder, builder.load(cell), factor, vector), cell
                        )
            for cell, (row, column) in zip(sums, places, strict=True):
                store(builder, builder.load(cell), row, column)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i, i, i, i), codegen if has_bfloat16() else _nothing


@intrinsic
def interleave_tokens(typingctx, first, second, target, vectors):
    """Lays two bfloat16 rows of `vectors` vectors of 32 numbers out as one row of pairs."""

    def codegen(context, builder, signature, args):
        first, second, target, vectors = args
        with cgutils.for_range(builder, vectors) as loop:
            at = builder.mul(loop.index, I64(64))
            rows = (_halves(builder, row, at) for row in (first, second))
            place = builder.add(target, builder.mul(at, I64(2)))
            for j, pairs in enumerate(_interleave(builder, *rows)):
                builder.store(pairs, pointer(builder, place, I64(j * LANES), I32), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i), codegen if has_bfloat16() else _nothing


@intrinsic
def softmax_pairs(typingctx, scores, stride, pairs, vectors, factor, tops, totals, decays, out):
    """One online-softmax step down the columns of factor * scores [2 * pairs, 16 * vectors].

    out [pairs, 16 * vectors] becomes 2**(factor * score - top), as bfloat16 pairs of rows. tops,
    totals and decays are float32 [16 * vectors]: the running maximum, the running sum, and the
    factor that older sums must be multiplied with. `stride` is that of scores and of out.
    """

    def codegen(context, builder, signature, args):
        scores, stride, pairs, vectors, factor, tops, totals, decays, out = args
        factor = splat(builder, factor)
        with cgutils.for_range(builder, vectors) as column:
            lane = builder.mul(column.index, I64(LANES))
            before = load(builder, tops, lane)
            best, total = variables(builder, [const(-1e38), const(0.0)])
            with cgutils.for_range(builder, builder.mul(pairs, I64(2))) as loop:
                row = builder.add(scores, builder.mul(loop.index, stride))
                value = load(builder, row, lane)
                builder.store(maximum(builder, value, builder.load(best)), best)
            after = maximum(builder, builder.fmul(builder.load(best), factor), before)
            with cgutils.for_range(builder, pairs) as loop:
                weights = []
                for half in range(2):
                    index = builder.add(builder.mul(loop.index, I64(2)), I64(half))
                    row = builder.add(scores, builder.mul(index, stride))
                    scaled = builder.fmul(load(builder, row, lane), factor)
                    weight = exp2(builder, builder.fsub(scaled, after))
                    builder.store(builder.fadd(weight, builder.load(total)), total)
                    weights.append(_rounded(builder, weight))
                low = builder.lshr(weights[0], const(16, I32))
                both = builder.or_(low, builder.and_(weights[1], const(-65536, I32)))
                place = builder.add(out, builder.mul(loop.index, stride))
                builder.store(both, pointer(builder, place, lane, I32), align=4)
            decay = exp2(builder, builder.fsub(before, after))
            store(builder, after, tops, lane)
            store(builder, decay, decays, lane)
            old = load(builder, totals, lane)
            store(builder, fma(builder, old, decay, builder.load(total)), totals, lane)
        return context.get_dummy_value()

    i, f = types.int64, types.float32
    return types.none(i, i, i, i, f, i, i, i, i), codegen


def _rounded(builder, value):
    """Bits of a float32 that is finite and not negative, half an ulp of bfloat16 added."""
    return builder.add(builder.bitcast(value, vec(I32)), const(0x8000, I32))


def _pairs(builder, base, offset):
    place = builder.inttoptr(builder.add(base, offset), vec(I32).as_pointer())
    return builder.load(place, align=2)


def _halves(builder, base, offset):
    place = builder.inttoptr(builder.add(base, offset), vec(I16, 32).as_pointer())
    return builder.load(place, align=2)


def _interleave(builder, even, odd):
    """Two vectors of 16 pairs from two of 32 numbers."""
    for start in (0, LANES):
        mask = [lane for i in range(LANES) for lane in (start + i, 32 + start + i)]
        pairs = builder.shuffle_vector(even, odd, ir.Constant(vec(I32, 32), mask))
        yield builder.bitcast(pairs, vec(I32))


def _nothing(context, builder, signature, args):
    return context.get_dummy_value()
