"""Compiles the Triton kernels ahead of time for GPUs that need not be there.

`python -m tests.kernels.aot` prints registers and spills of every kernel, shape and target.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import (
    copy_blocks,
    fused_layers,
    int8_linear,
    paged_decode,
    paged_prefill,
    reference,
    store_kv,
)
from kernels.decode_choices import derive
from kernels.pages import FORMATS, tile_bytes

TARGETS = (80, 90, 100)
SPILLS = (
    16  # bytes: ptxas stores so many of 56 registers, far below any limit, to fit more programs
)
KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
POINTERS = {
    **dict.fromkeys(("tables", "lens", "starts", "slots"), "*i32"),
    **dict.fromkeys(("partial", "stats", "scales", "weight", "cos", "sin"), "*fp32"),
    "codes": "*i8",
    **dict.fromkeys(("source", "target"), "*i64"),
}
ROWS = (
    *("query", "key", "value", "keys", "values", "out", "read", "write"),
    *("x", "bias", "residual", "gate_up", "qkv"),
)
ALIGNED = ("query_stride", "out_stride", "key_stride", "value_stride", "x_stride", "inputs")


@dataclass(frozen=True)
class Usage:
    """What ptxas says about one kernel: registers per thread, bytes spilled, shared bytes."""

    registers: int
    spilled: int
    shared: int


def compile_kernel(kernel, dtype: str, constants: dict, target: int, **options) -> Usage:
    """Compiles one kernel with the argument types of a real launch.

    Raises RuntimeError when ptxas refuses it.
    """
    names = kernel.arg_names
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _kind(name, dtype, constants.get("FORMAT", "plain"))
        if signature[name].startswith("*") or name in ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return _usage(compiled.asm["ptx"], target, compiled.metadata.shared)


def _kind(name: str, dtype: str, format: str) -> str:
    if name in POINTERS:
        return POINTERS[name]
    if name in ("keys", "values") and format != "plain":
        return "*u8"
    if name in ROWS:
        return f"*{dtype}"
    return "fp32" if name in ("scale", "eps") else "i32"


def _usage(ptx: str, target: int, shared: int) -> Usage:
    arch = re.search(r"\.target (\w+)", ptx)[1]
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = tools / ("ptxas-blackwell" if target >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool, "-v", "--gpu-name", arch, source, "-o", Path(folder, "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return Usage(int(re.search(r"Used (\d+) reg", done.stderr)[1]), sum(map(int, spills)), shared)


def decode(
    dtype, target, heads, kv_heads, dim, block, direct=False, window=0, softcap=0.0, format="plain"
):
    size = KINDS[dtype].itemsize * dim
    choice = derive(dim, size if format == "plain" else tile_bytes(format, block, dim) // block)
    shape = paged_decode.decode_shape(heads, kv_heads, dim)
    constants = _constants(shape, dtype, block, window, softcap, format)
    constants |= {"DIRECT": direct, "TILE": choice.tile}
    options = {"num_warps": choice.warps, "num_stages": choice.stages}
    return compile_kernel(paged_decode.decode_kernel, dtype, constants, target, **options)


def prefill(
    dtype, target, heads, kv_heads, dim, block, queries, window=0, softcap=0.0, format="plain"
):
    shape = paged_prefill.prefill_shape(heads, kv_heads, dim, queries, target // 10)
    options = {name: shape.pop(name) for name in ("num_warps", "num_stages")}
    constants = _constants(shape, dtype, block, window, softcap, format)
    return compile_kernel(paged_prefill.prefill_kernel, dtype, constants, target, **options)


def reduce(dtype, target, dim):
    constants = {"DIM": dim, "DIM_PAD": triton.next_power_of_2(dim), "TILE": 64, "WINDOW": 0}
    constants["SPLITS"] = paged_decode.TILE_REDUCE
    return compile_kernel(paged_decode.reduce_kernel, dtype, constants, target, num_warps=4)


def store(dtype, target, kv_heads, dim, block, format="plain"):
    constants = {
        "FORMAT": format,
        "BLOCK_SIZE": block,
        "DIM": dim,
        "DIM_PAD": triton.next_power_of_2(dim),
    }
    constants["HEADS_PAD"] = triton.next_power_of_2(kv_heads)
    return compile_kernel(store_kv.store_kernel, dtype, constants, target, num_warps=4)


def add_norm(dtype, target, size):
    padded = triton.next_power_of_2(size)
    constants, warps = {"SIZE": size, "SIZE_PAD": padded}, fused_layers.norm_warps(padded)
    return compile_kernel(fused_layers.add_norm_kernel, dtype, constants, target, num_warps=warps)


def gated(dtype, target, activation):
    constants = {"INNER": 3072, "COLUMNS": fused_layers.COLUMNS, "ACTIVATION": activation}
    return compile_kernel(fused_layers.gated_kernel, dtype, constants, target, num_warps=4)


def turn_store(dtype, target, heads, kv_heads, dim, block, format="plain"):
    constants = {
        "FORMAT": format,
        "GROUP": heads // kv_heads,
        "GROUP_PAD": triton.next_power_of_2(heads // kv_heads),
        "BLOCK_SIZE": block,
        "DIM": dim,
        "DIM_PAD": triton.next_power_of_2(dim),
        "NORM": True,
        "ROTATE": True,
    }
    return compile_kernel(fused_layers.turn_store_kernel, dtype, constants, target, num_warps=2)


def copy(dtype, target):
    constants = {"CHUNK": copy_blocks.CHUNK}
    return compile_kernel(copy_blocks.copy_kernel, dtype, constants, target, num_warps=4)


def int8_matrix(dtype, target, rows, biased):
    constants = int8_linear.launch_shape(rows, KINDS[dtype]) | {"BIASED": biased}
    options = {"num_warps": 4, "num_stages": 4}
    return compile_kernel(int8_linear.int8_kernel, dtype, constants, target, **options)


def _constants(shape, dtype, block, window, softcap, format):
    extra = {"FORMAT": format, "BLOCK_SIZE": block, "WINDOW": window, "SOFTCAP": softcap}
    return {**shape, **extra, "PRECISION": paged_decode.dot_precision(KINDS[dtype])}


def cases(full: bool):
    """(name, function of (dtype, target)) of each kernel shape; a covering few, or all of them."""
    shapes = [(16, 8, 128, 16), (14, 2, 64, 64)]
    if full:
        shapes += [(32, 8, 128, 64), (8, 8, 128, 16), (8, 8, 64, 16), (32, 8, 80, 16)]
        shapes += [(8, 1, 256, 16), (32, 32, 96, 16), (64, 8, 128, 16)]
    for i, shape in enumerate(shapes):
        for direct in (False, True) if full else (i == 1,):
            yield f"decode direct={direct} {shape}", _case(decode, *shape, direct)
        for queries in (1, 1024) if full else (1024 if i == 0 else 2,):
            yield f"prefill queries={queries} {shape}", _case(prefill, *shape, queries)
    if full:
        for shape in shapes[:4]:
            yield f"decode window=512 {shape}", _case(decode, *shape, False, 512)
            yield f"prefill window=512 {shape}", _case(prefill, *shape, 1024, 512)
        yield f"decode softcap=50 {shapes[6]}", _case(decode, *shapes[6], False, 0, 50.0)
        yield f"prefill softcap=50 {shapes[6]}", _case(prefill, *shapes[6], 1024, 0, 50.0)
    else:  # the one that spilled with fewer warps
        yield "prefill queries=1 (8, 8, 128, 16)", _case(prefill, 8, 8, 128, 16, 1)
    yield "reduce 128", _case(reduce, 128)
    yield "store (8, 128, 16)", _case(store, 8, 128, 16)
    yield "copy", _case(copy)
    for size in (1024, 4096, 8192) if full else (4096,):
        yield f"add and norm {size}", _case(add_norm, size)
    for activation in reference.GATES:
        yield f"gated {activation}", _case(gated, activation)
    for shape in shapes:
        yield f"turn and store {shape}", _case(turn_store, *shape)
    for rows in (1, 32, 64) if full else (1, 64):
        yield f"int8 matrix, rows={rows}", _case(int8_matrix, rows, rows > 1)
    for i, format in enumerate(FORMATS):
        for shape in shapes if full else (shapes[i % 2],):
            if format == "int4" and shape[2] % 32:
                continue
            last = (0, 0.0, format)
            yield f"decode {format} {shape}", _case(decode, *shape, False, *last)
            for queries in (1, 1024) if full else (1024,):
                name = f"prefill {format} queries={queries} {shape}"
                yield name, _case(prefill, *shape, queries, *last)
        yield f"store {format} (8, 128, 16)", _case(store, 8, 128, 16, format)
        yield f"turn and store {format}", _case(turn_store, *shapes[0], format)


def _case(function, *args):
    return lambda dtype, target: function(dtype, target, *args)


def main() -> int:
    """Prints the table; with --few, of the shapes that the tests cover. 1 if SPILLS is passed."""
    few, worst = "--few" in sys.argv, 0
    print(f"{'kernel':44} {'dtype':5} target registers spilled shared")
    for i, (name, build) in enumerate(cases(full=not few)):
        for dtype in ("fp16", "bf16") if not few else (("fp16", "bf16")[i % 2],):
            for target in TARGETS:
                use = build(dtype, target)
                worst = max(worst, use.spilled)
                line = f"{use.registers:9} {use.spilled:7} {use.shared:6}"
                print(f"{name:44} {dtype:5} sm_{target:<4} {line}", flush=True)
    return int(worst > SPILLS)


if __name__ == "__main__":
    sys.exit(main())
