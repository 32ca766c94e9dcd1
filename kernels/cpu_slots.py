"""`kernels.slots` in one compiled call, for CPUs.

Between two steps the weights of a model push everything else out of the caches. How long the
inputs of a step take then depends on how much code makes them, not on how many numbers there are:
an operation of torch takes some twenty times as long as in a loop.
"""

from __future__ import annotations

import ctypes
from array import array
from functools import cache

import numpy as np
import torch
from numba import carray, cfunc, types
from torch import Tensor

from kernels.slots import StepRows, StepShape

_WIDTH = 16
"""Block tables are a multiple of it wide, so that most steps have the shape of the one before."""


class SlotRows:
    """`kernels.slots.SlotRows` on a CPU. Steps of one shape are gathered in the same memory: a
    step has been computed when the next one is gathered."""

    def __init__(self, tokens: Tensor, block_tables: Tensor, block_size: int):
        self._owners = tokens, block_tables
        groups, slots, blocks = block_tables.shape
        self._groups, self._blocks, self._block_size = groups, blocks, block_size
        self._tokens = tokens.data_ptr(), tokens.shape[1], slots
        self._tables = block_tables.data_ptr(), groups, blocks, block_size
        self._gather, self._put = _functions()  # compiled now, not during a request
        self._sizes = (-1,) * 5

    def gather(self, plan: array[int], shape: StepShape) -> StepRows:
        """The inputs of a step (see `kernels.slots`)."""
        *sizes, context = shape
        width = -(-context // (self._block_size * _WIDTH)) * _WIDTH
        sizes = (*sizes, min(width, self._blocks))
        if sizes != self._sizes:
            self._reserve(*sizes)
        place, _ = plan.buffer_info()
        self._gather(place, *sizes, *self._tokens, *self._tables, *self._results)
        return self._rows

    def _reserve(self, *sizes: int) -> None:
        """Makes the memory for steps of another shape."""
        seqs, decodes, count, sampled, width = self._sizes = sizes
        longs = torch.empty(2 * count + 4 * sampled, dtype=torch.int64)
        token_ids, positions, wanted, slots, at, bits = longs.split([count] * 2 + [sampled] * 4)
        parts = [seqs, seqs - decodes + 1, *[seqs * width, count] * self._groups]
        ints = torch.empty(sum(parts), dtype=torch.int32)
        context_lens, query_start, *places = ints.split(parts)
        self._results = longs.data_ptr(), ints.data_ptr()
        self._rows = StepRows(
            token_ids=token_ids,
            positions=positions,
            context_lens=context_lens,
            query_start=query_start,
            block_tables=tuple(table.view(seqs, width) for table in places[::2]),
            slot_mapping=tuple(places[1::2]),
            wanted=wanted,
            slots=slots,
            at=at,
            uniforms=bits.view(torch.float64),
        )

    def put(self, slots: Tensor, at: Tensor, values: Tensor) -> None:
        """Sets tokens (see `kernels.slots`)."""
        rows = slots.data_ptr(), at.data_ptr(), values.data_ptr(), len(values)
        self._put(*self._tokens, *rows)


def _gather(
    plan,
    seqs,
    decodes,
    count,
    sampled,
    width,
    tokens,
    length,
    num_slots,
    tables,
    groups,
    blocks,
    block_size,
    longs,
    ints,
):
    items = carray(plan, (3, seqs), np.int64)
    chosen = carray(plan, 3 * seqs + 2 * sampled, np.int64)[3 * seqs :]
    tokens = carray(tokens, (num_slots, length), np.int32)
    tables = carray(tables, (groups, num_slots, blocks), np.int32)
    longs = carray(longs, 2 * count + 4 * sampled, np.int64)
    of_rows, of_sampled = longs[: 2 * count], longs[2 * count :]
    marks, cells = 2 * seqs - decodes + 1, seqs * width
    ints = carray(ints, marks + groups * (cells + count), np.int32)
    context_lens, query_start, places = ints[:seqs], ints[seqs:marks], ints[marks:]
    row = done = 0
    for seq in range(seqs):
        slot, start = items[0, seq], items[1, seq]
        end = context_lens[seq] = start + items[2, seq]
        if seq >= decodes:
            query_start[seq - decodes] = row - decodes
        for group in range(groups):
            table, first = tables[group, slot], group * (cells + count)
            for block in range(width):
                places[first + seq * width + block] = table[block]
            for position in range(start, end):
                place = table[position // block_size] * block_size + position % block_size
                places[first + cells + row + position - start] = place
        for position in range(start, end):
            of_rows[row], of_rows[count + row] = tokens[slot, position], position
            row += 1
        if done < sampled and chosen[done] == seq:
            of_sampled[done], of_sampled[sampled + done] = row - 1, slot
            of_sampled[2 * sampled + done] = end
            of_sampled[3 * sampled + done] = chosen[sampled + done]
            done += 1
    query_start[seqs - decodes] = row - decodes


def _put(tokens, length, num_slots, slots, at, values, rows):
    tokens = carray(tokens, (num_slots, length), np.int32)
    slots, at = carray(slots, rows, np.int64), carray(at, rows, np.int64)
    values = carray(values, rows, np.int64)
    for row in range(rows):
        tokens[slots[row], at[row]] = values[row]


@cache
def _functions():
    """(gather, put), compiled or loaded from Numba's cache on disk.

    As ctypes functions they keep the interpreter lock, being so short.
    """
    address, integer = types.voidptr, types.int64
    kinds = {address: ctypes.c_void_p, integer: ctypes.c_int64}

    def compiled(function, *arguments):
        options = {"cache": True, "error_model": "numpy", "nopython": True}
        made = cfunc(types.void(*arguments), **options)(function)
        callee = ctypes.PYFUNCTYPE(None, *(kinds[kind] for kind in arguments))(made.address)
        callee.owner = made  # of the machine code
        return callee

    tokens, tables = (address, integer, integer), (address, *[integer] * 3)
    return (
        compiled(_gather, address, *[integer] * 5, *tokens, *tables, address, address),
        compiled(_put, *tokens, *[address] * 3, integer),
    )
