"""The fused layers against plain torch, on sizes that fill no whole vectors too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu_layers

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
DTYPES = list(TOLERANCE)


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads, cos, sin = heads.double(), cos.double(), sin.double()
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("size", [1, 7, 16, 100, 576])
def test_rms_norm(size, rows, dtype):
    x = numbers(rows, 3 * size, dtype=dtype)[:, size : 2 * size]  # strided, as views are
    weight = 1 + numbers(size, dtype=torch.float32)
    actual = cpu_layers.rms_norm(x, weight, 1e-5)
    assert (actual.shape, actual.dtype) == (x.shape, dtype) and actual.is_contiguous()
    exact = F.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    assert error(actual, exact) < TOLERANCE[dtype]


def test_rounding_of_bfloat16_is_that_of_torch():
    """All sums are of whole numbers, hence exact in any order."""
    x = torch.arange(-64, 64).repeat(3, 1).bfloat16()
    weight = (1 + numbers(128, dtype=torch.float32)).bfloat16()
    expected = F.rms_norm(x.float(), (128,), weight.float(), 1e-5).bfloat16()
    assert cpu_layers.rms_norm(x, weight.float(), 1e-5).equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype):
    x = numbers(3, 64, dtype=dtype)
    x[1, 5] = float("nan")
    actual = cpu_layers.rms_norm(x, torch.ones(64), 1e-5)
    assert actual[1].isnan().all() and not actual[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"), [(0, 2, 16), (1, 6, 64), (5, 3, 2), (4, 9, 80)]
)
def test_rotate(tokens, heads, dim, normed, dtype):
    row = numbers(tokens, heads + 2, dim, dtype=dtype)
    cos, sin = (numbers(tokens, 1, dim + i, dtype=torch.float32)[..., :dim] for i in (0, 1))
    cos, sin = cos.contiguous(), sin.contiguous()
    weight = 1 + numbers(heads, dim, dtype=torch.float32) if normed else None
    actual = cpu_layers.rotate(row[:, :heads], cos, sin, weight, 1e-5)
    exact = row[:, :heads].double()
    if weight is not None:
        exact = F.rms_norm(exact, (dim,), None, 1e-5) * weight.double()
    assert (actual.shape, actual.dtype) == (exact.shape, dtype)
    assert error(actual, turned(exact, cos, sin)) < TOLERANCE[dtype]
