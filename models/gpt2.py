"""GPT-2: learned positions, LayerNorm, biases everywhere, input-major weights on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.context import ForwardContext
from models.decoder import CausalLM
from models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear


class Model(CausalLM):
    """The GPT-2 decoder."""

    prefix = "transformer."
    harmless = r"\.attn\.(masked_)?bias$"

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        super().__init__(config, dtype, device)
        hidden = config.hidden_size
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.positions = Embedding(config.max_position_embeddings, hidden, **factory)
        self.layers = [Block(config, layer, **factory) for layer in range(config.num_layers)]
        self.norm = LayerNorm(hidden, config.norm_eps, **factory)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """int64 [tokens] -> [wanted rows, hidden_size], the final norm applied"""
        x = self.embed(token_ids) + self.positions(ctx.positions)
        for layer in self.layers:
            x = layer(x, ctx)
        return ctx.pick(self.norm(x))

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

    def linears(self) -> tuple[Linear, ...]:
        blocks = ((layer.qkv, layer.output, layer.up, layer.down) for layer in self.layers)
        return tuple(linear for block in blocks for linear in block)

    def prepare(self) -> None:
        super().prepare()
        for linear in self.linears():
            linear.pack()


class Block:
    """Attention, then the MLP, each behind its norm and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int, **factory: Any):
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

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
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
