"""Qwen 3: Llama with normalized queries and keys, and heads of 128 whatever the hidden size."""

from models.config import Fields, ModelConfig, llama_like, sliding_windows


def parse(fields: Fields) -> ModelConfig:
    return llama_like(
        fields,
        head_dim=fields.integer("head_dim", 128),
        layer_windows=sliding_windows(fields),
        qk_norm=True,
        mlp_bias=False,
    )
