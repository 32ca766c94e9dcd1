"""Threads that run a compiled worker together.

The caller works too, and is done when all tasks are: helpers that come late find nothing to do, and
nobody waits for one that the system has not let run yet. A server shares its cores with the process
that talks HTTP, so a barrier at the end of each call, as OpenMP has it, costs milliseconds.

    caller   posts the job, opens the gate, works, closes the gate, waits for those inside
    helper   waits for a job, enters if the gate is open, works, leaves

A helper spins for a moment before it sleeps, as the next job usually follows at once.
"""

import ctypes
import hashlib
import platform
import threading
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels import cpu_phase
from kernels.cpu_phase import look_again
from kernels.cpu_vectors import I32, I64

WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""`void worker(Job *job)`: any number of threads may run it at once on the same job."""

# Each on a cache line of its own, in bytes: jobs so far (what helpers sleep on), helpers inside or
# CLOSED, helpers that left, helpers asleep; then what does not change while a job runs.
_JOBS, _GATE, _LEFT, _ASLEEP, _WORK = 0, 64, 128, 192, 256
_FUNCTION, _JOB, _MOST, _SYSCALL, _GIVE_WAY = (_WORK + 8 * i for i in range(5))
_CLOSED = -(1 << 40)
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
_WAIT, _WAKE, _EVERYBODY = 128, 129, 1 << 30  # of one process
_SPINS = 4000  # looks at the number of jobs before a helper sleeps


def run(worker, job: np.ndarray, shares: int) -> None:
    """Runs a worker on the job with as many threads as torch uses, at most one per share."""
    threads = min(torch.get_num_threads(), shares)
    if threads > 1 and _FUTEX:
        _team().run(worker, job.ctypes.data, threads - 1)
    else:
        worker(job.ctypes.data)


@cache
def _team() -> "_Team":
    return _Team()


class _Team:
    def __init__(self) -> None:
        raw = np.zeros(_WORK // 8 + 16, np.int64)
        self._board = raw[-raw.ctypes.data % 64 // 8 :]
        library = ctypes.CDLL(None)
        self._board[_GATE // 8] = _CLOSED
        self._board[_SYSCALL // 8] = ctypes.cast(library.syscall, ctypes.c_void_p).value
        self._board[_GIVE_WAY // 8] = cpu_phase.give_way()
        self._lead, self._help = _compiled()
        self._helpers = 0
        self._free = threading.Lock()

    def run(self, worker, job: int, helpers: int) -> None:
        """Works on the job with so many helpers, alone where they serve another caller."""
        if not self._free.acquire(blocking=False):
            worker(job)
            return
        try:
            while self._helpers < helpers:
                self._helpers += 1
                name, board = f"kernels-{self._helpers}", self._board.ctypes.data
                threading.Thread(target=self._help, args=(board,), daemon=True, name=name).start()
            function = ctypes.cast(worker, ctypes.c_void_p).value
            self._board[_WORK // 8 : _WORK // 8 + 3] = function, job, helpers
            self._lead(self._board.ctypes.data)
        finally:
            self._free.release()


@cache
def _compiled():
    """(lead, help): what the caller and what a helper does, both `void (board)`."""
    primitives = fingerprint(cpu_phase)
    options = {"cache": True, "error_model": "numpy", "nopython": True}

    @cfunc(types.void(types.int64), **options)
    def lead(board):
        len(primitives)  # makes it part of the key of the cache
        _change(board + _LEFT, _EXCHANGE, 0)
        _change(board + _GATE, _EXCHANGE, 0)
        _change(board + _JOBS, _ADD, 1)
        if _change(board + _ASLEEP, _ADD, 0) > 0:
            _futex(_read(board + _SYSCALL), board + _JOBS, _WAKE, _EVERYBODY)
        _work(_read(board + _FUNCTION), _read(board + _JOB))
        entered = _change(board + _GATE, _EXCHANGE, _CLOSED)
        spins = 0
        while _change(board + _LEFT, _ADD, 0) < entered:
            spins = look_again(spins, _read(board + _GIVE_WAY))

    @cfunc(types.void(types.int64), **options)
    def helping(board):
        len(primitives)
        seen, spins = 0, 0
        while True:
            jobs = _read(board + _JOBS)
            if jobs == seen:
                if spins < _SPINS:
                    spins = look_again(spins, 0)
                    continue
                _change(board + _ASLEEP, _ADD, 1)
                _futex(_read(board + _SYSCALL), board + _JOBS, _WAIT, seen)
                _change(board + _ASLEEP, _ADD, -1)
                continue
            seen, spins = jobs, 0
            if _enter(board + _GATE, _read(board + _MOST)):
                _work(_read(board + _FUNCTION), _read(board + _JOB))
                _change(board + _LEFT, _ADD, 1)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64)
    return kind(lead.address), kind(helping.address)


_ADD, _EXCHANGE = 0, 1


@intrinsic(prefer_literal=True)
def _change(typingctx, place, how, value):
    """Adds to the int64 at `place`, or exchanges it, atomically; returns what was there."""
    operation = ("add", "xchg")[how.literal_value]

    def codegen(context, builder, signature, args):
        cell = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw(operation, cell, args[2], "seq_cst")

    return types.int64(types.int64, how, types.int64), codegen


@intrinsic
def _read(typingctx, place):
    """The int64 at `place`, read anew each time."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _enter(typingctx, gate, most):
    """Counts this thread in if the gate is open and fewer than `most` are inside."""

    def codegen(context, builder, signature, args):
        gate, most = args
        cell = builder.inttoptr(gate, I64.as_pointer())
        entered = cgutils.alloca_once_value(builder, ir.Constant(ir.IntType(1), 0))
        look, attempt, leave = (
            builder.append_basic_block(name) for name in ("look", "attempt", "leave")
        )
        builder.branch(look)
        builder.position_at_end(look)
        inside = builder.load_atomic(cell, "seq_cst", 8)
        is_open = builder.icmp_signed(">=", inside, I64(0))
        room = builder.icmp_signed("<", inside, most)
        builder.cbranch(builder.and_(is_open, room), attempt, leave)
        builder.position_at_end(attempt)
        more = builder.add(inside, I64(1))
        done = builder.cmpxchg(cell, inside, more, "seq_cst", "seq_cst")
        success = builder.extract_value(done, 1)
        builder.store(success, entered)
        builder.cbranch(success, leave, look)
        builder.position_at_end(leave)
        return builder.load(entered)

    return types.boolean(types.int64, types.int64), codegen


@intrinsic
def _work(typingctx, function, job):
    """Calls `void function(void *job)`."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [args[1]])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def _futex(typingctx, syscall, word, operation, value):
    """Sleeps while the lower half of the int64 at `word` is `value`, or wakes so many sleepers."""

    def codegen(context, builder, signature, args):
        syscall, word, operation, value = args
        kind = ir.FunctionType(I64, [I64] * 7).as_pointer()
        low = builder.zext(builder.trunc(value, I32), I64)
        arguments = [I64(_FUTEX), word, operation, low, I64(0), I64(0), I64(0)]
        builder.call(builder.inttoptr(syscall, kind), arguments)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.int64), codegen


def fingerprint(*modules: ModuleType) -> str:
    """Names the state of modules whose code is inlined into a worker. As a constant of the worker
    it takes part in the key of Numba's cache on disk, which by itself sees only the worker's own
    file change."""
    sources = b"".join(Path(module.__file__ or "").read_bytes() for module in modules)
    return hashlib.sha256(sources).hexdigest()
