"""A whole decode step of a Llama-like decoder in one call, for few sequences on CPUs with
AVX512-BF16.

At one sequence every operation only reads its weights, and calling a hundred operations from Python
takes as long again. Here the threads of one team go through all layers together and wait for each
other where one phase needs the results of the one before:

    norm, q k v | rotate, store k v | attend | (combine) | output, += | norm, gate, up | down, += |

Tasks of a phase are panels of a matrix, or heads of a sequence. The stream between layers stays in
float32 and is rounded where it enters a product, so results differ from those of separate
operations by less than bfloat16 does.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from kernels import (
    cpu_attention,
    cpu_formats,
    cpu_kernels,
    cpu_linear,
    cpu_pages,
    cpu_simd,
    cpu_vectors,
)
from kernels.cpu_formats import BFLOAT16, load, load_row, store, store_row
from kernels.cpu_kernels import attend_tasks, combine_tasks
from kernels.cpu_linear import MOST_ROWS, PANEL, PackedLinear, add_bias, multiply_panel, panel_at
from kernels.cpu_pages import JOB as ATTENTION_JOB
from kernels.cpu_pages import RECORD as ATTENTION_RECORD
from kernels.cpu_pages import address, encode, helper, scratch
from kernels.cpu_simd import float_pointer, read_int32, take
from kernels.cpu_team import WORKER, fingerprint, openmp_function, run
from kernels.cpu_vectors import I64, LANES, LOG2E, const, exp2
from kernels.pages import Pages, QuantizedPages

PHASES = 5  # of a layer that take tasks from a counter of their own

_MATRICES = ("qkv", "qkv_bias", "output", "output_bias", "gate_up", "gate_up_bias", "down")
LAYER = np.dtype(
    [
        (name, np.int64)
        for name in (*_MATRICES, "down_bias", "attention_norm", "mlp_norm", "head_norm", "rotated")
    ]
)
_LAYER_RECORD = from_dtype(LAYER)
_SIZES = ("rows", "layers", "hidden", "inner", "heads", "kv_heads", "head_dim")
_ADDRESSES = (
    *("layer_table", "attention_jobs", "counters", "barrier", "stream", "qkv", "attended"),
    *("inner_rows", "cos", "sin", "norm", "out"),
)
JOB = np.dtype([(name, np.int64) for name in (*_SIZES, *_ADDRESSES)] + [("eps", np.float64)])
_RECORD = from_dtype(JOB)


def serves(pages: Pages) -> bool:
    """Whether pages are of a format that the step writes, and there is a team that can wait."""
    known = isinstance(pages, QuantizedPages) or pages.dtype == torch.bfloat16
    return known and openmp_function("GOMP_barrier") is not None


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

    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    attention_norm: Tensor
    mlp_norm: Tensor
    head_norm: Tensor | None
    rotated: bool
    scale: float
    window: int


class DecodeStep:
    """The layers of one model over the pages of one cache.

    Args:
        layers: all of them, in order
        norm: float32 [hidden], of the last norm; `eps` is that of every norm
        cos, sin: float32 [positions, head_dim / 2]
        pages: of each layer
    """

    def __init__(
        self,
        layers: list[StepLayer],
        norm: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        pages: tuple[Pages, ...],
    ):
        self._owners = layers, norm, cos, sin, pages
        hidden, inner = layers[0].output.outputs, layers[0].down.inputs
        count, bf16 = len(layers), torch.bfloat16
        self._hidden = hidden
        self._stream = torch.empty(MOST_ROWS, hidden)
        self._qkv = torch.empty(MOST_ROWS, layers[0].qkv.outputs, dtype=bf16)
        self._attended = torch.empty(MOST_ROWS, layers[0].output.inputs, dtype=bf16)
        self._inner = torch.empty(MOST_ROWS, inner, dtype=bf16)
        self._marks = torch.empty(2, MOST_ROWS + 1, dtype=torch.int32)
        self._partial = torch.empty(0)
        self._counters = np.zeros((count * PHASES + 1, 8), np.int64)  # each on a line of its own
        self._layers = np.zeros(count, LAYER)
        self._jobs = np.zeros(2 * count, ATTENTION_JOB)  # attend, then combine
        self._attend, self._combine = self._jobs[:count], self._jobs[count:]
        for index, layer in enumerate(layers):
            self._fill(self._layers[index], layer)
            for jobs in (self._attend, self._combine):
                self._fill_attention(jobs[index : index + 1], layer, pages[index], heads)
        job = self._job = np.zeros((), JOB)
        job["layers"], job["hidden"], job["inner"] = count, hidden, inner
        job["heads"], job["kv_heads"] = heads, self._attend[0]["kv_heads"]
        job["head_dim"] = self._attend[0]["head_dim"]
        job["layer_table"], job["attention_jobs"] = self._layers.ctypes.data, self._jobs.ctypes.data
        job["counters"] = self._counters.ctypes.data
        job["stream"], job["qkv"] = self._stream.data_ptr(), self._qkv.data_ptr()
        job["attended"], job["inner_rows"] = self._attended.data_ptr(), self._inner.data_ptr()
        job["cos"], job["sin"], job["norm"] = cos.data_ptr(), sin.data_ptr(), norm.data_ptr()
        job["eps"] = eps
        job["barrier"] = ctypes.cast(openmp_function("GOMP_barrier"), ctypes.c_void_p).value
        self._worker, self._plan = _worker(), cpu_attention.plan_worker()

    @staticmethod
    def _fill(record: np.ndarray, layer: StepLayer) -> None:
        for name in ("qkv", "output", "gate_up", "down"):
            linear: PackedLinear = getattr(layer, name)
            record[name], record[f"{name}_bias"] = linear.panels, linear.bias
        record["attention_norm"] = layer.attention_norm.data_ptr()
        record["mlp_norm"] = layer.mlp_norm.data_ptr()
        record["head_norm"] = 0 if layer.head_norm is None else layer.head_norm.data_ptr()
        record["rotated"] = layer.rotated

    def _fill_attention(
        self, record: np.ndarray, layer: StepLayer, pages: Pages, heads: int
    ) -> None:
        fields = cpu_attention.page_fields(pages) | {
            "address": record.ctypes.data,
            "heads": heads,
            "window": layer.window,
            "scale": layer.scale,
            "query": self._qkv.data_ptr(),
            "query_format": BFLOAT16,
            "query_stride": self._qkv.stride(0),
            "source_format": BFLOAT16,
            "out": self._attended.data_ptr(),
            "out_stride": self._attended.stride(0),
            "first_task": self._marks.data_ptr(),
            "first_row": self._marks[1].data_ptr(),
        }
        for name, value in fields.items():
            record[name] = value

    def __call__(
        self,
        embedded: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """One token of every sequence.

        Args:
            embedded: bfloat16 [rows, hidden], rows at most MOST_ROWS
            context_lens: int32 [rows], the new token included
            block_tables: int32 [rows, max_blocks]
            slot_mapping: int32 [rows]

        Returns:
            bfloat16 [rows, hidden], behind the last norm
        """
        rows = len(embedded)
        self._stream[:rows] = embedded
        out = torch.empty(rows, self._hidden, dtype=torch.bfloat16)
        jobs, job = self._jobs, self._job
        jobs["next"] = 0
        jobs["seqs"], jobs["max_blocks"] = rows, block_tables.stride(0)
        jobs["tables"], jobs["lens"] = block_tables.data_ptr(), context_lens.data_ptr()
        jobs["slots"] = slot_mapping.data_ptr()
        self._plan_attention()
        self._counters[:] = 0
        job["rows"], job["out"] = rows, out.data_ptr()
        run(self._worker, job, torch.get_num_threads())
        return out

    def _plan_attention(self) -> None:
        """Counts tasks and partial results, which are the same in every layer."""
        first = self._attend[:1]
        self._plan(first.ctypes.data)
        tasks, rows = int(first["tasks"][0]), int(first["rows"][0])
        width = cpu_attention.partial_width(int(first["head_dim"][0]))
        if len(self._partial) < rows:
            self._partial = torch.empty(rows, width)
        self._jobs["tasks"], self._jobs["rows"] = tasks, rows
        self._jobs["partial"] = self._partial.data_ptr()


@cache
def _worker():
    """The compiled C function, or the one from Numba's cache on disk."""
    modules = cpu_vectors, cpu_formats, cpu_simd, cpu_pages, cpu_kernels, cpu_linear
    primitives = fingerprint(*modules)

    @cfunc(types.void(types.CPointer(_RECORD)), cache=True, error_model="numpy", nopython=True)
    def step(pointer):
        len(primitives)  # makes it part of the key of the cache
        _step(carray(pointer, 1)[0])

    return WORKER(step.address)


@helper
def _step(job):
    hidden, rows = job.hidden, job.rows
    width = (job.heads + 2 * job.kv_heads) * job.head_dim
    normed, line = np.empty(rows * hidden, np.uint16), scratch(max(hidden, job.head_dim))
    sums, turned = scratch(2 * MOST_ROWS * PANEL), scratch(job.head_dim)
    x = normed.ctypes.data
    for index in range(job.layers):
        layer = _layer_at(job, index)
        counter = job.counters + index * PHASES * 64
        _normalize(job, layer.attention_norm, x, line)
        _product(job, counter, x, hidden, layer.qkv, layer.qkv_bias, width, job.qkv, 0, sums)
        wait_for_team(job.barrier)
        _turn_and_store(job, layer, _attention_at(job, index), counter + 64, line, turned)
        wait_for_team(job.barrier)
        _attend(job, index)
        depth = job.heads * job.head_dim
        source, panels, bias = job.attended, layer.output, layer.output_bias
        _product(job, counter + 128, source, depth, panels, bias, hidden, 0, job.stream, sums)
        wait_for_team(job.barrier)
        _normalize(job, layer.mlp_norm, x, line)
        _gated_product(job, counter + 192, x, layer, sums)
        wait_for_team(job.barrier)
        source, panels, bias = job.inner_rows, layer.down, layer.down_bias
        _product(job, counter + 256, source, job.inner, panels, bias, hidden, 0, job.stream, sums)
        wait_for_team(job.barrier)
    while True:  # the last counter of all
        row = take(job.counters + job.layers * PHASES * 64)
        if row >= rows:
            break
        _normalize_row(job, job.norm, row, job.out + row * hidden * 2, line)
    normed[0] = 0  # Numba frees an array after the last use of its name, and `x` is another


@helper
def _layer_at(job, index):
    return carray(_layer_pointer(job.layer_table), job.layers)[index]


@helper
def _attention_at(job, index):
    return carray(_attention_pointer(job.attention_jobs), 2 * job.layers)[index]


@helper
def _normalize(job, weight, target, line):
    """Rows of the stream, normalized, as bfloat16 [rows, hidden] at `target`."""
    for row in range(job.rows):
        _normalize_row(job, weight, row, target + row * job.hidden * 2, line)


@helper
def _normalize_row(job, weight, row, target, line):
    hidden = job.hidden
    numbers = carray(float_pointer(job.stream + row * hidden * 4), hidden)
    scale = carray(float_pointer(weight), hidden)
    _scale_to_unit(line, numbers, scale, hidden, job.eps)
    store_row(BFLOAT16, address(line, 0), target, hidden, np.float32(1))


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
def _product(job, counter, x, depth, panels, bias, outputs, out, stream, sums):
    """x [rows, depth] @ matrix + bias, stored as bfloat16 at `out`, or added to the stream."""
    pairs = depth // 2
    while True:
        task = take(counter)
        if task >= outputs // PANEL:
            return
        multiply_panel(job.rows, x, depth, panel_at(panels, task, pairs), pairs, sums)
        add_bias(sums, job.rows, bias, task)
        for r in range(job.rows):
            place = r * outputs + task * PANEL
            if out:
                store_row(BFLOAT16, address(sums, r * PANEL), out + place * 2, PANEL, np.float32(1))
            else:
                target = carray(float_pointer(stream + place * 4), PANEL)
                for i in range(PANEL):
                    target[i] += sums[r * PANEL + i]


@helper
def _gated_product(job, counter, x, layer, sums):
    """silu(x @ gate) * (x @ up), as bfloat16 [rows, inner]."""
    pairs, panels = job.hidden // 2, job.inner // PANEL
    gates, ups = sums[: MOST_ROWS * PANEL], sums[MOST_ROWS * PANEL :]
    while True:
        task = take(counter)
        if task >= panels:
            return
        for part, first in ((gates, 0), (ups, panels)):
            panel = panel_at(layer.gate_up, first + task, pairs)
            multiply_panel(job.rows, x, job.hidden, panel, pairs, part)
            add_bias(part, job.rows, layer.gate_up_bias, first + task)
        silu_times(address(gates, 0), address(ups, 0), job.rows * PANEL // LANES)
        for r in range(job.rows):
            target = job.inner_rows + (r * job.inner + task * PANEL) * 2
            store_row(BFLOAT16, address(gates, r * PANEL), target, PANEL, np.float32(1))


@helper
def _turn_and_store(job, layer, attention, counter, line, turned):
    """Turns the queries and keys of the new tokens, and stores keys and values in their blocks.
    A task is one K/V head of one sequence, with its query heads."""
    group, dim = job.heads // job.kv_heads, job.head_dim
    width = (job.heads + 2 * job.kv_heads) * dim
    codes = scratch((dim + LANES - 1) // LANES * LANES)
    while True:
        task = take(counter)
        if task >= job.rows * job.kv_heads:
            return
        row, head = task // job.kv_heads, task % job.kv_heads
        base, key_head = job.qkv + row * width * 2, job.heads + head
        key = base + key_head * dim * 2
        if layer.rotated or layer.head_norm:
            position = read_int32(attention.lens, row) - 1
            for query_head in range(head * group, (head + 1) * group):
                query = base + query_head * dim * 2
                _turn(job, layer, query, query_head, position, line, turned)
            _turn(job, layer, key, key_head, position, line, turned)
        slot = read_int32(attention.slots, row)
        block, offset = slot // attention.block_size, slot % attention.block_size
        tile = attention.pages + (block * job.kv_heads + head) * attention.tile_bytes
        encode(attention, key, tile, offset, codes)
        value = key + job.kv_heads * dim * 2
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
def _attend(job, index):
    attend_tasks(_attention_at(job, index))
    wait_for_team(job.barrier)
    partial = _attention_at(job, job.layers + index)
    if partial.rows:
        combine_tasks(partial)
        wait_for_team(job.barrier)


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
def wait_for_team(typingctx, barrier):
    """Calls `void barrier(void)`: returns when every thread of the team has called it."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), []).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [])
        return context.get_dummy_value()

    return types.none(types.int64), codegen


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
