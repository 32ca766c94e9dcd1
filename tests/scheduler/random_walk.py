"""The state machine driven by plain random numbers: `python -m tests.scheduler.random_walk`.

Hypothesis finds small counterexamples, but spends most of its time on choosing, and likes to repeat
itself. A walk of a million operations takes minutes here and tries settings evenly. Every walk has
a seed of its own, which a failure prints: `--seed N --steps 1` repeats it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from typing import Any, ClassVar

from hypothesis.stateful import INITIALIZE_RULE_MARKER
from hypothesis.strategies import SearchStrategy
from hypothesis.strategies._internal.lazy import unwrap_strategies

from tests.scheduler.test_state_machine import SchedulerMachine

STEPS_PER_WALK = 120
START = getattr(SchedulerMachine.start, INITIALIZE_RULE_MARKER)


class Draw:
    """Values of the strategies that the machine names, each as likely as the others."""

    def __init__(self, seed: int) -> None:
        self.numbers = random.Random(seed)

    def draw(self, strategy: SearchStrategy[Any]) -> Any:
        found: Any = unwrap_strategies(strategy)
        kind = type(found).__name__
        if kind == "SampledFromStrategy":
            return self.numbers.choice(list(found.elements))
        if kind == "IntegersStrategy":
            return self.numbers.randint(found.start, found.end)
        if kind == "BooleansStrategy":
            return self.numbers.random() < 0.5
        if kind == "ListStrategy":
            count = self.numbers.randint(found.min_size, int(found.max_size))
            return [self.draw(found.element_strategy) for _ in range(count)]
        if kind == "JustStrategy":
            return found.value
        if kind == "DataStrategy":
            return self
        raise TypeError(f"no way to draw from {found}")


class Walker(SchedulerMachine):
    """The machine, counting for itself."""

    rules_run = 0
    seen: ClassVar[Counter[str]] = Counter()


def walk(seed: int) -> None:
    """One history from its settings to the last answer."""
    draw, machine = Draw(seed), Walker()
    weights = {"add": 3, "plan": 8, "commit": 8, "abort": 1, "fail": 0.2}
    for rule in [START, *[None] * STEPS_PER_WALK]:
        if rule is None:
            able = [r for r in machine.rules if all(fits(machine) for fits in r.preconditions)]
            shares = [weights.get(r.function.__name__, 1) for r in able]
            rule = draw.numbers.choices(able, shares)[0]
        rule.function(machine, **{name: draw.draw(s) for name, s in rule.arguments.items()})
        machine.holds()
    machine.teardown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="operations (default 1000000)")
    parser.add_argument("--seed", type=int, default=1, help="of the first walk")
    options = parser.parse_args()
    began, seed = time.monotonic(), options.seed
    while Walker.rules_run < options.steps:
        try:
            walk(seed)
        except BaseException:
            print(f"walk {seed} failed: --seed {seed} --steps 1 repeats it")
            raise
        seed += 1
    print(
        f"{Walker.rules_run:,} operations in walks {options.seed} to {seed - 1}, "
        f"{time.monotonic() - began:.0f} s: {dict(Walker.seen)}"
    )


if __name__ == "__main__":
    main()
