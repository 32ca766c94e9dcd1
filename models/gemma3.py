"""Gemma 3, text only: normalized queries and keys, and short wavelengths for sliding layers."""

from __future__ import annotations

from collections.abc import Mapping

from models.config import CheckpointError, Fields, ModelConfig, RopeConfig, rope_config
from models.gemma2 import gemma_like, softcap


def parse(fields: Fields) -> ModelConfig:
    fields.refuse("attn_logit_softcapping")
    full, sliding = _ropes(fields, fields.integer("max_position_embeddings", 131072))
    return gemma_like(
        fields,
        pattern=fields.integer("sliding_window_pattern", 6),
        qk_norm=True,
        rope=full,
        sliding_rope=sliding,
        logit_softcap=softcap(fields, "final_logit_softcapping", 0.0),
    )


def _ropes(fields: Fields, positions: int) -> tuple[RopeConfig, RopeConfig]:
    """The rotary embeddings of full and of sliding layers.

    Read from `rope_parameters` per layer type, or from `rope_theta` with `rope_scaling`, which
    stretches full layers only, and `rope_local_base_freq`, as older checkpoints have them.
    """
    base = fields.number("rope_local_base_freq", 10_000.0)
    parameters = fields.optional("rope_parameters")
    if parameters is None:
        return rope_config(fields, positions, default_theta=1e6), RopeConfig(base)
    if not isinstance(parameters, Mapping) or set(parameters) - {
        "full_attention",
        "sliding_attention",
    }:
        raise CheckpointError("config.json: rope_parameters are not given per layer type")

    def of(kind: str, theta: float) -> RopeConfig:
        own = Fields({"rope_parameters": parameters.get(kind)})
        return rope_config(own, positions, default_theta=theta)

    return of("full_attention", fields.number("rope_theta", 1e6)), of("sliding_attention", base)
