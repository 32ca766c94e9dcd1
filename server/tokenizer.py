"""The text side of a model: its tokenizer, its chat template and its special tokens, read from the
files of its checkpoint. Needs no weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from server.detokenizer import Detokenizer, Vocabulary, decode
from server.template import ChatTemplate, TemplateError

logger = logging.getLogger("quire.server")


class TextModelError(ValueError):
    """The folder holds no usable tokenizer; the text says what is missing."""


class TextModel:
    """Text to token ids and back.

    Attributes:
        template: the chat template, or None for a base model.
        no_template: why there is none, for the client that asks for a chat.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        *,
        no_template: str = "this model has no chat template; use /v1/completions",
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self.template, self.no_template = template, no_template

    @classmethod
    def load(cls, folder: str | Path) -> TextModel:
        """Reads `tokenizer.json`, `tokenizer_config.json` and the template files of a checkpoint.

        A template that does not compile does not stop the server: completions still work.

        Raises:
            TextModelError: no `tokenizer.json`, or a broken one.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TextModelError(f"{folder} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise TextModelError(f"{path} cannot be read: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        source = _template_source(folder, config)
        if source is None:
            return cls(tokenizer)
        special = _read_json(folder / "special_tokens_map.json") | config
        try:
            return cls(tokenizer, ChatTemplate(source, _special_tokens(special)))
        except TemplateError as error:
            logger.warning("%s: %s", folder, error)
            return cls(tokenizer, no_template=str(error))

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Long texts take a while but let other threads run: only the
        batch call of the library releases the interpreter lock."""
        batch = self._tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in batch]

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of a whole prompt."""
        return decode(self.detokenizer(skip_special=skip_special), tokens)

    def token_bytes(self, token: int) -> bytes:
        """See `Vocabulary.token_bytes`."""
        return self._vocabulary.token_bytes(token)

    def detokenizer(
        self, *, skip_special: bool = True, continues: bool = False, keep: Sequence[str] = ()
    ) -> Detokenizer:
        """See `Vocabulary.detokenizer`."""
        return self._vocabulary.detokenizer(
            skip_special=skip_special, continues=continues, keep=keep
        )

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A chat as the text that the model goes on with. `developer` becomes `system` where the
        template does not know it.

        Args:
            variables: the template's own, by name: see `ChatTemplate.variables`.

        Raises:
            TemplateError: no template, or it refuses the messages.
        """
        if self.template is None:
            raise TemplateError(self.no_template)
        if not self.template.has_developer:
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
        if continue_final_message:
            return self.template.render_open(messages, variables=variables, tools=tools)
        return self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
            tools=tools,
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TextModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise TextModelError(f"{path} must hold a JSON object")
    return content


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """The template named `default`: a file of its own goes before the tokenizer's settings."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = _read_json(folder / "chat_template.json").get("chat_template")
    found = found or config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default") or next(iter(named.values()), None)
    return found if isinstance(found, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like; each is a string or an object with `content`."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens
