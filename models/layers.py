"""The parts a decoder is made of. Weights are allocated empty and filled by `models.loader`.

Parts are plain objects, not `nn.Module`s: at one row, a decode step of a small model spends more
time on calls and attribute look-ups of modules than on some of its operations.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """`x @ weight.T + bias`, one matrix for one or several projections of the same input.

        weight  [ q rows | k rows | v rows ] x inputs        shard(1) is the k rows

    On x86 CPUs `pack` exchanges the weight for a copy in oneDNN's blocked layout. `weight`
    is then None, and shards can no longer be taken. Measured on two AVX512
    cores against `F.linear`, float32 and bfloat16: 1.4 to 5 times faster at 1 to 16 rows, 1.2 to
    2.9 at 64, 1.04 to 1.2 at 512.
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
        self.outputs = tuple(outputs)
        self.weight: Tensor | None = torch.empty(sum(outputs), inputs, dtype=dtype, device=device)
        self.bias = torch.empty(sum(outputs), dtype=dtype, device=device) if bias else None
        self.packed: Tensor | None = None

    def shard(self, index: int) -> dict[str, Tensor]:
        """Views of one projection: `weight` [outputs[index], inputs] and, if any, `bias`."""
        start = sum(self.outputs[:index])
        rows = slice(start, start + self.outputs[index])
        views = {"weight": self.weight[rows]}
        if self.bias is not None:
            views["bias"] = self.bias[rows]
        return views

    def pack(self) -> None:
        """Exchanges the weight for a packed copy where that is faster; else does nothing."""
        if self.weight is not None and can_pack(self.weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, sum(outputs)]"""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return _packed_linear(x, self.packed, self.bias, "none", [], "")


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

    def __call__(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape"""
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
        """Keeps 1 + weight in float32. Call it once the weight is loaded."""
        self.scale = self.weight.float() + 1

    def __call__(self, x: Tensor) -> Tensor:
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
