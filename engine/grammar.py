"""Grammars: from what a client wrote to matchers that know which tokens may come next.

llguidance does the work. Needs no torch: the process that tries grammars out imports it too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from scheduler.request import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# White space between the tokens of JSON: none, one space, or a new line with its indentation.
# Were it unbounded, a model could write nothing else until its answer is full.
JSON_WHITESPACE: Final = r" |\n {0,16}"
JSON_OPTIONS: Final[JsonCompileOptions] = {
    "whitespace_flexible": True,
    "whitespace_pattern": JSON_WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,  # what cannot be held is refused, never left out
}
# An ambiguous grammar may take longer with every token: with llguidance's own limit of 50,000
# items nearly a second for one, with this one at most tens of milliseconds.
LIMITS: Final = LLParserLimits(step_max_items=3000, verbose_errors=False)

MAX_REASON: Final = 300  # characters of an error

CACHED_GRAMMARS: Final = 256
CACHED_CHARACTERS: Final = 2 << 20  # of source text; a compiled grammar takes up to 150 times that
COMPILING_THREADS: Final = 2


class GrammarError(ValueError):
    """A grammar cannot be used; the text says why, in one line."""

    def __init__(self, why: str) -> None:
        super().__init__(" ".join(why.split())[:MAX_REASON])


class GrammarCompiler:
    """Compiles grammars for one model's tokens. The tokenizer is read at the first one, which
    takes about a second for 150,000 tokens.

    Args:
        folder: the checkpoint's, with its `tokenizer.json`.
        vocab_size: of the model's logits.
        eos_token_ids: what may follow a complete answer.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._folder, self._vocab_size, self._eos = folder, vocab_size, eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._loading = threading.Lock()

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning of an answer; sequences take copies of it.

        Raises:
            GrammarError: the grammar is none, or nothing matches it.
        """
        tokenizer = self.tokenizer
        try:
            matcher = LLMatcher(tokenizer, _source(grammar), log_level=0, limits=LIMITS)
        except ValueError as error:
            raise GrammarError(str(error)) from None
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return matcher

    @property
    def tokenizer(self) -> LLTokenizer:
        """The model's tokens as llguidance sees them.

        Raises:
            GrammarError: there is no `tokenizer.json`, or it is of a kind that cannot be read.
        """
        with self._loading:
            if self._tokenizer is None:
                try:
                    self._tokenizer = self._load()
                except (OSError, ValueError) as error:
                    raise GrammarError(f"not with this model's tokenizer: {error}") from None
            return self._tokenizer

    def _load(self) -> LLTokenizer:
        if not self._eos:
            raise ValueError("it has no end-of-sequence token")
        text = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos)


def _source(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)


class GrammarCache:
    """Compiled grammars, those used last. Compiling has threads of its own and does not hold the
    interpreter lock, so that steps go on meanwhile."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._threads = ThreadPoolExecutor(COMPILING_THREADS, "grammar")
        self._compiled: OrderedDict[tuple[str, str], Future[LLMatcher]] = OrderedDict()
        self._characters = 0

    def get(self, grammar: Grammar) -> Future[LLMatcher]:
        """The matcher to copy, or the `GrammarError` that compiling it raised."""
        key = (grammar.kind, grammar.text)
        found = self._compiled.get(key)
        if found is None:
            found = self._compiled[key] = self._threads.submit(self._compiler.compile, grammar)
            self._characters += len(grammar.text)
            self._shrink()
        self._compiled.move_to_end(key)
        return found

    def _shrink(self) -> None:
        while len(self._compiled) > 1 and (
            len(self._compiled) > CACHED_GRAMMARS or self._characters > CACHED_CHARACTERS
        ):
            (_, text), _ = self._compiled.popitem(last=False)
            self._characters -= len(text)
