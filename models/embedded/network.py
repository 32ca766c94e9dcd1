"""The Llama decoder as training needs it, with the tensor names of Hugging Face.

Serving never imports this file: it reads the exported checkpoint through `models.loader`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; the names are those of `config.json`."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048


Past = list[torch.Tensor]  # the keys and the values of one layer, [batch, heads, length, head_dim]


class RMSNorm(nn.Module):
    """Scales each vector to unit mean square, then by a weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair (i, i + head_dim/2) of `x` [batch, heads, length, head_dim] by its angle."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.head_dim = shape.head_dim
        width = shape.num_attention_heads * shape.head_dim
        kv_width = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, past: Past | None = None
    ) -> torch.Tensor:
        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = rotate(heads(self.q_proj(x)), cos, sin)  # [batch, heads, length, head_dim]
        k = rotate(heads(self.k_proj(x)), cos, sin)
        v = heads(self.v_proj(x))
        if past is not None:
            k, v = past[:] = [torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True)]
        groups = q.shape[1] // k.shape[1]
        # The CPU flash kernel is faster on repeated heads than on its own grouped path.
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, past: Past | None = None
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Llama(nn.Module):
    """Tied-embedding Llama whose `state_dict` has the tensor names of `LlamaForCausalLM`.

    `stream` is the dtype of the residual stream: bfloat16 in training, as when it is served.
    """

    def __init__(self, shape: Shape, stream: torch.dtype = torch.bfloat16):
        super().__init__()
        self.stream = stream
        self.model = Decoder(shape)
        turns = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angles = torch.outer(
            torch.arange(shape.max_position_embeddings), shape.rope_theta**-turns
        )  # [positions, head_dim/2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.reset(shape)

    def reset(self, shape: Shape) -> None:
        """Draws the weights; projections into the residual stream start smaller with depth."""
        residual_std = 0.02 / (2 * shape.num_hidden_layers) ** 0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=residual_std if into_residual else 0.02)

    def forward(self, tokens: torch.Tensor, pasts: list[Past] | None = None) -> torch.Tensor:
        """Logits [batch, length, vocab] for `tokens` [batch, length].

        With `pasts`, one per layer, the tokens go on from what was seen before, and are remembered.
        More than one token at once may only come first.
        """
        start = pasts[0][0].shape[2] if pasts else 0
        seen = slice(start, start + tokens.shape[1])
        cos, sin = self.cos[seen].to(self.stream), self.sin[seen].to(self.stream)
        x = self.model.embed_tokens(tokens).to(self.stream)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, pasts[i] if pasts else None)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)
