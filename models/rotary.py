"""Rotary position embedding (Su et al., 2021) in the half-rotation layout of Hugging Face."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.config import RopeConfig

Rotation = tuple[Tensor, Tensor]


class Rotary:
    """Tables of cos and sin for every position, float32.

        head  [ x0 .. x(h-1) | xh .. x(2h-1) ]      the pair (xi, x(i+h)) turns by position * f_i

    The tables are [positions, head_dim / 2]; a call gathers a batch's rows once for all layers.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, positions: int, device: torch.device):
        frequencies, factor = inverse_frequencies(rope, head_dim)
        steps = torch.arange(positions, dtype=torch.float32, device=device)
        angles = torch.outer(steps, frequencies.to(device))
        self.cos = angles.cos().mul_(factor)
        self.sin = angles.sin().mul_(factor)

    def __call__(self, positions: Tensor) -> Rotation:
        """int64 [tokens] -> cos and signed sin, each float32 [tokens, 1, head_dim]"""
        cos, sin = self.cos[positions], self.sin[positions]
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turns every head by its token's angles; computed in float32, returned in heads' dtype.

    Args:
        heads: [tokens, heads, head_dim], possibly a strided view
        rotation: what a `Rotary` returns
    """
    cos, sin = rotation
    swapped = torch.roll(heads, heads.shape[-1] // 2, -1)  # the partner of every element
    return torch.addcmul(heads * cos, swapped, sin).to(heads.dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, float32 [head_dim / 2], and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        return plain / rope.factor, 1.0
    if rope.scaling == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.scaling == "yarn":
        factor = rope.attention_factor
        if factor is None:
            factor = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        return _yarn(plain, rope, head_dim), factor
    return plain, 1.0


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: slow pairs are slowed by `factor`, fast pairs kept, a ramp between them."""
    turns = rope.original_max_positions * plain / (2 * math.pi)  # within the trained context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn(plain: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (Peng et al., 2023): the ramp runs over the index of the pair, not its frequency."""

    def pair_turning(turns: float) -> float:
        wavelength = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    stretched = ((pairs - first) / width).clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)
