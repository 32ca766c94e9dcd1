"""Small tokenizers of both kinds, and a chat template, made on the spot."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from server.template import ChatTemplate
from server.tokenizer import TextModel

END, START, BOS = "<|end|>", "<|start|>", "<|bos|>"

CHATML = """\
{{ bos_token }}
{%- for message in messages %}
{{- '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start|>assistant\n' }}
{%- endif %}
"""


@cache
def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE: the end token is 0; a BOS is added to every text that asks for it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END, START, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, how are you? ünïcödé 👩‍👩‍👧 漢字 "] * 20, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


SENTENCEPIECE_DECODERS = {
    "llama": decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    ),
    "gemma": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    ),
}


@cache
def sentencepiece_tokenizer(kind: str) -> Tokenizer:
    """Pieces of letters, U+2581 for a space, byte tokens for everything else."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz", "▁a", "▁▁", "he", "é"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "▁"), ("h", "e")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = SENTENCEPIECE_DECODERS[kind]
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@cache
def chat_model() -> TextModel:
    """The byte-level tokenizer with a ChatML-like template."""
    return TextModel(byte_level_tokenizer(), ChatTemplate(CHATML, {"bos_token": BOS}))


def ids_of(text: str) -> list[int]:
    """Token ids of `text`, no special ones."""
    return chat_model().encode([text], add_special_tokens=False)[0]
