"""Qwen 2 and 2.5: Llama with biased queries, keys and values, and windows on some layers."""

from models.config import Fields, ModelConfig, llama_like, sliding_windows


def parse(fields: Fields) -> ModelConfig:
    return llama_like(
        fields,
        layer_windows=sliding_windows(fields),
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
    )
