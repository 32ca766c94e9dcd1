"""Chooses the implementation of the paged-attention ops once, by device.

Triton serves GPUs, Numba CPUs, and plain torch is the oracle. The contract of the
callables is documented in `kernels.reference`. Triton and Numba are imported only when chosen:
neither is needed on a machine that does not use it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from kernels import int8
from kernels.decode_choices import every_choice
from kernels.pages import Pages, QuantizedPages, tile_bytes
from kernels.slots import SlotRows

_MODULES = {
    "triton": (
        "kernels.store_kv",
        "kernels.paged_decode",
        "kernels.paged_prefill",
        "kernels.copy_blocks",
        "kernels.slots",
        "kernels.fused_layers",
    ),
    # Copying is what torch does on a CPU at the speed of memory.
    "numba": (*("kernels.cpu_attention",) * 3, "kernels.reference", "kernels.cpu_slots"),
    "torch": (*("kernels.reference",) * 4, "kernels.slots"),
}
_BY_DEVICE = {"cuda": "triton", "cpu": "numba"}


@dataclass(frozen=True)
class LayerOps:
    """Fused operations of decoder layers (contract: `kernels.reference`)."""

    add_rms_norm: Callable[..., Tensor]
    gated: Callable[..., Tensor]
    turn_and_store: Callable[..., Tensor]


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops on the paged KV cache (contract: `kernels.reference`).

    `slots` gathers a step (contract: `kernels.slots`). `layers` are the fused ones that go around
    them, where the backend has any.
    """

    name: str
    store_kv: Callable[..., None]
    paged_decode: Callable[..., Tensor]
    paged_prefill: Callable[..., Tensor]
    copy_blocks: Callable[..., None]
    gather_blocks: Callable[..., None]
    scatter_blocks: Callable[..., None]
    slots: type[SlotRows]
    layers: LayerOps | None = None


def backend(device: torch.device, name: str | None = None) -> Backend:
    """The backend for `device`; an explicit `name` ("triton", "numba", "torch") wins.

    Raises ValueError for an unknown name or a device that no backend serves.
    """
    chosen = name or _BY_DEVICE.get(device.type)
    if chosen not in _MODULES:
        raise ValueError(
            f"no attention backend {name!r} for device {str(device)!r}; known: {sorted(_MODULES)}"
        )
    store, decode, prefill, copy, slots, *fused = map(importlib.import_module, _MODULES[chosen])
    return Backend(
        chosen,
        store.store_kv,
        decode.paged_decode,
        prefill.paged_prefill,
        copy.copy_blocks,
        copy.gather_blocks,
        copy.scatter_blocks,
        slots.SlotRows,
        *(LayerOps(m.add_rms_norm, m.gated, m.turn_and_store) for m in fused),
    )


def int8_linear(
    codes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> int8.Product:
    """The product `x @ weight.T + bias` with an int8 matrix (`kernels.int8`), for rows of `dtype`,
    as the device of the codes does it best."""
    if codes.device.type == "cuda":
        on_gpu = importlib.import_module("kernels.int8_linear").Int8Linear(codes, scales, bias)
        on_gpu.warm_up(dtype)
        return cast("int8.Product", on_gpu)
    if codes.device.type == "cpu" and dtype == torch.bfloat16:
        cpu_int8 = importlib.import_module("kernels.cpu_int8")
        if cpu_int8.serves(codes):
            return cast("int8.Product", cpu_int8.Int8Linear(codes, scales, bias))
    return int8.Int8Linear(codes, scales, bias)


def warm_up(
    backend: Backend,
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int = 0,
    softcap: float = 0.0,
    kv_format: str | None = None,
) -> None:
    """Compiles, or loads from the on-disk cache, every kernel that a model of this shape needs.

    Runs each op once on two small sequences, so that no request waits for a compiler. Pages are
    of `dtype` unless `kv_format` names one of `kernels.pages.FORMATS`.
    """
    pages: Pages
    if kv_format is None:
        pages = torch.zeros(2, 3, kv_heads, block_size, head_dim, dtype=dtype, device=device)
    else:
        size = tile_bytes(kv_format, block_size, head_dim)
        tiles = torch.zeros(2, 3, kv_heads, size, dtype=torch.uint8, device=device)
        pages = QuantizedPages(tiles, kv_format, block_size, head_dim)
    lengths = torch.tensor([1, block_size], dtype=torch.int32, device=device)
    tables = torch.tensor([[1], [2]], dtype=torch.int32, device=device)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}

    tokens = torch.zeros(2, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    query, key, value = tokens.split([heads, kv_heads, kv_heads], dim=1)
    slots = torch.tensor([block_size, 2 * block_size], dtype=torch.int32, device=device)
    backend.store_kv(key, value, pages, slots)
    query = query.contiguous()
    # Narrow and wide tables: the Triton kernels specialize on one split at most and on several.
    choices: list[dict[str, Any]] = [{}]
    if backend.name == "triton":
        shape = importlib.import_module("kernels.paged_decode").head_shape(heads, pages)
        choices = [{"choice": choice} for choice in every_choice(shape)]
    for width in (1, (1 << 15) // block_size):
        wide = tables.expand(-1, width).contiguous()
        for choice in choices:
            backend.paged_decode(
                query, pages, wide, lengths, max_context_len=block_size, **choice, **options
            )
    # Likewise for chunks: the hint of 64 selects the kernel for long ones.
    for chunk, longest in ((1, 1), (block_size, 64)):
        starts = torch.tensor([0, 1, 1 + chunk], dtype=torch.int32, device=device)
        ragged = query[:1].expand(1 + chunk, -1, -1).contiguous()
        backend.paged_prefill(
            ragged, pages, tables, lengths, starts, max_query_len=max(chunk, longest), **options
        )
