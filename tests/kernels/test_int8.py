"""int8 matrices: what is lost, and that every product with one is that of its numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import int8
from kernels.cpu_int8 import DIRECT_ROWS, ROW_BLOCK, Int8Linear, serves

SHAPES = [(64, 2), (64, 130), (100, 34), (7, 6), (192, 256), (2048, 544), (65, 4096)]
BATCHES = (0, 1, 2, 3, 4, 5, 7, 16, 64, 65, ROW_BLOCK + 3)

needs_cpu_kernel = pytest.mark.skipif(
    not serves(torch.zeros(1, 2, dtype=torch.int8)), reason="needs AVX512-BF16 and AVX512-VBMI"
)


def matrix(outputs: int, inputs: int, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes with both ends of their range, scales and a bias."""
    torch.manual_seed(outputs + inputs)
    codes, scales = int8.quantize(torch.randn(outputs, inputs))
    codes[0, 0], codes[-1, -1] = 127, -127
    return codes, scales, torch.randn(outputs).bfloat16() if bias else None


def exact(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    product = x.double() @ (codes.double() * scales.double()[:, None]).t()
    return product if bias is None else product + bias.double()


@needs_cpu_kernel
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_cpu_product(outputs: int, inputs: int, threads: int, bias: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        codes, scales, offset = matrix(outputs, inputs, bias)
        linear = Int8Linear(codes, scales, offset)
        for rows in BATCHES:
            x = torch.randn(rows, inputs + 2)[:, 1:-1].bfloat16()
            for given in (x, torch.cat((x, x), 1)[:, :inputs], x.t().contiguous().t()):
                expected = exact(given, codes, scales, offset)
                error = (linear(given).double() - expected).abs()
                assert (error <= expected.abs() * 2**-8 + 1e-5 * inputs**0.5).all()
    finally:
        torch.set_num_threads(before)


@needs_cpu_kernel
def test_a_row_does_not_depend_on_the_others() -> None:
    codes, scales, bias = matrix(192, 322, True)
    linear = Int8Linear(codes, scales, bias)
    x = torch.randn(ROW_BLOCK + 9, 322).bfloat16()
    alone = torch.cat([linear(row[None]) for row in x])
    for rows in (2, DIRECT_ROWS, DIRECT_ROWS + 1, 64, len(x)):
        assert linear(x[:rows]).equal(alone[:rows])


@needs_cpu_kernel
def test_every_code_is_exact() -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8)[:, None].repeat(1, 2)
    linear = Int8Linear(codes, torch.ones(255), None)
    for rows in (1, DIRECT_ROWS + 1):
        for place in ((1.0, 0.0), (0.0, 1.0)):
            x = torch.tensor(place).bfloat16().repeat(rows, 1)
            assert linear(x).equal(codes[:, 0].bfloat16().repeat(rows, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (100, 34), (300, 1 << 15)])
def test_product_in_torch(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    codes, scales, bias = matrix(outputs, inputs, True)
    for rows in (0, 1, 9):
        x = torch.randn(rows, inputs).to(dtype)
        out, expected = int8.multiply(x, codes, scales, bias), exact(x, codes, scales, bias)
        assert out.dtype == dtype
        error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_rounding() -> None:
    weight = torch.randn(300, 1 << 15) * torch.logspace(-6, 6, 300)[:, None]
    codes, scales = int8.quantize(weight)
    assert codes.min() == -127 or codes.max() == 127
    error = (int8.dequantize(codes, scales) - weight).abs()
    assert (error <= scales[:, None] * 0.5001).all()
    assert scales.equal(weight.abs().amax(1) / 127)


def test_zeros_and_numbers_that_are_hardly_there() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [1e-38, 3e-38]])
    codes, scales = int8.quantize(weight)
    assert int8.dequantize(codes, scales)[0].eq(0).all()
    assert int8.dequantize(codes, scales).isfinite().all()
