"""Threads that run a compiled worker together.

They come from the OpenMP runtime that torch itself has loaded, because two thread pools on the same
cores fight: idle OpenMP workers spin for a while after every matrix product, and a second pool
would have to wait for them. Where no such runtime is found, plain threads do.
"""

import ctypes
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""`void worker(Job *job)`: any number of threads may run it at once on the same job."""


def run(worker, job: np.ndarray, shares: int) -> None:
    """Runs a worker on the job with as many threads as torch uses, at most one per share."""
    threads = min(torch.get_num_threads(), shares)
    if threads <= 1:
        worker(job.ctypes.data)
    elif (team := _openmp()) is not None:
        team(worker, job.ctypes.data, threads, 0)
    else:
        list(_pool().map(worker, [job.ctypes.data] * threads))


@cache
def _openmp():
    """`GOMP_parallel`, which runs a worker on a team of threads, or None:
    void GOMP_parallel(void (*fn)(void *), void *data, unsigned threads, unsigned flags)."""
    function = openmp_function("GOMP_parallel")
    if function is not None:
        function.argtypes = (WORKER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
    return function


def openmp_function(name: str):
    """A function of the OpenMP runtime that torch has loaded, or None. libgomp exports those of
    its interface to compilers, and libiomp5 and libomp do so for compatibility."""
    library = _openmp_library()
    return None if library is None else getattr(library, name)


@cache
def _openmp_library() -> ctypes.CDLL | None:
    try:
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:
        return None
    torch_folder = str(Path(torch.__file__).parent)
    for path in sorted(loaded, key=lambda path: not path.startswith(torch_folder)):
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp.")):
            return ctypes.CDLL(path)
    return None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="kernels")


def fingerprint(*modules: ModuleType) -> str:
    """Names the state of modules whose code is inlined into a worker. As a constant of the worker
    it takes part in the key of Numba's cache on disk, which by itself sees only the worker's own
    file change."""
    sources = b"".join(Path(module.__file__ or "").read_bytes() for module in modules)
    return hashlib.sha256(sources).hexdigest()
