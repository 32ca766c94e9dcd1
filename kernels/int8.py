"""Weights as int8 with one float32 scale per output: what they are, and products with them in
plain torch, for every device and dtype. The faster products are tested against it.

    weight[o, i] = scales[o] * codes[o, i],    codes in [-127, 127]
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127
_CHUNK_NUMBERS = 1 << 22  # of the matrix, that are there as floats at once


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[outputs, inputs] -> codes int8 [outputs, inputs], scales float32 [outputs].

    The largest number of a row is kept exactly. Rows of zeros have scale 0.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    step = max(1, _CHUNK_NUMBERS // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        scale = rows.abs().amax(1) / LARGEST
        factor = torch.where(scale > 0, 1 / scale, 0.0)
        # A scale that is not normal has no exact inverse: its codes could leave the range.
        numbers = (rows * factor[:, None]).round_().clamp_(-LARGEST, LARGEST)
        codes[start : start + step], scales[start : start + step] = numbers, scale
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [outputs, inputs]"""
    return codes.float().mul_(scales[:, None])


def multiply(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`: [rows, inputs] -> [rows, outputs] of the dtype of `x`.

    A part of the outputs at a time, so that little of the matrix is there as floats.
    """
    out = x.new_empty(len(x), len(codes))
    step = max(1, _CHUNK_NUMBERS // codes.shape[1])
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        product = F.linear(x, codes[part].to(x.dtype)).float().mul_(scales[part])
        if bias is not None:
            product += bias[part]
        out[:, part] = product
    return out


class Product(Protocol):
    """`multiply` with one matrix.

    Attributes:
        in_panels: whether it lies as the compiled step of CPUs reads it
    """

    in_panels: bool

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs]"""


class Int8Linear:
    """The `Product` in torch."""

    in_panels = False

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None):
        self.matrix = codes, scales, bias

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs]"""
        return multiply(x, *self.matrix)
