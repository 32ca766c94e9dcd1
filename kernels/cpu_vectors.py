"""Helpers that write LLVM vector code: constants, shuffles, loops and a few functions.

Vectors are 16 floats wide; LLVM splits them where the machine's registers are narrower. Pointers
are int64 addresses. Everything here runs while Numba compiles, never afterwards.
"""

from itertools import product

from llvmlite import ir
from numba.core import cgutils

LANES = 16
LOG2E = 1.4426950408889634
LOWEST = -1e30  # a running maximum that nothing visible has raised yet

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
FAST = ("contract", "reassoc", "nsz")
_BYTES = {I8: 1, I16: 2, F16: 2, I32: 4, F32: 4, I64: 8}


def vec(scalar, lanes=LANES):
    return ir.VectorType(scalar, lanes)


def splat(builder, scalar, lanes=LANES):
    first = builder.insert_element(
        ir.Constant(vec(scalar.type, lanes), ir.Undefined), scalar, I32(0)
    )
    return builder.shuffle_vector(first, first, ir.Constant(vec(I32, lanes), [0] * lanes))


def const(value, scalar=F32, lanes=LANES):
    return ir.Constant(vec(scalar, lanes), [value] * lanes)


def pointer(builder, base, index, scalar, lanes=LANES):
    """Pointer to `lanes` elements that start at element `index`."""
    address = builder.add(base, builder.mul(index, I64(_BYTES[scalar])))
    return builder.inttoptr(address, vec(scalar, lanes).as_pointer())


def fma(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=FAST), c, flags=FAST)


def maximum(builder, a, b):
    return builder.select(builder.fcmp_ordered("ogt", a, b), a, b)


def call(builder, name, result, *args):
    """Calls an LLVM intrinsic by its full name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def prefetch_line(builder, address):
    """Asks for the 64 bytes around `address` to be brought into the L2 cache."""
    byte = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, locality, data = I32(0), I32(2), I32(1)
    builder.call(hint, [builder.inttoptr(address, byte), read, locality, data])


def exp2(builder, x):
    """2**x for x <= 0, lane by lane; below 2**-126 gives 0. Relative error about 2e-7.

    Splits x into the nearest integer and a fraction in [-1/2, 1/2], where six Taylor terms of
    exp(f ln 2) are enough, and puts the integer into the exponent bits.
    """
    live = builder.fcmp_ordered("oge", x, const(-126.0))
    x = builder.select(live, x, const(0.0))
    whole = call(builder, "llvm.rint.v16f32", x.type, x)
    fraction = builder.fsub(x, whole)
    poly = const(1.5403530393381608e-4)
    for coefficient in (
        1.3333558146428443e-3,
        9.618129107628477e-3,
        5.550410866482158e-2,
        2.402265069591007e-1,
        6.931471805599453e-1,
        1.0,
    ):
        poly = fma(builder, poly, fraction, const(coefficient))
    exponent = builder.add(builder.fptosi(whole, vec(I32)), const(127, I32))
    power = builder.bitcast(builder.shl(exponent, const(23, I32)), x.type)
    return builder.select(live, builder.fmul(poly, power), const(0.0))


def lane_sums(builder, vectors):
    """One vector whose lane i is the sum of vectors[i], by a tree of shuffles (16 in)."""
    width = LANES  # lanes that still belong to one source
    while len(vectors) > 1:
        low = [s * width + j for s in range(LANES // width) for j in range(width // 2)]
        low += [lane + LANES for lane in low]
        high = [lane + width // 2 for lane in low]
        low, high = (ir.Constant(vec(I32), mask) for mask in (low, high))
        vectors = [
            builder.fadd(
                builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high), flags=FAST
            )
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width //= 2
    return vectors[0]


def reduce(builder, vector, combine):
    """Folds the 16 lanes of one vector into a scalar."""
    width = LANES
    while width > 1:
        width //= 2
        mask = ir.Constant(vec(I32), [(lane + width) % LANES for lane in range(LANES)])
        vector = combine(vector, builder.shuffle_vector(vector, vector, mask))
    return builder.extract_element(vector, I32(0))


def variables(builder, values):
    """Mutable cells that LLVM turns into registers, set to `values` wherever this is emitted."""
    cells = [cgutils.alloca_once(builder, value.type) for value in values]
    for value, cell in zip(values, cells, strict=True):
        builder.store(value, cell)
    return cells


def cases(builder, *choices):
    """Emits a branch per combination of (runtime value, its possible literals), yielding those."""
    for literals in product(*(options for _, options in choices)):
        match = ir.Constant(ir.IntType(1), 1)
        for (value, _), literal in zip(choices, literals, strict=True):
            match = builder.and_(match, builder.icmp_signed("==", value, I64(literal)))
        with builder.if_then(match):
            yield literals


def known(builder, value, likely):
    """Emits a branch per likely value, yielding it as a constant, and one for all others, yielding
    the value itself: what is computed from it then folds in the likely branches."""
    done = builder.append_basic_block("known")
    for number in likely:
        yes, no = (builder.append_basic_block(name) for name in ("likely", "else"))
        builder.cbranch(builder.icmp_signed("==", value, I64(number)), yes, no)
        builder.position_at_end(yes)
        yield I64(number)
        builder.branch(done)
        builder.position_at_end(no)
    yield value
    builder.branch(done)
    builder.position_at_end(done)


def strips(builder, count):
    """Loops over `count` numbers, whole vectors first, yielding (lanes, index of the first)."""
    whole = builder.sdiv(count, I64(LANES))
    with cgutils.for_range(builder, whole) as loop:
        yield LANES, builder.mul(loop.index, I64(LANES))
    done = builder.mul(whole, I64(LANES))
    with cgutils.for_range(builder, builder.sub(count, done)) as loop:
        yield 1, builder.add(done, loop.index)
