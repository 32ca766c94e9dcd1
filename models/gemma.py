"""The decoder of Gemma 2 and 3: Llama with norms on both sides of attention and MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.context import ForwardContext
from models.decoder import Decoder, DecoderLayer
from models.layers import CenteredHeadNorm, CenteredRMSNorm
from models.rotary import Rotary, Rotation


class Model(Decoder):
    """Embeddings are scaled by sqrt(hidden_size); sliding layers may turn by angles of their own;
    logits are capped."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        super().__init__(config, dtype, device, Layer)
        # The factor is a number of the model's dtype: 55.5 for sqrt(3072) in bfloat16.
        self.embed_scale = torch.tensor(config.hidden_size**0.5, dtype=dtype).item()
        self.sliding_rotary = self.rotary
        if config.sliding_rope is not None:
            self.sliding_rotary = Rotary(
                config.sliding_rope, config.head_dim, config.max_position_embeddings, device
            )

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """int64 [tokens] -> [wanted rows, hidden_size], the final norm applied"""
        x = self.embed(token_ids).mul_(self.embed_scale)
        full = sliding = self.rotary(ctx.positions)
        if self.sliding_rotary is not self.rotary:
            sliding = self.sliding_rotary(ctx.positions)
        for layer in self.layers:
            x = layer(x, sliding if layer.attention.window else full, ctx)
        return ctx.pick(self.norm(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: rows of `forward` -> float32 [rows, vocab_size]"""
        logits, cap = super().logits(hidden), self.config.logit_softcap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def likeliest(self, hidden: Tensor) -> Tensor:
        """int64 [rows], the next token of the largest score, the first of equal ones."""
        # Capping makes large scores equal.
        capped = self.config.logit_softcap
        return self.logits(hidden).argmax(-1) if capped else super().likeliest(hidden)


class Layer(DecoderLayer):
    """Attention, then the gated MLP, each between two norms and added to the stream."""

    norm_type, head_norm_type = CenteredRMSNorm, CenteredHeadNorm

    def __init__(self, config: ModelConfig, layer: int, **factory: Any):
        super().__init__(config, layer, **factory)
        self.after_attention = self.norm_type(config.hidden_size, config.norm_eps, **factory)
        self.after_mlp = self.norm_type(config.hidden_size, config.norm_eps, **factory)

    def __call__(self, x: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        """[tokens, hidden_size] -> the same shape"""
        y = self.attention(self.attention_norm(x), rotation, ctx)
        x = self.after_attention(y).add_(x)
        return self.after_mlp(self.mlp(self.mlp_norm(x))).add_(x)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return super().checkpoint_tensors() | {
            "post_attention_layernorm.weight": self.after_attention.weight,
            "pre_feedforward_layernorm.weight": self.mlp_norm.weight,
            "post_feedforward_layernorm.weight": self.after_mlp.weight,
        }

    def prepare(self) -> None:
        super().prepare()
        for norm in (self.after_attention, self.after_mlp):
            norm.expand()
