"""How the threads of a team wait for each other within one compiled call: by tasks, not by threads.

A phase has two counters, each on a cache line of its own: the next task, and the tasks done. A
thread goes on once all tasks of the phase are done, whoever did them. At a barrier it would also
wait for threads that had nothing to do, and one that the kernel has put aside for another process
then holds up everybody.

    counter        next task (`cpu_simd.take`)
    counter + 64   tasks done
"""

import ctypes
import platform
from functools import cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu_vectors import I32, I64

PHASE_BYTES = 128
_SPINS = 4096  # looks at a counter, 50 to 100 microseconds, before others get the core


def phases(count: int) -> np.ndarray:
    """Counters of so many phases, all 0; row i is phase i."""
    return np.zeros((count, PHASE_BYTES // 8), np.int64)


@cache
def give_way() -> int:
    """Address of a function `int (void)` that lets another process have the core."""
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


@intrinsic
def meet(typingctx, counter, finished, tasks, give_way):
    """Adds the tasks that this thread finished, and returns when `tasks` of the phase are done."""

    def codegen(context, builder, signature, args):
        counter, finished, tasks, give_way = args
        done = builder.inttoptr(builder.add(counter, I64(64)), I64.as_pointer())
        builder.atomic_rmw("add", done, finished, "seq_cst")
        spins = cgutils.alloca_once(builder, I64)
        builder.store(I64(0), spins)
        look, wait, leave = (builder.append_basic_block(name) for name in ("look", "wait", "leave"))
        builder.branch(look)
        builder.position_at_end(look)
        missing = builder.icmp_signed("<", builder.load_atomic(done, "seq_cst", 8), tasks)
        builder.cbranch(missing, wait, leave)
        builder.position_at_end(wait)
        builder.store(_look_again(builder, builder.load(spins), give_way), spins)
        builder.branch(look)
        builder.position_at_end(leave)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, i), codegen


@intrinsic
def look_again(typingctx, spins, give_way):
    """Passes a moment before the next look at a counter; how many looks there were. After some of
    them others get the core, unless `give_way` is 0."""

    def codegen(context, builder, signature, args):
        return _look_again(builder, *args)

    return types.int64(types.int64, types.int64), codegen


def _look_again(builder, spins, give_way):
    if platform.machine() == "x86_64":
        kind = ir.FunctionType(ir.VoidType(), [])
        name = "llvm.x86.sse2.pause"
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
    patient = builder.icmp_signed("<=", spins, I64(_SPINS))
    alone = builder.icmp_signed("==", give_way, I64(0))
    with builder.if_then(builder.not_(builder.or_(patient, alone)), likely=False):
        kind = ir.FunctionType(I32, []).as_pointer()
        builder.call(builder.inttoptr(give_way, kind), [])
    return builder.add(spins, I64(1))
