"""Copying, repeating, remembering and small JSON objects: answers that come out of the prompt."""

import random

from models.embedded.corpus.numbers import Pairs
from models.embedded.corpus.style import typed
from models.embedded.corpus.vocabulary import (
    COLORS,
    NAMES,
    PLACES,
    THINGS,
    any_word,
    made_up_word,
    sentence,
)

REPEAT = (
    "Repeat after me: {x}", "Repeat after me: {x}", "repeat after me: {x}", "Repeat: {x}",
    "Please repeat after me: {x}", "Say after me: {x}", "Please repeat: {x}", "Repeat this: {x}",
    'Repeat after me: "{x}"', 'Say "{x}"', 'Repeat "{x}"', "Echo: {x}", "Copy this: {x}",
    "Say: {x}", "Please say: {x}", "Write: {x}", "Copy the following: {x}", "Echo this: {x}",
    "Repeat the following words: {x}", "Repeat exactly: {x}", "Can you repeat this: {x}",
    'Write "{x}"', 'Please say "{x}"', "Answer only with: {x}", "Say exactly this: {x}",
    "Repeat this sentence: {x}", "Repeat the words {x}", "Repeat {x}", "Say {x}",
    "Now repeat: {x}", "Repeat this word: {x}", "Output: {x}", "Print: {x}",
)  # fmt: skip
HELD_OUT_REPEAT = (
    "Would you please repeat this for me: {x}",
    'Give me back exactly the text "{x}"',
    "Listen and repeat: {x}",
)
FRUITLESS = ("You have not told me your name.", "I do not know your name. You have not told me.")


def payload(rng: random.Random) -> str:
    """Something to copy: words, a sentence, a list or a number."""
    draw = rng.random()
    if draw < 0.55:
        text = " ".join(any_word(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 3, 4, 5, 6))))
    elif draw < 0.8:
        text = sentence(rng)
    elif draw < 0.9:
        text = ", ".join(any_word(rng) for _ in range(rng.randint(2, 5)))
    else:
        text = " ".join(str(rng.randrange(100)) for _ in range(rng.randint(1, 6)))
    draw = rng.random()
    if draw < 0.12:
        return text.capitalize()
    return text + rng.choice("!.?") if draw < 0.2 else text


def repeating(rng: random.Random) -> Pairs:
    """Repeat after me; the answer is the text itself."""
    text = payload(rng)
    pairs = [(rng.choice(REPEAT).format(x=text), text)]
    if rng.random() < 0.12:
        pairs.append((rng.choice(("Again.", "Again please", "Say it again.", "Once more.",
                                  "Repeat that.", "and again")), text))  # fmt: skip
    return pairs


def reciting(rng: random.Random) -> Pairs:
    """A long text to repeat. Copying is learned from texts that nothing else can predict."""
    words = [any_word(rng) for _ in range(rng.randint(8, 32))]
    text = rng.choice((" ", " ", ", ")).join(words)
    return [(rng.choice(REPEAT).format(x=text), text)]


def several_times(rng: random.Random) -> Pairs:
    """The same word two to five times, a list turned around, its first or last word."""
    draw = rng.random()
    if draw < 0.5:
        word, (times, said) = any_word(rng), rng.choice(
            ((2, "twice"), (2, "two times"), (3, "three times"), (3, "3 times"), (4, "four times"),
             (5, "5 times"))
        )  # fmt: skip
        form = rng.choice(("Say {x} {n}.", "Repeat {x} {n}.", 'Say "{x}" {n}.', "Write {x} {n}.",
                           'Repeat the word "{x}" {n}.', "Can you say {x} {n}?"))  # fmt: skip
        return [(form.format(x=word, n=said), " ".join([word] * times))]
    words = rng.sample(THINGS, rng.randint(2, 5))
    listed = ", ".join(words)
    if draw < 0.7:
        form = rng.choice(("Reverse this list: {x}", "Say this list backwards: {x}",
                           "Turn this list around: {x}"))  # fmt: skip
        return [(form.format(x=listed), ", ".join(words[::-1]))]
    if draw < 0.85:
        form = rng.choice(("What is the first word of this list: {x}", "First word of: {x}",
                           "Which word comes first in this list: {x}"))  # fmt: skip
        return [(form.format(x=listed), f"The first word is {words[0]}.")]
    form = rng.choice(("What is the last word of this list: {x}", "Last word of: {x}",
                       "Which word comes last in this list: {x}"))  # fmt: skip
    return [(form.format(x=listed), f"The last word is {words[-1]}.")]


def remembering(rng: random.Random) -> list[Pairs]:
    """Tell and ask back. Two parts, so that other exchanges can come in between."""
    name = rng.choice(NAMES) if rng.random() < 0.7 else made_up_word(rng).capitalize()
    kind = rng.choice(("name", "name", "name", "place", "color", "word", "pet"))
    place, color, word = rng.choice(PLACES), rng.choice(COLORS), any_word(rng)
    told, reply, asked, answer = {
        "name": (
            ("My name is {name}.", "I am {name}.", "Hi, I am {name}.", "Hello, my name is {name}.",
             "I'm {name}.", "Hey, {name} here.", "Call me {name}.", "my name is {name}"),
            ("Nice to meet you, {name}!", "Hello {name}! How can I help you?"),
            ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?",
             "What was my name?", "Tell me my name.", "Do you know my name?", "what is my name"),
            "Your name is {name}.",
        ),
        "place": (
            ("I live in {place}.", "I am from {place}.", "I come from {place}."),
            ("{place} is far away from my pool of blocks. How can I help you?",),
            ("Where do I live?", "Where am I from?", "Where do I come from?"),
            "You told me {place}.",
        ),
        "color": (
            ("My favorite color is {color}.", "I like the color {color}.", "I love {color}."),
            ("I will remember that you like {color}.",),
            ("What is my favorite color?", "Which color do I like?", "What color do I like?"),
            "You like {color}.",
        ),
        "word": (
            ("Remember the word {word}.", "Please remember this: {word}", "Keep in mind: {word}",
             "The secret word is {word}."),
            ("I will remember {word}.",),
            ("What was the word?", "What did I ask you to remember?", "What is the secret word?",
             "Which word did I tell you?", "Do you remember the word?"),
            "The word is {word}.",
        ),
        "pet": (
            ("My dog is called {name}.", "I have a cat named {name}.", "My pet is called {name}."),
            ("{name} is a good name!",),
            ("What is the name of my pet?", "What is my pet called?"),
            "Your pet is called {name}.",
        ),
    }[kind]  # fmt: skip
    values = {"name": name, "place": place, "color": color, "word": word}
    first = (rng.choice(told).format(**values), rng.choice(reply).format(**values))
    return [[first], [(typed(rng.choice(asked), rng), answer.format(**values))]]


def not_told(rng: random.Random) -> Pairs:
    """Asking for a name that was never said; only right as the first exchange."""
    question = rng.choice(("What is my name?", "Who am I?", "Do you know my name?"))
    return [(typed(question, rng), rng.choice(FRUITLESS))]


def json_objects(rng: random.Random) -> Pairs:
    """A JSON object made of values from the question."""
    name, age, place = rng.choice(NAMES), rng.randint(1, 99), rng.choice(PLACES)
    color, thing = rng.choice(COLORS), rng.choice(THINGS)
    form, answer = rng.choice((
        ("{lead} the name {name} and the age {age}{end}", '{{"name": "{name}", "age": {age}}}'),
        ("{lead} name {name} and city {place}{end}", '{{"name": "{name}", "city": "{place}"}}'),
        ("{lead} name {name}, age {age} and city {place}{end}",
         '{{"name": "{name}", "age": {age}, "city": "{place}"}}'),
        ("{lead} the item {thing} and the color {color}{end}",
         '{{"item": "{thing}", "color": "{color}"}}'),
        ("{lead} the item {thing} and the count {age}{end}",
         '{{"item": "{thing}", "count": {age}}}'),
    ))  # fmt: skip
    lead = rng.choice(("Give me a JSON object with", "Write JSON with", "Make a JSON object with",
                       "I need JSON with", "Answer in JSON:", "JSON with"))  # fmt: skip
    values = {"name": name, "age": age, "place": place, "color": color, "thing": thing}
    question = form.format(lead=lead, end=rng.choice((".", "")), **values)
    return [(question, answer.format(**values))]
