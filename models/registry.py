"""Which family serves which architecture name.

Nothing here imports torch before a decoder is built: a config can be read, and a model's memory
be planned, in a fraction of the time that importing torch takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from models.config import CheckpointError, Fields, ModelConfig, architecture

if TYPE_CHECKING:
    import torch

    from models.decoder import CausalLM


@dataclass(frozen=True, slots=True)
class Family:
    """Modules of this folder, imported when they are needed.

    Attributes:
        config: the one whose `parse` reads the family's `config.json`
        decoder: module and class of its decoder
    """

    config: str
    decoder: str = "decoder.Decoder"


FAMILIES = {
    "GPT2LMHeadModel": Family("gpt2_config", "gpt2.Model"),
    "Gemma2ForCausalLM": Family("gemma2", "gemma.Model"),
    "Gemma3ForCausalLM": Family("gemma3", "gemma.Model"),
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "SmolLM3ForCausalLM": Family("smollm3"),
}

REFUSED = {
    "Gemma3ForConditionalGeneration": "it reads images too; only its text-only relatives,"
    " published as Gemma3ForCausalLM, are served",
}


def parse_config(raw: dict, generation: dict | None = None) -> ModelConfig:
    """The config of a checkpoint from its `config.json` and, if any, `generation_config.json`.

    Raises CheckpointError, in one line, for anything this server would get wrong.
    """
    fields = Fields(raw, generation)
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method", "unknown") if isinstance(raw[key], dict) else "?"
            raise CheckpointError(
                f"the checkpoint is quantized ({method}), which is not supported;"
                " use the original bfloat16 or float16 one"
            )
    family = _family(architecture(fields))
    parsed: ModelConfig = import_module(f"models.{family.config}").parse(fields)
    return parsed


def build(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """The decoder of `config` with allocated, unset weights; on device "meta" without memory."""
    module, _, name = _family(config.architecture).decoder.partition(".")
    decoder: Any = getattr(import_module(f"models.{module}"), name)
    made: CausalLM = decoder(config, dtype, device)
    return made


def _family(name: str) -> Family:
    if name in REFUSED:
        raise CheckpointError(f"architecture {name!r} is not supported: {REFUSED[name]}")
    if name not in FAMILIES:
        raise CheckpointError(
            f"architecture {name!r} is not supported (supported: {', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES[name]
