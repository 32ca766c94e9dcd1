"""Gemma 2: every other layer sees a window, and scores and logits are softly capped."""

from __future__ import annotations

from typing import Any

from models.config import Fields, ModelConfig, activation, llama_like, typed_windows


def parse(fields: Fields) -> ModelConfig:
    return gemma_like(
        fields,
        pattern=2,
        attention_softcap=softcap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=softcap(fields, "final_logit_softcapping", 30.0),
    )


def gemma_like(fields: Fields, pattern: int, **differences: Any) -> ModelConfig:
    """What Gemma 2 and 3 have in common.

    Args:
        pattern: unless the config lists the types of its layers, every so many-th one sees
            everything and the others a window
    """
    fields.refuse("use_bidirectional_attention", False)
    layers = fields.integer("num_hidden_layers")
    types = fields.optional("layer_types") or [
        "sliding_attention" if (layer + 1) % pattern else "full_attention"
        for layer in range(layers)
    ]
    return llama_like(
        fields,
        head_dim=fields.integer("head_dim", 256),
        num_kv_heads=fields.integer("num_key_value_heads", 4),
        activation=activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        mlp_bias=False,
        layer_windows=typed_windows(types, fields.integer("sliding_window", 4096)),
        attention_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        post_norms=True,
        **differences,
    )


def softcap(fields: Fields, key: str, default: float) -> float:
    """A cap, 0 for none. A missing key means the default, one that is null means none."""
    if fields.optional(key) is None:
        return 0.0 if key in fields.raw else default
    return fields.number(key)
