"""GPT-2: learned positions, LayerNorm, biases everywhere, input-major weights on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.config import (
    CheckpointError,
    Fields,
    ModelConfig,
    activation,
    architecture,
    checkpoint_dtype,
    eos_token_ids,
)
from models.context import ForwardContext
from models.decoder import CausalLM
from models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear

ARCHITECTURE = "GPT2LMHeadModel"


def parse(fields: Fields) -> ModelConfig:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        fields.refuse(key, False)
    fields.refuse("scale_attn_weights", True)
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    layers = fields.integer("n_layer")
    if hidden % heads:
        raise CheckpointError(f"config.json: n_embd {hidden} is not a multiple of {heads} heads")
    return ModelConfig(
        architecture=architecture(fields),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=fields.integer("n_inner", 4 * hidden),
        activation=activation(fields, "activation_function", "gelu_new"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        max_position_embeddings=fields.integer("n_positions", 1024),
        rope=None,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=False,
        layer_windows=(0,) * layers,
        rope_layers=(False,) * layers,
        eos_token_ids=eos_token_ids(fields),
        dtype=checkpoint_dtype(fields),
    )


class Model(CausalLM):
    """The GPT-2 decoder."""

    prefix = "transformer."
    harmless = r"\.attn\.(masked_)?bias$"

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        super().__init__(config, dtype, device)
        hidden = config.hidden_size
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.positions = Embedding(config.max_position_embeddings, hidden, **factory)
        self.layers = nn.ModuleList(
            Block(config, layer, **factory) for layer in range(config.num_layers)
        )
        self.norm = LayerNorm(hidden, config.norm_eps, **factory)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """int64 [tokens] -> [tokens, hidden_size], the final norm applied"""
        x = self.embed(token_ids) + self.positions(ctx.positions)
        for layer in self.layers:
            x = layer(x, ctx)
        return self.norm(x)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = {
            "transformer.wte.weight": self.embed.weight,
            "transformer.wpe.weight": self.positions.weight,
            "transformer.ln_f.weight": self.norm.weight,
            "transformer.ln_f.bias": self.norm.bias,
        }
        if not self.config.tie_word_embeddings:
            tensors["lm_head.weight"] = self.head.weight
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.checkpoint_tensors().items():
                tensors[f"transformer.h.{index}.{name}"] = tensor
        return tensors


class Block(nn.Module):
    """Attention, then the MLP, each behind its norm and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int, **factory: Any):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.ln_1 = LayerNorm(hidden, config.norm_eps, **factory)
        self.ln_2 = LayerNorm(hidden, config.norm_eps, **factory)
        self.qkv = Linear(hidden, (3 * hidden,), bias=True, **factory)
        self.output = Linear(hidden, (hidden,), bias=True, **factory)
        self.up = Linear(hidden, (inner,), bias=True, **factory)
        self.down = Linear(inner, (hidden,), bias=True, **factory)
        self.activation = ACTIVATIONS[config.activation]
        self.layer = layer
        self.row_shape = (3, config.num_heads, config.head_dim)
        self.scale = config.head_dim**-0.5

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """[tokens, hidden_size] -> the same shape"""
        tokens = x.shape[0]
        query, key, value = self.qkv(self.ln_1(x)).view(tokens, *self.row_shape).unbind(1)
        out = ctx.attend(self.layer, query, key, value, scale=self.scale)
        x = self.output(out.view(tokens, -1)).add_(x)
        return self.down(self.activation(self.up(self.ln_2(x)))).add_(x)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name in ("ln_1", "ln_2"):
            norm = getattr(self, name)
            tensors |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
        for name, linear in {
            "attn.c_attn": self.qkv,
            "attn.c_proj": self.output,
            "mlp.c_fc": self.up,
            "mlp.c_proj": self.down,
        }.items():
            tensors |= {f"{name}.weight": linear.weight.t(), f"{name}.bias": linear.bias}
        return tensors
