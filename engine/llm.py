"""Offline generation: the engine's loop, driven by the caller."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from configs.settings import Settings
from engine.build import build
from engine.loop import EngineLoop
from engine.protocol import Abort, StepOutput, Submit, TokenDelta
from scheduler import request as requests
from scheduler.request import InvalidRequest, SamplingParams


@dataclass(slots=True)
class Completion:
    """One answer. `token_ids` contain the end-of-sequence token where it ended one."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


@dataclass(slots=True)
class GenerateOutput:
    """A prompt and its n answers."""

    prompt_token_ids: list[int]
    outputs: list[Completion]


class LLM:
    """A model to generate with in this process.

        llm = LLM("path/to/checkpoint", dtype="float32")
        for output in llm.generate(["The cache"], SamplingParams(temperature=0, max_tokens=16)):
            print(output.outputs[0].text)

    Args:
        model: folder, Hugging Face id, or "embedded".
        settings: any of the server's settings by its flat name (`block_size=32`).

    Raises:
        engine.build.StartError: the model cannot be served as it is set up.
    """

    def __init__(self, model: str = "embedded", **settings: Any) -> None:
        self._loop: EngineLoop = build(Settings.of(model=model, **settings))
        tokenizer = Path(self._loop.info.model_path) / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(str(tokenizer)) if tokenizer.exists() else None
        self._next_id = 0

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        use_tqdm: bool = True,
    ) -> list[GenerateOutput]:
        """Continues every prompt, all of them batched together.

        Args:
            prompts: texts, or lists of token ids.
            n: answers per prompt.

        Returns:
            one output per prompt, in order.

        Raises:
            InvalidRequest: a prompt cannot be served (too long, unknown token id, ...).
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        batch = [self._request(prompt, params or SamplingParams(), n) for prompt in texts]
        answers = {r.id: [Completion(i) for i in range(n)] for r in batch}
        self._loop.take(Submit(batch))
        try:
            with tqdm(total=n * len(batch), disable=not use_tqdm, unit="answer") as bar:
                while self._loop.has_work:
                    self._loop.step()
                    bar.update(_collect(self._loop.collect(), answers))
                _collect(self._loop.collect(), answers)
        finally:
            # Does nothing unless an exception left some of them.
            self._loop.take(Abort([request.id for request in batch]))
            self._loop.collect()
        return [self._output(request.prompt_ids, answers[request.id]) for request in batch]

    def close(self) -> None:
        """Writes what is worth keeping to the disk tier, where there is one, and gives it back."""
        self._loop.close()

    def _request(
        self, prompt: str | Sequence[int], params: SamplingParams, n: int
    ) -> requests.Request:
        info = self._loop.info
        self._next_id += 1
        return requests.build(
            f"offline-{self._next_id}",
            tuple(self._encode(prompt) if isinstance(prompt, str) else prompt),
            params,
            n=n,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            seed=secrets.randbits(63),
        )

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise InvalidRequest("this checkpoint has no tokenizer.json: give token ids", "prompt")
        return self._tokenizer.encode(text).ids  # type: ignore[no-any-return]

    def _output(self, prompt_ids: tuple[int, ...], answers: list[Completion]) -> GenerateOutput:
        if self._tokenizer is not None:
            for answer in answers:
                answer.text = self._tokenizer.decode(answer.token_ids)
        return GenerateOutput(list(prompt_ids), answers)


def _collect(output: StepOutput, answers: dict[str, list[Completion]]) -> int:
    """Folds a step into the answers; returns how many it ended."""
    for refusal in output.refused:
        raise InvalidRequest(refusal.message, refusal.param, refusal.code)
    for failure in output.failed:
        raise RuntimeError(failure.message)
    return sum(_fold(answers[delta.request_id][delta.index], delta) for delta in output.deltas)


def _fold(answer: Completion, delta: TokenDelta) -> bool:
    answer.token_ids.extend(delta.tokens)
    answer.finish_reason = delta.finish_reason
    return delta.finish_reason is not None
