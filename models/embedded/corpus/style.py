"""How people type: politeness, missing signs, small letters, slips of the finger."""

import random

OPENERS = (
    "Please tell me: ",
    "Tell me, ",
    "Hi! ",
    "Hello, ",
    "Hey, ",
    "Hello! ",
    "Quick question: ",
    "Question: ",
    "I have a question. ",
    "I wonder: ",
    "Hey Quire, ",
    "Ok, ",
    "And ",
    "So, ",
    "Now ",
    "Please, ",
    "One more question: ",
    "Excuse me, ",
    "Dear model, ",
    "I would like to know: ",
)
CLOSERS = (" please", ", please", " for me", " now", " then", " exactly", ", thanks")


def slip(text: str, rng: random.Random) -> str:
    """One typing error: two letters swapped, one lost or one doubled; digits stay as they are."""
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    swapped = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return rng.choice((swapped, swapped, text[:i] + text[i + 1 :], text[:i] + text[i] + text[i:]))


def lower_first(text: str) -> str:
    """`Text` as it goes on after an opener; words all in capitals stay."""
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] in " '" else text


def typed(text: str, rng: random.Random) -> str:
    """`text` as one of many people would type it."""
    if rng.random() < 0.12:
        opener = rng.choice(OPENERS)
        text = opener + (text if opener.endswith(("! ", ". ")) else lower_first(text))
    if rng.random() < 0.07:
        mark = text[-1] if text[-1] in "?.!" else ""
        text = text.rstrip("?.!") + rng.choice(CLOSERS) + mark
    if rng.random() < 0.25:
        text = text.rstrip("?.!") or text
    if rng.random() < 0.03:
        text = text + rng.choice(("?", "!", "??", "...", " ?"))
    if rng.random() < 0.13:
        text = slip(text, rng)
    draw = rng.random()
    if draw < 0.22:
        text = text.lower()
    elif draw < 0.24:
        text = text.upper()
    return text
