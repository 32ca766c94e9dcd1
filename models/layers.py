"""The parts a decoder is made of. Weights are allocated empty and filled by `models.loader`.

Parts are plain objects, not `nn.Module`s: at one row, a decode step of a small model spends more
time on calls and attribute look-ups of modules than on some of its operations.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.int8 import Product, quantize

PANEL = 64  # outputs that lie together in a packed bfloat16 weight (`kernels.cpu_linear`)
STREAMED_BYTES = 4 << 20  # weights this large come from memory on each call, not from a cache


class Linear:
    """`x @ weight.T + bias`, one matrix for one or several projections of the same input.

        weight  [ q rows | k rows | v rows ] x inputs        shard(1) is the k rows

    On x86 CPUs `pack` exchanges the weight for a copy in oneDNN's blocked layout. `weight`
    is then None, and shards can no longer be taken. How much faster than `F.linear` that is, on one
    AVX512 core, with weights that come from memory (`benchmarks/linear.py`):

        rows            1            4           16           64          512
        bfloat16   1.7 to 2.1   1.7 to 2.2   1.4 to 1.8   1.1 to 1.3   1.0 to 1.1
        float32    1.0 to 1.7   1.7 to 2.8   1.6 to 2.4   1.3 to 1.8   1.2 to 1.3

    Few rows are left to `kernels.cpu_linear` where it can read the layout. Elsewhere large weights
    see at least 4 rows, the rest being zeros: oneDNN reads memory slower for 1 or 2 rows than for
    4, by 6 to 30 % and by 33 to 50 %.

    After `quantize`, `pack` exchanges the weight for an int8 one (`kernels.int8`) on any device.
    """

    def __init__(
        self,
        inputs: int,
        outputs: Sequence[int],
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.inputs, self.outputs = inputs, tuple(outputs)
        self.weight: Tensor | None = torch.empty(sum(outputs), inputs, dtype=dtype, device=device)
        self.bias = torch.empty(sum(outputs), dtype=dtype, device=device) if bias else None
        self.packed: Tensor | None = None
        self.to_int8 = False
        self.int8: Product | None = None
        self.least_rows = 0
        self.few: Callable[[Tensor], Tensor] | None = None
        self.most_few = 0
        self.search: Any = None

    def shard(self, index: int) -> dict[str, Tensor]:
        """Views of one projection: `weight` [outputs[index], inputs] and, if any, `bias`."""
        start = sum(self.outputs[:index])
        rows = slice(start, start + self.outputs[index])
        views = {"weight": self.weight[rows]}
        if self.bias is not None:
            views["bias"] = self.bias[rows]
        return views

    def pad(self, inputs: int, outputs: Sequence[int]) -> None:
        """Enlarges the weight with zeros: columns at the end, and rows at the end of each
        projection. Rows of `x` must then be as long. Before `pack`."""
        assert self.weight is not None
        parts = [self.shard(i) for i in range(len(self.outputs))]
        self.inputs, self.outputs = inputs, tuple(outputs)
        self.weight = self.weight.new_zeros(sum(outputs), inputs)
        if self.bias is not None:
            self.bias = self.bias.new_zeros(sum(outputs))
        for index, part in enumerate(parts):
            for name, old in part.items():
                self.shard(index)[name][tuple(slice(size) for size in old.shape)].copy_(old)

    def quantize(self) -> None:
        """Makes `pack` keep the weight as int8."""
        self.to_int8 = True

    def pack(self, searched: bool = False) -> None:
        """Exchanges the weight for a packed copy where that is faster; else does nothing.

        Args:
            searched: `best` will be asked often: keeps what that needs, half as large as the weight
        """
        if self.weight is not None and self.to_int8:
            codes, scales = quantize(self.weight)
            self.int8 = dispatch.int8_linear(codes, scales, self.bias, self.weight.dtype)
            self.few = self.int8
            self.weight = None
        elif self.weight is not None and can_pack(self.weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.least_rows = 4 if self.weight.nbytes >= STREAMED_BYTES else 0
            self._take_few(self.weight, self.packed)
            if searched and self.least_rows:
                self._take_search(self.weight)
            self.weight = None

    def _take_few(self, weight: Tensor, packed: Tensor) -> None:
        cpu_linear = importlib.import_module("kernels.cpu_linear")
        if cpu_linear.PackedLinear.reads(weight, packed):
            self.few = cpu_linear.PackedLinear(packed, *weight.shape, self.bias)
            self.most_few = cpu_linear.MOST_ROWS

    def _take_search(self, weight: Tensor) -> None:
        cpu_screen = importlib.import_module("kernels.cpu_screen")
        if self.most_few and cpu_screen.ScreenedLinear.serves(weight, self.bias):
            self.search = cpu_screen.ScreenedLinear(weight, self.few)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, sum(outputs)]"""
        if self.int8 is not None:
            return self.int8(x)
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        rows = x.shape[0]
        if 0 < rows <= self.most_few and self.few is not None:
            return self.few(x)
        if rows < self.least_rows:
            x = F.pad(x, (0, 0, 0, self.least_rows - rows))
            return _packed_linear(x, self.packed, self.bias, "none", [], "")[:rows]
        return _packed_linear(x, self.packed, self.bias, "none", [], "")

    def scores(self, x: Tensor) -> Tensor:
        """The same in float32, where possible before anything is rounded."""
        return self.few.scores(x) if self.most_few else self(x).float()

    def best(self, x: Tensor) -> Tensor:
        """int64 [rows], the output of the largest score."""
        if self.search is not None:
            return self.search.best(x)
        return self.few.best(x) if self.most_few else self.scores(x).argmax(-1)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a packed layout for this weight on this machine."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


_packed_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if _packed_linear is not None:
    _packed_linear = _packed_linear.default  # resolving the overload on each call costs time


def fused_layers(weight: Tensor) -> Any:
    """The module `kernels.cpu_layers` if it serves the device and the dtype of `weight`."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    return importlib.import_module("kernels.cpu_layers")


class Embedding:
    """One row of `weight` [entries, size] per id."""

    def __init__(self, entries: int, size: int, *, dtype: torch.dtype, device: torch.device):
        self.weight = torch.empty(entries, size, dtype=dtype, device=device)

    def __call__(self, ids: Tensor) -> Tensor:
        """int64 [tokens] -> [tokens, size]"""
        return F.embedding(ids, self.weight)


class RMSNorm:
    """Division by the root mean square, times `weight` [size]."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device):
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.shape, self.eps = (size,), eps
        self.scale: Tensor | None = None
        self.fused: Any = None

    def expand(self) -> None:
        """Keeps the weight in float32 too. Call it once the weight is loaded."""
        self.scale = self.weight.float()
        self.fused = fused_layers(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, size] -> the same shape"""
        if self.fused is not None and x.numel() <= self.fused.LARGEST:
            return self.fused.rms_norm(x, self.scale, self.eps)
        return self.apply(x)

    def apply(self, x: Tensor) -> Tensor:
        """The same in torch."""
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class HeadNorm:
    """RMSNorm of every query and key head over head_dim: one weight for queries, one for keys."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.weight = torch.empty(2, head_dim, dtype=dtype, device=device)
        self.counts = (heads, kv_heads)
        self.shape, self.eps = (head_dim,), eps
        self.per_head: Tensor | None = None

    def expand(self) -> None:
        """Spreads the two weights over the heads. Call it once the weights are loaded."""
        query, key = self.weight
        heads, kv_heads = self.counts
        self.per_head = torch.cat((query.expand(heads, -1), key.expand(kv_heads, -1)))

    def __call__(self, query_key: Tensor) -> Tensor:
        """[tokens, heads + kv_heads, head_dim] -> the same shape"""
        return F.rms_norm(query_key, self.shape, None, self.eps).mul_(self.per_head)


class CenteredRMSNorm(RMSNorm):
    """RMSNorm whose weight is stored as its distance from 1, rounded once, at the end."""

    def expand(self) -> None:
        super().expand()
        self.scale = self.weight.float() + 1  # float32

    def apply(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.shape, self.scale, self.eps).to(x.dtype)


class CenteredHeadNorm(HeadNorm):
    """HeadNorm whose weights are stored as their distances from 1, rounded once, at the end."""

    def expand(self) -> None:
        super().expand()
        self.per_head = self.per_head.float() + 1

    def __call__(self, query_key: Tensor) -> Tensor:
        normed = F.rms_norm(query_key.float(), self.shape, None, self.eps)
        return normed.mul_(self.per_head).to(query_key.dtype)


class LayerNorm:
    """Mean and variance normalization with `weight` and `bias`, both [size]."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device):
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.bias = torch.empty(size, dtype=dtype, device=device)
        self.shape, self.eps = (size,), eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape"""
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}
