"""The layout of a GGUF file, where it differs from Hugging Face's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.peers import gguf_names
from benchmarks.shapes import SHAPES
from models import registry


@pytest.mark.parametrize("shape", ["llama-56m", "qwen3-0.6b"])
def test_every_tensor_has_a_name_of_its_own(shape: str) -> None:
    config = registry.parse_config(SHAPES[shape])
    tensors = registry.build(config, torch.bfloat16, torch.device("meta")).checkpoint_tensors()
    names = {gguf_names.name(tensor) for tensor in tensors}
    assert len(names) == len(tensors)
    assert {"token_embd.weight", "output_norm.weight", "blk.7.attn_q.weight"} <= names
    assert ("blk.0.attn_q_norm.weight" in names) == (shape == "qwen3-0.6b")


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(KeyError):
        gguf_names.name("model.layers.0.self_attn.q_proj.bias_of_some_kind.weight")


def test_heads_are_interleaved_in_llama_only() -> None:
    llama, qwen = SHAPES["llama-56m"], SHAPES["qwen3-0.6b"]
    query, key = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    assert gguf_names.rotary_heads(query, llama) == 8
    assert gguf_names.rotary_heads(key, llama) == 4
    assert gguf_names.rotary_heads("model.layers.0.self_attn.v_proj.weight", llama) is None
    assert gguf_names.rotary_heads(query, qwen) is None


def test_interleaved_rows_rotate_to_the_same_scores() -> None:
    """Rotating neighbours of interleaved rows is rotating halves of the rows as they were."""
    draw = np.random.default_rng(0)
    heads, dim, hidden = 2, 8, 5
    weights = draw.normal(size=(heads * dim, hidden))
    angles = draw.normal(size=dim // 2)
    stream = draw.normal(size=hidden)
    plain = (weights @ stream).reshape(heads, 2, dim // 2)
    moved = (gguf_names.interleaved(weights, heads) @ stream).reshape(heads, dim // 2, 2)
    left = plain[:, 0] * np.cos(angles) - plain[:, 1] * np.sin(angles)
    assert np.allclose(left, moved[:, :, 0] * np.cos(angles) - moved[:, :, 1] * np.sin(angles))
    right = plain[:, 1] * np.cos(angles) + plain[:, 0] * np.sin(angles)
    assert np.allclose(right, moved[:, :, 1] * np.cos(angles) + moved[:, :, 0] * np.sin(angles))
