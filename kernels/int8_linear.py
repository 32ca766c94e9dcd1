"""Triton: products of few rows with an int8 matrix (`kernels.int8`).

At few rows a product only reads the matrix. A program multiplies all rows with some outputs; codes
become numbers of the rows' dtype in registers, which is exact, and the sums meet the scales at the
end. Many rows multiply with a copy of the matrix in that dtype, made a part at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import int8

MOST_ROWS = 64
"""Rows that the kernel takes: more reuse a part of the matrix often enough to convert it first."""


@triton.jit(do_not_specialize=["rows"])
def int8_kernel(
    x,
    codes,
    scales,
    bias,
    out,
    rows,
    outputs,
    inputs,
    x_stride,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """OUTPUTS outputs of all rows per program: grid (outputs / OUTPUTS,)."""
    row, column = tl.arange(0, ROWS), tl.arange(0, INPUTS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there, kept = row < rows, output < outputs
    x_row = x + row[:, None].to(tl.int64) * x_stride
    codes_row = codes + output[None, :].to(tl.int64) * inputs
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        at = start + column
        inside = at < inputs
        numbers = tl.load(x_row + at[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        part = tl.load(codes_row + at[:, None], mask=kept[None, :] & inside[:, None], other=0)
        total = tl.dot(numbers, part.to(numbers.dtype), total, input_precision=PRECISION)
    total *= tl.load(scales + output, mask=kept, other=0.0)[None, :]
    if BIASED:
        total += tl.load(bias + output, mask=kept, other=0.0).to(tl.float32)[None, :]
    place = out + row[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=there[:, None] & kept[None, :])


class Int8Linear:
    """`x @ weight.T + bias` on a GPU, for any number of rows."""

    in_panels = False

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None):
        self.codes, self.scales, self.bias = codes, scales, bias
        self.outputs, self.inputs = codes.shape

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compiles the kernel for rows of `dtype`, as far as equal matrices have not yet."""
        for rows in (16, 32, MOST_ROWS):
            self(torch.zeros(rows, self.inputs, dtype=dtype, device=self.codes.device))

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs]"""
        rows = len(x)
        if rows == 0 or rows > MOST_ROWS:
            return int8.multiply(x, self.codes, self.scales, self.bias)
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty(rows, self.outputs)
        shape = launch_shape(rows, x.dtype)
        with torch.cuda.device_of(x):
            int8_kernel[(triton.cdiv(self.outputs, shape["OUTPUTS"]),)](
                x,
                self.codes,
                self.scales,
                out if self.bias is None else self.bias,
                out,
                rows,
                self.outputs,
                self.inputs,
                x.stride(0),
                BIASED=self.bias is not None,
                **shape,
                num_warps=4,
                num_stages=4,
            )
        return out


def launch_shape(rows: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Tile sizes: short tiles of outputs, so that small matrices too occupy every processor."""
    return {
        "ROWS": max(16, triton.next_power_of_2(rows)),
        "OUTPUTS": 16 if rows <= 16 else 32,
        "INPUTS": 32 if dtype == torch.float32 else 256 if rows <= 16 else 64,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
