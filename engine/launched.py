"""A step that was handed to the device and not read back yet."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import Tensor

from engine.logprobs import ScoreTensors
from engine.readback import Readback
from scheduler.plan import Scores, StepResult


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """What will come of a plan.

    Attributes:
        sent: the tokens int64 [sampled rows]; then the `ScoreTensors` of `asked`, if there are any;
            then those of `prompts`, if there are any.
        asked: sampled rows that tell log-probabilities, and of how many of the likeliest tokens.
        prompts: for each sequence that tells some of its prompt: of how many positions, and of how
            many of the likeliest tokens.
        broken: as in `StepResult`.
    """

    plan_id: int
    sent: Readback
    asked: dict[int, int] = field(default_factory=dict)
    prompts: list[tuple[int, int]] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)

    def result(self) -> StepResult:
        """Waits until the device is done with the step."""
        tokens, *told = self.sent.wait()
        scores: list[Scores | None] = []
        if self.asked:
            of_answers = ScoreTensors(*told[:4]).read()
            scores = [None] * len(tokens)
            for place, (row, most) in enumerate(self.asked.items()):
                scores[row] = of_answers.cut(place, 1, most)
        return StepResult(
            self.plan_id, tokens.tolist(), scores, self._of_prompts(told), self.broken
        )

    def _of_prompts(self, told: list[Tensor]) -> list[Scores]:
        if not self.prompts:
            return []
        whole = ScoreTensors(*told[-4:]).read()
        firsts = itertools.accumulate((count for count, _ in self.prompts), initial=0)
        return [
            whole.cut(first, count, most)
            for first, (count, most) in zip(firsts, self.prompts, strict=False)
        ]
