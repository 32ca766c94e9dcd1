"""All layers of a Llama-like decoder in one call, on CPUs with AVX512-BF16.

At one sequence every operation only reads its weights, and calling a hundred operations from Python
takes as long again. Here one thread looks the tokens up and plans, then the threads of one team go
through all layers together, in one of two ways:

    few rows    every thread works on all rows and takes panels of a matrix:
                norm, q k v | rotate, store k v | attend | output, += | norm, gate, up | down, += |
    many rows   every thread takes blocks of rows and all matrices, which come from a cache:
                norm, q k v, rotate, store k v | attend | output, +=, norm, gate, up, down, += ..

At each | all tasks of the phase are done before the next begins (`cpu_phase`). The second way ends
a layer and begins the next one in the same phase; the last one it ends only for the rows whose
results are wanted. The stream between layers stays in float32 and is rounded where it enters a
product, so results differ from those of separate operations by less than bfloat16 does; a row's
result does not depend on the rows beside it, nor on the way.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from kernels import (
    cpu_attention,
    cpu_formats,
    cpu_int8,
    cpu_kernels,
    cpu_linear,
    cpu_pages,
    cpu_pair_attention,
    cpu_pairs,
    cpu_phase,
    cpu_queries,
    cpu_simd,
    cpu_vectors,
)
from kernels.cpu_formats import BFLOAT16, load, load_row, store, store_row
from kernels.cpu_int8 import Int8Linear, int8_panel_at, multiply_int8_panel, scale_sums
from kernels.cpu_kernels import attend_tasks, combine_tasks, plan_tasks
from kernels.cpu_linear import MOST_ROWS, PANEL, PackedLinear, add_bias, multiply_panel, panel_at
from kernels.cpu_pages import JOB as ATTENTION_JOB
from kernels.cpu_pages import RECORD as ATTENTION_RECORD
from kernels.cpu_pages import address, encode, helper, scratch
from kernels.cpu_phase import PHASE_BYTES, meet
from kernels.cpu_simd import copy_bytes, float_pointer, long_pointer, read_int32, take
from kernels.cpu_team import WORKER, fingerprint, run
from kernels.cpu_vectors import I64, LANES, LOG2E, const, exp2
from kernels.pages import Pages, QuantizedPages

FEW_ROWS = 24
"""Rows up to which threads share panels: reading the weights takes longer than using them."""
PHASES = 7  # of a layer, the most that either way has

_MATRICES = ("qkv", "output", "gate_up", "down")
# The panels are bfloat16 (`cpu_linear`) where the scales are 0, else int8 (`cpu_int8`).
MATRIX = np.dtype([(name, np.int64) for name in ("panels", "scales", "bias")])
LAYER = np.dtype(
    [(name, MATRIX) for name in _MATRICES]
    + [(name, np.int64) for name in ("attention_norm", "mlp_norm", "head_norm", "rotated")]
)
_LAYER_RECORD = from_dtype(LAYER)
_SIZES = ("layers", "hidden", "inner", "heads", "kv_heads", "head_dim")
_ADDRESSES = (
    *("layer_table", "attention_jobs", "counters", "give_way", "stream", "qkv", "attended"),
    *("inner_rows", "embedding", "cos", "sin", "norm"),
)
# What is new in each call; the step itself sets partial_rows.
_SIZES_OF_CALL = (
    *("rows", "block_rows", "results", "result_rows"),
    *("threads", "seqs", "max_blocks", "partial_rows"),
)
_ADDRESSES_OF_CALL = (
    *("token_ids", "positions", "lens", "tables", "slots", "starts", "wanted", "out"),
)
_INTEGERS = (*_SIZES, *_ADDRESSES, *_SIZES_OF_CALL, *_ADDRESSES_OF_CALL)


class Job(ctypes.Structure):
    """A call as the compiled code sees it. Python sets a field of it in a tenth of the time that
    one of a NumPy record takes."""

    _fields_ = [*((name, ctypes.c_int64) for name in _INTEGERS), ("eps", ctypes.c_double)]


JOB = np.dtype(Job)
_RECORD = from_dtype(JOB)


def serves(pages: Pages) -> bool:
    """Whether pages are of a format that the step writes."""
    return isinstance(pages, QuantizedPages) or pages.dtype == torch.bfloat16


@dataclass(frozen=True)
class StepLayer:
    """One layer, as the step reads it.

    Attributes:
        qkv, output, gate_up, down: `gate_up` holds all gate outputs, then all up outputs
        attention_norm, mlp_norm: float32 [hidden]
        head_norm: float32 [heads + kv_heads, head_dim], or None
        rotated: whether queries and keys turn with their position
        scale, window: of the attention (`kernels.reference`)
    """

    qkv: PackedLinear | Int8Linear
    output: PackedLinear | Int8Linear
    gate_up: PackedLinear | Int8Linear
    down: PackedLinear | Int8Linear
    attention_norm: Tensor
    mlp_norm: Tensor
    head_norm: Tensor | None
    rotated: bool
    scale: float
    window: int


class Step:
    """The layers of one model over the pages of one cache.

    Args:
        embedding: bfloat16 [entries, hidden]
        layers: all of them, in order
        norm: float32 [hidden], of the last norm; `eps` is that of every norm
        cos, sin: float32 [positions, head_dim / 2]
        pages: of each layer
    """

    def __init__(
        self,
        embedding: Tensor,
        layers: list[StepLayer],
        norm: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        pages: tuple[Pages, ...],
    ):
        self._owners = embedding, layers, norm, cos, sin, pages
        count, first = len(layers), layers[0]
        self._hidden, self._width = first.output.outputs, first.qkv.outputs
        self._depth, inner = first.output.inputs, first.down.inputs
        self._inner = torch.empty(FEW_ROWS, inner, dtype=torch.bfloat16)
        self._counters = cpu_phase.phases(count * PHASES + 1)
        self._layers = np.zeros(count, LAYER)
        self._jobs = np.zeros(2 * count, ATTENTION_JOB)  # attend, then combine
        for index, layer in enumerate(layers):
            _fill(self._layers[index], layer)
            for at in (index, count + index):
                _fill_attention(self._jobs[at : at + 1], layer, pages[index], heads)
        self._record = np.zeros((), JOB)
        job = self._job = Job.from_buffer(self._record)
        job.layers, job.hidden, job.inner = count, self._hidden, inner
        job.heads, job.kv_heads = heads, int(self._jobs[0]["kv_heads"])
        job.head_dim = int(self._jobs[0]["head_dim"])
        job.layer_table, job.attention_jobs = self._layers.ctypes.data, self._jobs.ctypes.data
        job.counters, job.give_way = self._counters.ctypes.data, cpu_phase.give_way()
        job.inner_rows, job.embedding, job.eps = self._inner.data_ptr(), embedding.data_ptr(), eps
        job.cos, job.sin, job.norm = cos.data_ptr(), sin.data_ptr(), norm.data_ptr()
        self._address = self._record.ctypes.data
        self._rows = self._seqs = self._partial_rows = -1
        self._begin, self._worker = _workers()

    def _reserve(self, rows: int, seqs: int) -> None:
        """Makes what lies between phases at least so large; the largest step decides."""
        job, jobs = self._job, self._jobs
        if rows > self._rows:
            self._rows = max(rows, MOST_ROWS)
            self._stream = torch.empty(self._rows, self._hidden)
            self._qkv = torch.empty(self._rows, self._width, dtype=torch.bfloat16)
            self._attended = torch.empty(self._rows, self._depth, dtype=torch.bfloat16)
            job.stream, job.qkv = self._stream.data_ptr(), self._qkv.data_ptr()
            job.attended = self._attended.data_ptr()
            jobs["query"], jobs["query_stride"] = job.qkv, self._width
            jobs["out"], jobs["out_stride"] = job.attended, self._depth
        if seqs > self._seqs:
            self._seqs = max(seqs, MOST_ROWS)
            self._marks = torch.empty(2, self._seqs + 1, dtype=torch.int32)
            jobs["first_task"], jobs["first_row"] = (line.data_ptr() for line in self._marks)

    def _reserve_partial(self, rows: int) -> None:
        """The same for partial results of attention."""
        if rows > self._partial_rows:
            self._partial_rows = rows
            self._partial = torch.empty(rows, cpu_attention.partial_width(self._job.head_dim))
            self._jobs["partial"] = self._partial.data_ptr()

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        slot_mapping: Tensor,
        starts: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """New tokens of some sequences.

        Args:
            token_ids: int64 [rows]
            positions: int64 [rows]
            context_lens: int32 [seqs], the new tokens included
            block_tables: int32 [seqs, max_blocks]
            slot_mapping: int32 [rows]; -1 stores nothing
            starts: int32 [seqs + 1], first row of each sequence; without, each has one row
            wanted: int64 [results], rows whose results are asked for; without, all

        Returns:
            bfloat16 [results, hidden], behind the last norm
        """
        job, rows, threads = self._job, len(token_ids), torch.get_num_threads()
        self._reserve(rows, len(context_lens))
        results = rows if wanted is None else len(wanted)
        out = torch.empty(results, self._hidden, dtype=torch.bfloat16)
        job.results, job.result_rows = results, _share(results, threads)
        job.rows, job.block_rows, job.threads = rows, _block_rows(rows, threads), threads
        job.seqs, job.max_blocks = len(context_lens), block_tables.stride(0)
        job.token_ids, job.positions = token_ids.data_ptr(), positions.data_ptr()
        job.lens, job.tables = context_lens.data_ptr(), block_tables.data_ptr()
        job.slots, job.out = slot_mapping.data_ptr(), out.data_ptr()
        job.starts = 0 if starts is None else starts.data_ptr()
        job.wanted = 0 if wanted is None else wanted.data_ptr()
        self._begin(self._address)
        self._reserve_partial(job.partial_rows)
        run(self._worker, self._record, threads)
        return out


def _block_rows(rows: int, threads: int) -> int:
    """Rows that a thread takes at a time; 0 where the threads share panels instead."""
    return 0 if rows <= FEW_ROWS else _share(rows, threads)


def _share(rows: int, threads: int) -> int:
    """Rows of a block, at most MOST_ROWS, of which all threads take about as many."""
    shares = threads * max(1, -(-rows // (threads * MOST_ROWS)))
    return -(-rows // shares)


def _fill(record: np.ndarray, layer: StepLayer) -> None:
    for name in _MATRICES:
        linear: PackedLinear | Int8Linear = getattr(layer, name)
        record[name] = linear.panels, linear.scales, linear.bias
    record["attention_norm"] = layer.attention_norm.data_ptr()
    record["mlp_norm"] = layer.mlp_norm.data_ptr()
    record["head_norm"] = 0 if layer.head_norm is None else layer.head_norm.data_ptr()
    record["rotated"] = layer.rotated


def _fill_attention(record: np.ndarray, layer: StepLayer, pages: Pages, heads: int) -> None:
    fields = cpu_attention.page_fields(pages) | {
        "address": record.ctypes.data,
        "heads": heads,
        "window": layer.window,
        "scale": layer.scale,
        "query_format": BFLOAT16,
        "source_format": BFLOAT16,
        "pairs": cpu_attention.pairs_fit(pages, torch.bfloat16),
    }
    for name, value in fields.items():
        record[name] = value


@cache
def _workers():
    """The compiled C functions begin and step, or those from Numba's cache on disk."""
    numbers = cpu_vectors, cpu_formats, cpu_simd, cpu_pairs, cpu_phase
    modules = cpu_pages, cpu_queries, cpu_kernels, cpu_pair_attention, cpu_linear, cpu_int8
    primitives = fingerprint(*numbers, *modules)
    options = {"cache": True, "error_model": "numpy", "nopython": True}

    @cfunc(types.void(types.CPointer(_RECORD)), **options)
    def begin(pointer):
        len(primitives)  # makes it part of the key of the cache
        _begin(carray(pointer, 1)[0])

    @cfunc(types.void(types.CPointer(_RECORD)), **options)
    def step(pointer):
        len(primitives)
        job = carray(pointer, 1)[0]
        if job.block_rows == 0:
            _share_panels(job)
        else:
            _share_rows(job)

    return WORKER(begin.address), WORKER(step.address)


@helper
def _begin(job):
    """What one thread does first: the rows of the embedding, counters, and the attention of each
    layer, whose tasks and partial results are the same in all of them."""
    token_ids = carray(long_pointer(job.token_ids), job.rows)
    for row in range(job.rows):
        source = job.embedding + token_ids[row] * job.hidden * 2
        load_row(BFLOAT16, source, job.stream + row * job.hidden * 4, job.hidden, np.float32(1))
    carray(long_pointer(job.counters), (job.layers * PHASES + 1) * PHASE_BYTES // 8)[:] = 0
    for index in range(2 * job.layers):
        attention, first = _attention_at(job, index), _attention_at(job, 0)
        attention.next, attention.threads = 0, job.threads
        attention.seqs, attention.max_blocks = job.seqs, job.max_blocks
        attention.tables, attention.lens = job.tables, job.lens
        attention.slots, attention.starts = job.slots, job.starts
        if index == 0:
            plan_tasks(attention)
        attention.tasks, attention.rows = first.tasks, first.rows
    job.partial_rows = first.rows


@helper
def _share_panels(job):
    """All layers for few rows."""
    hidden, rows = job.hidden, job.rows
    width = (job.heads + 2 * job.kv_heads) * job.head_dim
    normed, sums, turning = _normed(job, rows), scratch(2 * rows * PANEL), _turning(job)
    line = scratch(hidden)
    x = address(normed, 0)
    for index in range(job.layers):
        layer, attention = _layer_at(job, index), _attention_at(job, index)
        phase = job.counters + index * PHASES * PHASE_BYTES
        _normalize(job, layer.attention_norm, job.stream, rows, x, line)
        done = 0
        while True:
            task = take(phase)
            if task >= width // PANEL:
                break
            _multiply(rows, x, hidden, layer.qkv, task, sums)
            _write(rows, sums, job.qkv, width, task)
            done += 1
        meet(phase, done, width // PANEL, job.give_way)
        phase += PHASE_BYTES
        done = 0
        while True:
            task = take(phase)
            if task >= rows * job.kv_heads:
                break
            row, head = task // job.kv_heads, task % job.kv_heads
            _turn_and_store(job, layer, attention, row, head, turning)
            done += 1
        meet(phase, done, rows * job.kv_heads, job.give_way)
        phase = _attend(job, index, phase + PHASE_BYTES)
        depth = job.heads * job.head_dim
        matrix = layer.output
        done = _add_product(job, phase, job.attended, depth, matrix, sums)
        meet(phase, done, hidden // PANEL, job.give_way)
        phase += PHASE_BYTES
        _normalize(job, layer.mlp_norm, job.stream, rows, x, line)
        done = 0
        while True:
            task = take(phase)
            if task >= job.inner // PANEL:
                break
            _multiply_gated(job, layer, rows, x, task, job.inner_rows, sums)
            done += 1
        meet(phase, done, job.inner // PANEL, job.give_way)
        phase += PHASE_BYTES
        matrix = layer.down
        done = _add_product(job, phase, job.inner_rows, job.inner, matrix, sums)
        meet(phase, done, hidden // PANEL, job.give_way)
    while True:
        result = take(job.counters + job.layers * PHASES * PHASE_BYTES)
        if result >= job.results:
            break
        stream = job.stream + _row_of(job, result) * hidden * 4
        _normalize(job, job.norm, stream, 1, job.out + result * hidden * 2, line)
    normed[0] = 0  # Numba frees an array after the last use of its name, and `x` is another


@helper
def _share_rows(job):
    """All layers for many rows: a block of them ends one layer and begins the next."""
    hidden, depth, rows, height = job.hidden, job.heads * job.head_dim, job.rows, job.block_rows
    blocks, tallest = (rows + height - 1) // height, max(height, job.result_rows)
    normed, sums, turning = _normed(job, tallest), scratch(2 * tallest * PANEL), _turning(job)
    inner, line = np.empty(tallest * job.inner, np.uint16), scratch(hidden)
    x = address(normed, 0)
    for index in range(job.layers):
        phase, done = job.counters + index * PHASES * PHASE_BYTES, 0
        while True:
            first = take(phase) * height
            if first >= rows:
                break
            end = min(first + height, rows)
            if index > 0:
                source, stream = job.attended + first * depth * 2, job.stream + first * hidden * 4
                layer = _layer_at(job, index - 1)
                _end_layer(job, layer, end - first, source, stream, x, inner, sums, line)
            _begin_layer(job, index, first, end, x, sums, line, turning)
            done += 1
        meet(phase, done, blocks, job.give_way)
        _attend(job, index, phase + PHASE_BYTES)
    _finish(job, x, inner, sums, line)
    normed[0], inner[0] = 0, 0  # as above


@helper
def _finish(job, x, inner, sums, line):
    """The last layer behind attention, and the last norm, of the rows that are wanted."""
    hidden, depth, height = job.hidden, job.heads * job.head_dim, job.result_rows
    attended, numbers = scratch((height * depth + 1) // 2), scratch(height * hidden)
    source, stream = address(attended, 0), address(numbers, 0)
    layer = _layer_at(job, job.layers - 1)
    while True:
        first = take(job.counters + job.layers * PHASES * PHASE_BYTES) * height
        if first >= job.results:
            break
        rows = min(height, job.results - first)
        for r in range(rows):
            row = _row_of(job, first + r)
            copy_bytes(source + r * depth * 2, job.attended + row * depth * 2, depth * 2)
            copy_bytes(stream + r * hidden * 4, job.stream + row * hidden * 4, hidden * 4)
        _end_layer(job, layer, rows, source, stream, x, inner, sums, line)
        _normalize(job, job.norm, stream, rows, job.out + first * hidden * 2, line)
    attended[:1], numbers[:1] = 0, 0  # as above


@helper
def _row_of(job, result):
    """The row whose result is the `result`-th wanted one."""
    if job.wanted:
        return carray(long_pointer(job.wanted), job.results)[result]
    return result


@helper
def _begin_layer(job, index, first, end, x, sums, line, turning):
    """Rows [first, end) up to their queries, and their keys and values in the blocks."""
    layer, attention = _layer_at(job, index), _attention_at(job, index)
    hidden, rows = job.hidden, end - first
    width = (job.heads + 2 * job.kv_heads) * job.head_dim
    _normalize(job, layer.attention_norm, job.stream + first * hidden * 4, rows, x, line)
    target = job.qkv + first * width * 2
    for panel in range(width // PANEL):
        _multiply(rows, x, hidden, layer.qkv, panel, sums)
        _write(rows, sums, target, width, panel)
    for row in range(first, end):
        for head in range(job.kv_heads):
            _turn_and_store(job, layer, attention, row, head, turning)


@helper
def _end_layer(job, layer, rows, source, stream, x, inner, sums, line):
    """Rows of the stream, float32 [rows, hidden], from the results of attention, bfloat16
    [rows, heads * head_dim] at `source`, to the next layer."""
    hidden, depth = job.hidden, job.heads * job.head_dim
    for panel in range(hidden // PANEL):
        _multiply(rows, source, depth, layer.output, panel, sums)
        _add(rows, sums, stream, hidden, panel)
    _normalize(job, layer.mlp_norm, stream, rows, x, line)
    source = inner.ctypes.data
    for panel in range(job.inner // PANEL):
        _multiply_gated(job, layer, rows, x, panel, source, sums)
    for panel in range(hidden // PANEL):
        _multiply(rows, source, job.inner, layer.down, panel, sums)
        _add(rows, sums, stream, hidden, panel)


@helper
def _normed(job, rows):
    """Scratch for bfloat16 [rows, hidden], as float32 numbers of twice the size."""
    return scratch((rows * job.hidden + 1) // 2)


@helper
def _turning(job):
    """Scratch for one head: as read, turned, and as codes."""
    return scratch(3 * ((job.head_dim + LANES - 1) // LANES * LANES))


@helper
def _layer_at(job, index):
    return carray(_layer_pointer(job.layer_table), job.layers)[index]


@helper
def _attention_at(job, index):
    return carray(_attention_pointer(job.attention_jobs), 2 * job.layers)[index]


@helper
def _normalize(job, weight, stream, rows, target, line):
    """Rows of the stream, float32 [rows, hidden], normalized, as bfloat16 at `target`."""
    hidden = job.hidden
    scale = carray(float_pointer(weight), hidden)
    for row in range(rows):
        numbers = carray(float_pointer(stream + row * hidden * 4), hidden)
        _scale_to_unit(line, numbers, scale, hidden, job.eps)
        place = target + row * hidden * 2
        store_row(BFLOAT16, address(line, 0), place, hidden, np.float32(1))


@helper
def _scale_to_unit(out, numbers, scale, count, eps):
    """out = numbers / root mean square * scale"""
    total = np.float32(0)
    for i in range(count):
        total += numbers[i] * numbers[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(count) + np.float32(eps))
    for i in range(count):
        out[i] = numbers[i] * factor * scale[i]


@helper
def _multiply(rows, x, depth, matrix, index, sums):
    """sums [rows, 64] = x [rows, depth] @ one panel + its bias"""
    pairs = depth // 2
    if matrix.scales:
        panel = int8_panel_at(matrix.panels, index, pairs)
        multiply_int8_panel(rows, x, depth, panel, pairs, sums)
        scale_sums(sums, rows, matrix.scales, index)
    else:
        multiply_panel(rows, x, depth, panel_at(matrix.panels, index, pairs), pairs, sums)
    add_bias(sums, rows, matrix.bias, index)


@helper
def _write(rows, sums, out, outputs, panel):
    """Sums of one panel as bfloat16 into [rows, outputs] at `out`."""
    for r in range(rows):
        target = out + (r * outputs + panel * PANEL) * 2
        store_row(BFLOAT16, address(sums, r * PANEL), target, PANEL, np.float32(1))


@helper
def _add(rows, sums, stream, outputs, panel):
    """Adds sums of one panel to float32 [rows, outputs] at `stream`."""
    for r in range(rows):
        target = carray(float_pointer(stream + (r * outputs + panel * PANEL) * 4), PANEL)
        for i in range(PANEL):
            target[i] += sums[r * PANEL + i]


@helper
def _add_product(job, phase, x, depth, matrix, sums):
    """Adds x [rows, depth] @ matrix to the stream, panel by panel; how many were this thread's."""
    done = 0
    while True:
        task = take(phase)
        if task >= job.hidden // PANEL:
            return done
        _multiply(job.rows, x, depth, matrix, task, sums)
        _add(job.rows, sums, job.stream, job.hidden, task)
        done += 1


@helper
def _multiply_gated(job, layer, rows, x, panel, target, sums):
    """One panel of silu(x @ gate) * (x @ up), as bfloat16 into [rows, inner] at `target`."""
    gates, ups = sums[: rows * PANEL], sums[rows * PANEL :]
    matrix, second = layer.gate_up, job.inner // PANEL
    _multiply(rows, x, job.hidden, matrix, panel, gates)
    _multiply(rows, x, job.hidden, matrix, second + panel, ups)
    silu_times(address(gates, 0), address(ups, 0), rows * PANEL // LANES)
    _write(rows, gates, target, job.inner, panel)


@helper
def _turn_and_store(job, layer, attention, row, head, turning):
    """Turns the queries and keys of one token and one K/V head, and stores its key and value."""
    group, dim = job.heads // job.kv_heads, job.head_dim
    width, size = (job.heads + 2 * job.kv_heads) * dim, len(turning) // 3
    base, key_head = job.qkv + row * width * 2, job.heads + head
    key = base + key_head * dim * 2
    if layer.rotated or layer.head_norm:
        position = carray(long_pointer(job.positions), job.rows)[row]
        line, turned = turning[:size], turning[size : 2 * size]
        for query_head in range(head * group, (head + 1) * group):
            query = base + query_head * dim * 2
            _turn(job, layer, query, query_head, position, line, turned)
        _turn(job, layer, key, key_head, position, line, turned)
    slot = read_int32(attention.slots, row)
    if slot >= 0:
        block, offset = slot // attention.block_size, slot % attention.block_size
        tile = attention.pages + (block * job.kv_heads + head) * attention.tile_bytes
        codes, value = turning[2 * size :], key + job.kv_heads * dim * 2
        encode(attention, key, tile, offset, codes)
        encode(attention, value, tile + attention.values, offset, codes)


@helper
def _turn(job, layer, place, head, position, line, turned):
    """Norm and rotation of one head, in place."""
    dim = job.head_dim
    load_row(BFLOAT16, place, address(line, 0), dim, np.float32(1))
    if layer.head_norm:
        scale = carray(float_pointer(layer.head_norm + head * dim * 4), dim)
        _scale_to_unit(line, line, scale, dim, job.eps)
    if not layer.rotated:
        store_row(BFLOAT16, address(line, 0), place, dim, np.float32(1))
        return
    half = dim // 2
    cos = carray(float_pointer(job.cos + position * half * 4), half)
    sin = carray(float_pointer(job.sin + position * half * 4), half)
    for i in range(half):
        turned[i] = line[i] * cos[i] - line[half + i] * sin[i]
    for i in range(half):
        turned[half + i] = line[half + i] * cos[i] + line[i] * sin[i]
    store_row(BFLOAT16, address(turned, 0), place, dim, np.float32(1))


@helper
def _attend(job, index, phase):
    """Attention of one layer by all threads, from `phase` on; the phase behind it."""
    attention, partial = _attention_at(job, index), _attention_at(job, job.layers + index)
    meet(phase, attend_tasks(attention), attention.tasks, job.give_way)
    phase += PHASE_BYTES
    if partial.rows:
        meet(phase, combine_tasks(partial), partial.seqs * job.kv_heads, job.give_way)
    return phase + PHASE_BYTES


@intrinsic
def silu_times(typingctx, gate, up, vectors):
    """gate = gate / (1 + e**-gate) * up in place, float32, `vectors` vectors of 16."""

    def codegen(context, builder, signature, args):
        gate, up, vectors = args
        one, zero = const(1.0), const(0.0)
        with cgutils.for_range(builder, vectors) as loop:
            index = builder.mul(loop.index, I64(LANES))
            value, factor = load(builder, gate, index), load(builder, up, index)
            negative = builder.fcmp_ordered("olt", value, zero)
            size = builder.select(negative, builder.fsub(zero, value), value)
            decay = exp2(builder, builder.fmul(size, const(-LOG2E)))  # e**-|gate|
            top = builder.fmul(builder.select(negative, decay, one), value)
            result = builder.fdiv(builder.fmul(top, factor), builder.fadd(one, decay))
            store(builder, result, gate, index)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i), codegen


@intrinsic
def _layer_pointer(typingctx, place):
    return _pointer_to(_LAYER_RECORD)


@intrinsic
def _attention_pointer(typingctx, place):
    return _pointer_to(ATTENTION_RECORD)


def _pointer_to(record):
    kind = types.CPointer(record)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64), codegen
