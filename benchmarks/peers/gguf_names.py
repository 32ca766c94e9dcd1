"""What the tensors of a Llama or Qwen3 are called in GGUF, and how their rows lie there."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

OUTER: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def name(tensor: str) -> str:
    """GGUF's name of a tensor that Hugging Face calls `tensor`.

    Raises:
        KeyError: neither Llama nor Qwen3 has one of that name.
    """
    layer = LAYER.fullmatch(tensor)
    return f"blk.{layer[1]}.{INNER[layer[2]]}.weight" if layer else OUTER[tensor]


def rotary_heads(tensor: str, config: dict[str, Any]) -> int | None:
    """Heads whose rows must be interleaved, None where they stay as they are.

    Hugging Face rotates dimension i of a head with i + head_dim / 2, llama.cpp's `llama` 2i with
    2i + 1; its `qwen3` rotates as Hugging Face does.
    """
    if config["model_type"] != "llama":
        return None
    if tensor.endswith("q_proj.weight"):
        return int(config["num_attention_heads"])
    if tensor.endswith("k_proj.weight"):
        return int(config["num_key_value_heads"])
    return None


def interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows [heads * head_dim, ...], those of each head in the order 0, half, 1, half + 1, ..."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # [heads, 2, head_dim / 2, ...]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
