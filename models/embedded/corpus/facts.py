"""Questions with fixed answers, read from the text files in `texts/`.

A file is a list of facts. A fact starts with `== name` and has lines of these kinds; an indented
line continues the one above it:

    accept: regular expression that every right answer contains
    Q   a way to ask         {one|two} picks one of the alternatives
    H   a way to ask that training never sees: the evaluation uses it
    A   an answer
    M   what to say to "tell me more"
"""

import random
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from models.embedded.corpus.vocabulary import NAMES, PLACES, THINGS

TEXTS = Path(__file__).parent / "texts"
SUBJECTS = ("caching", "paging", "quire", "smalltalk", "unknown")
SLOTS = {"PLACE": PLACES, "PERSON": NAMES, "THING": THINGS}
CHOICE = re.compile(r"\{([^{}|]*\|[^{}]*)\}")


@dataclass
class Fact:
    """One subject that can be asked about in several ways."""

    name: str
    accept: str = ""
    questions: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)


def expand(text: str, rng: random.Random) -> str:
    """Picks one alternative of every `{a|b}` and fills the slots PLACE, PERSON and THING."""
    text = CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    for slot, words in SLOTS.items():
        if slot in text:
            word = rng.choice(words)
            text = text.replace(f"{{{slot}}}", word).replace(slot, word)
    return " ".join(text.split())


def logical_lines(text: str) -> list[str]:
    """Joins indented lines to the line they continue."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("  ") and lines:
            lines[-1] += " " + line.strip()
        elif line.strip():
            lines.append(line.strip())
    return lines


@cache
def load(subject: str) -> tuple[Fact, ...]:
    """All facts of one subject, in the order of the file."""
    facts: list[Fact] = []
    for line in logical_lines((TEXTS / f"{subject}.txt").read_text()):
        kind, _, rest = line.partition(" ")
        match kind:
            case "==":
                facts.append(Fact(rest))
            case "accept:":
                facts[-1].accept = rest
            case "Q":
                facts[-1].questions.append(rest)
            case "H":
                facts[-1].held_out.append(rest)
            case "A":
                facts[-1].answers.append(rest)
            case "M":
                facts[-1].more.append(rest)
            case _:
                raise ValueError(f"{subject}.txt: what kind of line is {line!r}?")
    return tuple(facts)


@cache
def prose() -> tuple[str, ...]:
    """Paragraphs without roles, for plain completions."""
    paragraphs = (TEXTS / "prose.txt").read_text().split("\n\n")
    return tuple(" ".join(paragraph.split()) for paragraph in paragraphs)
