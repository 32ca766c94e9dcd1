"""Which decoders the compiled step of CPUs serves, and what it is told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.layers import PANEL, RMSNorm

if TYPE_CHECKING:
    from kernels.cpu_step import Step, StepLayer
    from models.context import ForwardContext
    from models.decoder import Decoder, DecoderLayer


def compile_step(decoder: Decoder, ctx: ForwardContext) -> Step | None:
    """The step of a decoder that `can_compile` over the pages of `ctx`; None where it does not
    know their format."""
    if ctx.backend.name != "numba" or len(ctx.groups) != 1:
        return None
    from kernels.cpu_step import Step, serves

    if not serves(ctx.pages[0]):
        return None
    return Step(
        decoder.embed.weight,
        [_layer(layer) for layer in decoder.layers],
        decoder.norm.scale,
        decoder.config.norm_eps,
        decoder.rotary.cos,
        decoder.rotary.sin,
        decoder.config.num_heads,
        ctx.pages,
    )


def can_compile(decoder: Decoder) -> bool:
    """Whether a prepared decoder's layers are what the step knows, and its weights packed as the
    step reads them."""
    from models.decoder import DecoderLayer

    config = decoder.config
    return (
        config.activation == "silu"
        and not config.attention_softcap
        and len(set(config.layer_windows)) == 1
        and config.head_dim % 2 == 0
        and type(decoder.norm) is RMSNorm
        and all(type(layer) is DecoderLayer for layer in decoder.layers)
        and all(layer.mlp.down.inputs % PANEL == 0 for layer in decoder.layers)
        and all(linear.few and linear.few.in_panels for linear in decoder.linears())
    )


def _layer(layer: DecoderLayer) -> StepLayer:
    from kernels.cpu_step import StepLayer

    attention = layer.attention
    qkv, output, gate_up, down = (linear.few for linear in layer.linears)
    return StepLayer(
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
        attention_norm=layer.attention_norm.scale,
        mlp_norm=layer.mlp_norm.scale,
        head_norm=attention.head_scale,
        rotated=attention.rotated,
        scale=attention.options["scale"],
        window=attention.window,
    )
