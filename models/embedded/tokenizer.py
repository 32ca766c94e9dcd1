"""The tokenizer: byte-level BPE, learned from the corpus, and the marks of a chat."""

import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.embedded.corpus import Conversation, conversations

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = (PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES))
VOCABULARY = 2048

# Every digit is its own token, so that sums and counting see place values. The space in front of a
# number goes with the sign before it or stands alone, so that a digit is one token everywhere.
PIECES = Regex(
    r"'(?:s|t|re|ve|m|ll|d)\b|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+(?: (?=\p{N}))?|\s+(?!\S)|\s+"
)


def learn(seed: int, samples: int = 20_000) -> Tokenizer:
    """A tokenizer fitted to the text of `samples` conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (plain(chat) for chat in itertools.islice(conversations(seed, 4), samples))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def plain(chat: Conversation | str) -> str:
    """The text of a conversation without marks."""
    return chat if isinstance(chat, str) else "\n".join(message["content"] for message in chat)


def render(chat: Conversation | str) -> list[tuple[str, bool]]:
    """The pieces of a conversation as the chat template writes them, and which are answers."""
    if isinstance(chat, str):
        return [(BEGIN, False), (chat + END, True)]
    pieces = [(BEGIN, False)]
    for message in chat:
        pieces.append((f"<|{message['role']}|>", False))
        pieces.append((message["content"] + END, message["role"] == "assistant"))
    return pieces


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer, and its settings with the chat template, for Hugging Face loaders."""
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (Path(__file__).parent / "chat_template.jinja").read_text()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
