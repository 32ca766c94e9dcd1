"""Storage formats of numbers on CPUs, as LLVM vector code: what `kernels.pages` defines.

Together with `cpu_pages` this is all that the CPU backend knows of how pages encode numbers. 8-bit
codes come out of `load` without their scale, fp8 ones also divided by 256: those factors go
into scores and softmax weights. int4 codes come in pairs of vectors and need a grid, which holds
a scale and an offset for every (token, group):

    number = code * scale + offset            offset = -zero point * scale

    grid   [2, LANES * groups] float32        0 = scales, 1 = offsets

fp8 (e4m3) moves into the exponent and mantissa of a float16 by a shift, which divides by 2**8:

    e4m3     s eeee mmm          float16    s 0eeee mmm0000000
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu_vectors import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    call,
    cases,
    const,
    fma,
    maximum,
    pointer,
    reduce,
    splat,
    strips,
    variables,
    vec,
)

FORMATS = FLOAT32, BFLOAT16, FLOAT16, INT8, FP8, INT4 = 0, 1, 2, 3, 4, 5
FLOATS = FORMATS[:3]
CODES = INT8, FP8
GROUP = 2 * LANES  # numbers of int4 that share a scale
FP8_UNIT = 256.0  # by which fp8 codes come out too small


def load(builder, base, index, fmt=FLOAT32, lanes=LANES):
    """Loads `lanes` numbers (not of INT4) as float32."""
    if fmt == FLOAT32:
        return builder.load(pointer(builder, base, index, F32, lanes), align=4)
    if fmt == FLOAT16:
        half = builder.load(pointer(builder, base, index, F16, lanes), align=2)
        return builder.fpext(half, vec(F32, lanes))
    if fmt == BFLOAT16:
        bits = builder.load(pointer(builder, base, index, I16, lanes), align=2)
        bits = builder.shl(builder.zext(bits, vec(I32, lanes)), const(16, I32, lanes))
        return builder.bitcast(bits, vec(F32, lanes))
    codes = builder.load(pointer(builder, base, index, I8, lanes), align=1)
    if fmt == INT8:
        return builder.sitofp(codes, vec(F32, lanes))
    bits = builder.shl(builder.sext(codes, vec(I16, lanes)), const(7, I16, lanes))
    bits = builder.and_(bits, const(0xBFFF, I16, lanes))
    return builder.fpext(builder.bitcast(bits, vec(F16, lanes)), vec(F32, lanes))


def load_vectors(builder, base, index, fmt, count, grid=None):
    """`count` vectors of consecutive numbers. For INT4 `index` starts a group and `grid` is the
    (address, entry of this index's group, entries of the scales) of its scales and offsets."""
    if fmt != INT4:
        return [load(builder, base, builder.add(index, I64(LANES * i)), fmt) for i in range(count)]
    address, entry, half = grid
    numbers = []
    for g in range(count // 2):
        at = builder.add(entry, I64(g))
        scale = _broadcast(builder, address, at)
        offset = _broadcast(builder, address, builder.add(at, half))
        byte = builder.add(builder.ashr(index, I64(1)), I64(LANES * g))
        codes = (builder.sitofp(part, vec(F32)) for part in _nibbles(builder, base, byte))
        numbers += [fma(builder, part, scale, offset) for part in codes]
    return numbers


def _nibbles(builder, base, byte):
    """The codes of one group as two vectors of int32."""
    packed = builder.load(pointer(builder, base, byte, I8), align=1)
    wide = builder.zext(packed, vec(I32))
    return builder.and_(wide, const(15, I32)), builder.lshr(wide, const(4, I32))


def _broadcast(builder, base, index):
    value = load(builder, base, index, FLOAT32, 1)
    return splat(builder, builder.extract_element(value, I32(0)))


def store(builder, value, base, index, fmt=FLOAT32):
    """Stores float32 lanes in a format (not INT4), rounding to nearest even.

    Codes saturate; the numbers were divided by their scale before.
    """
    lanes = value.type.count
    if fmt == FLOAT32:
        builder.store(value, pointer(builder, base, index, F32, lanes), align=4)
    elif fmt == FLOAT16:
        half = builder.fptrunc(value, vec(F16, lanes))
        builder.store(half, pointer(builder, base, index, F16, lanes), align=2)
    elif fmt == BFLOAT16:
        half = _to_bfloat16(builder, value)
        builder.store(half, pointer(builder, base, index, I16, lanes), align=2)
    else:
        largest = 127.0 if fmt == INT8 else 448.0
        value = _clamp(builder, value, -largest, largest)
        codes = _to_int8(builder, value) if fmt == INT8 else _to_fp8(builder, value)
        builder.store(codes, pointer(builder, base, index, I8, lanes), align=1)


def _to_bfloat16(builder, value):
    lanes = value.type.count
    bits = builder.bitcast(value, vec(I32, lanes))
    odd = builder.and_(builder.lshr(bits, const(16, I32, lanes)), const(1, I32, lanes))
    rounded = builder.add(builder.add(bits, const(0x7FFF, I32, lanes)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(is_nan, const(0x7FC00000, I32, lanes), rounded)
    return builder.trunc(builder.lshr(rounded, const(16, I32, lanes)), vec(I16, lanes))


def _to_int8(builder, value):
    lanes = value.type.count
    return builder.trunc(builder.fptosi(_round(builder, value), vec(I32, lanes)), vec(I8, lanes))


def _to_fp8(builder, value):
    """e4m3 by integer arithmetic: the mantissa is rounded to 3 bits, or below 2**-6, where the
    steps are 2**-9 throughout, by the addition of a number whose last bit that is."""
    lanes = value.type.count

    def whole(number):
        return const(number, I32, lanes)

    bits = builder.bitcast(value, vec(I32, lanes))
    sign = builder.and_(builder.lshr(bits, whole(24)), whole(0x80))
    bits = builder.and_(bits, whole(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(bits, whole(20)), whole(1))
    normal = builder.lshr(builder.add(builder.add(bits, whole(0x7FFFF)), odd), whole(20))
    normal = builder.sub(normal, whole((127 - 7) << 3))
    size = builder.bitcast(bits, vec(F32, lanes))
    small = builder.bitcast(builder.fadd(size, const(2.0**14, F32, lanes)), vec(I32, lanes))
    small = builder.sub(small, whole((127 + 14) << 23))
    is_small = builder.fcmp_ordered("olt", size, const(2.0**-6, F32, lanes))
    codes = builder.or_(builder.select(is_small, small, normal), sign)
    return builder.trunc(codes, vec(I8, lanes))


def _round(builder, value):
    return call(builder, f"llvm.rint.v{value.type.count}f32", value.type, value)


def _clamp(builder, value, low, high):
    lanes = value.type.count
    value = maximum(builder, value, const(low, F32, lanes))
    return _minimum(builder, value, const(high, F32, lanes))


def _minimum(builder, a, b):
    return builder.select(builder.fcmp_ordered("olt", a, b), a, b)


@intrinsic
def read_bfloat16(typingctx, address):
    """The bfloat16 at an address."""

    def codegen(context, builder, signature, args):
        value = load(builder, args[0], I64(0), BFLOAT16, 1)
        return builder.extract_element(value, I32(0))

    return types.float32(types.int64), codegen


@intrinsic
def load_row(typingctx, fmt, source, target, dim, factor):
    """target[i] = float32(source[i]) * factor for i < dim, then zeros up to a whole vector.

    Of any format but INT4.
    """

    def codegen(context, builder, signature, args):
        fmt, source, target, dim, factor = args
        rest = builder.srem(dim, I64(LANES))
        with builder.if_then(builder.icmp_signed("!=", rest, I64(0))):
            store(builder, const(0.0), target, builder.sub(dim, rest))
        for (literal,) in cases(builder, (fmt, FLOATS + CODES)):
            for lanes, index in strips(builder, dim):
                value = load(builder, source, index, literal, lanes)
                value = builder.fmul(value, splat(builder, factor, lanes))
                store(builder, value, target, index)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, types.float32), codegen


@intrinsic
def store_row(typingctx, fmt, source, target, dim, factor):
    """target[i] = format(source[i] * factor) for i < dim, in one of FLOATS."""

    def codegen(context, builder, signature, args):
        fmt, source, target, dim, factor = args
        for (literal,) in cases(builder, (fmt, FLOATS)):
            for lanes, index in strips(builder, dim):
                value = load(builder, source, index, FLOAT32, lanes)
                value = builder.fmul(value, splat(builder, factor, lanes))
                store(builder, value, target, index, literal)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, types.float32), codegen


@intrinsic
def encode_row(typingctx, fmt, source, codes, scale, dim, padded):
    """Encodes float32 source[:dim] as INT8 or FP8 with a bfloat16 scale for all.

    source[dim:padded] is zeros, `padded` whole vectors.
    """

    def codegen(context, builder, signature, args):
        fmt, source, codes, scale, dim, padded = args
        (largest,) = variables(builder, [const(0.0)])
        with cgutils.for_range(builder, builder.sdiv(padded, I64(LANES))) as loop:
            value = load(builder, source, builder.mul(loop.index, I64(LANES)))
            size = call(builder, "llvm.fabs.v16f32", vec(F32), value)
            builder.store(maximum(builder, size, builder.load(largest)), largest)
        top = reduce(builder, builder.load(largest), lambda a, b: maximum(builder, a, b))
        for (literal,) in cases(builder, (fmt, CODES)):
            limit = F32(127.0 if literal == INT8 else 448.0)
            divisor = _put_scale(builder, builder.fdiv(top, limit), scale, I64(0))
            for lanes, index in strips(builder, dim):
                value = load(builder, source, index, FLOAT32, lanes)
                value = builder.fdiv(value, splat(builder, divisor, lanes))
                store(builder, value, codes, index, literal)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i, i), codegen


def _put_scale(builder, scale, base, index):
    """Stores a scale as bfloat16; returns what was stored, or 1 for 0, to divide by."""
    store(builder, splat(builder, scale, 1), base, index, BFLOAT16)
    stored = builder.extract_element(load(builder, base, index, BFLOAT16, 1), I32(0))
    return builder.select(builder.fcmp_ordered("ogt", stored, F32(0.0)), stored, F32(1.0))


@intrinsic
def encode_groups(typingctx, source, codes, scales, zeros, groups):
    """Encodes float32 source[groups * GROUP] as INT4, with bfloat16 scales and int8 zeros."""

    def codegen(context, builder, signature, args):
        source, codes, scales, zeros, groups = args
        with cgutils.for_range(builder, groups) as loop:
            first = builder.mul(loop.index, I64(GROUP))
            halves = load_vectors(builder, source, first, FLOAT32, 2)
            low = reduce(builder, _minimum(builder, *halves), lambda a, b: _minimum(builder, a, b))
            high = reduce(builder, maximum(builder, *halves), lambda a, b: maximum(builder, a, b))
            size = call(builder, "llvm.fabs.f32", F32, low)
            span = builder.fdiv(builder.fsub(high, low), F32(15.0))
            scale = maximum(builder, span, builder.fdiv(size, F32(127.0)))
            divisor = splat(builder, _put_scale(builder, scale, scales, loop.index))
            zero = builder.fdiv(splat(builder, builder.fneg(low)), divisor)
            zero = _clamp(builder, _round(builder, zero), -127.0, 127.0)
            parts = [
                _clamp(
                    builder,
                    builder.fadd(_round(builder, builder.fdiv(half, divisor)), zero),
                    0.0,
                    15.0,
                )
                for half in halves
            ]
            left, right = (builder.fptosi(part, vec(I32)) for part in parts)
            packed = builder.or_(left, builder.shl(right, const(4, I32)))
            at = builder.mul(loop.index, I64(LANES))
            builder.store(builder.trunc(packed, vec(I8)), pointer(builder, codes, at, I8), align=1)
            first_lane = ir.Constant(vec(I32, 1), [0])
            zero = builder.shuffle_vector(_to_int8(builder, zero), const(0, I8), first_lane)
            builder.store(zero, pointer(builder, zeros, loop.index, I8, 1), align=1)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i), codegen


@intrinsic
def load_grid(typingctx, scales, zeros, grid, count, half):
    """grid[i] = scales[i] and grid[half + i] = -zeros[i] * scales[i] for i < count."""

    def codegen(context, builder, signature, args):
        scales, zeros, grid, count, half = args
        for lanes, index in strips(builder, count):
            scale = load(builder, scales, index, BFLOAT16, lanes)
            store(builder, scale, grid, index)
            offset = builder.fmul(load(builder, zeros, index, INT8, lanes), scale)
            store(builder, builder.fneg(offset), grid, builder.add(half, index))
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i), codegen


@intrinsic
def load_groups(typingctx, codes, grid, target, groups, half):
    """target[groups * GROUP] = the float32 numbers of one INT4 row."""

    def codegen(context, builder, signature, args):
        codes, grid, target, groups, half = args
        with cgutils.for_range(builder, groups) as loop:
            first = builder.mul(loop.index, I64(GROUP))
            pair = load_vectors(builder, codes, first, INT4, 2, (grid, loop.index, half))
            for i, numbers in enumerate(pair):
                store(builder, numbers, target, builder.add(first, I64(LANES * i)))
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, i), codegen


@intrinsic
def scale_rows(typingctx, rows, stride, count, scales, unit):
    """rows[r, i] *= scales[i] * unit for r < count and i < LANES; scales are bfloat16."""

    def codegen(context, builder, signature, args):
        rows, stride, count, scales, unit = args
        factor = builder.fmul(load(builder, scales, I64(0), BFLOAT16), splat(builder, unit))
        with cgutils.for_range(builder, count) as loop:
            index = builder.mul(loop.index, stride)
            store(builder, builder.fmul(load(builder, rows, index), factor), rows, index)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i, types.float32), codegen
