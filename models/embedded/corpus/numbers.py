"""Small sums, counting and comparing.

A skill takes a random source and gives a list of (question, answer) pairs: one pair, or more when
later questions follow up on the first.
"""

import random

from models.embedded.corpus.style import typed
from models.embedded.corpus.vocabulary import NAMES, NUMBER_WORDS, PLURALS

Pairs = list[tuple[str, str]]

ADD = (
    "{a} + {b}", "{a} + {b} = ?", "{a}+{b}", "{a}+{b}=", "{a} + {b} =", "What is {a} + {b}?",
    "What's {a} + {b}?", "What is {a}+{b}?", "What is {a} plus {b}?", "How much is {a} + {b}?",
    "How much is {a} plus {b}?", "Add {a} and {b}.", "Add {b} to {a}.", "{a} plus {b}",
    "Calculate {a} + {b}.", "Compute {a} + {b}.", "What is the sum of {a} and {b}?",
    "Tell me the sum of {a} and {b}.", "Can you add {a} and {b}?", "What does {a} + {b} make?",
    "What do you get for {a} + {b}?", "{a} and {b} make?", "Solve {a} + {b}.",
    "What is {a} and {b} together?", "Please compute {a} plus {b}.", "Sum of {a} and {b}?",
    "Do you know what {a} + {b} is?", "What do I get if I add {a} and {b}?",
)  # fmt: skip
SUBTRACT = (
    "{a} - {b}", "{a} - {b} = ?", "{a}-{b}", "{a}-{b}=", "{a} - {b} =", "What is {a} - {b}?",
    "What's {a} - {b}?", "What is {a}-{b}?", "What is {a} minus {b}?", "How much is {a} - {b}?",
    "How much is {a} minus {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}.",
    "{a} minus {b}", "Calculate {a} - {b}.", "Compute {a} - {b}.", "Solve {a} - {b}.",
    "What is the difference of {a} and {b}?", "Can you subtract {b} from {a}?",
    "What is left of {a} when I take away {b}?", "What do you get for {a} - {b}?",
    "Please compute {a} minus {b}.", "Do you know what {a} - {b} is?", "Take {b} from {a}.",
)  # fmt: skip
MULTIPLY = (
    "{a} x {b}", "{a} * {b}", "{a}*{b}", "What is {a} x {b}?", "What is {a} times {b}?",
    "What is {a} * {b}?", "How much is {a} times {b}?", "Multiply {a} by {b}.", "{a} times {b}",
    "Calculate {a} * {b}.", "Multiply {a} and {b}.", "Compute {a} times {b}.",
)  # fmt: skip
HELD_OUT_ADD = (
    "I need the result of {a} + {b}.",
    "Would you work out {a} plus {b} for me?",
    "If you put {a} and {b} together, what is the sum?",
)
HELD_OUT_SUBTRACT = (
    "I need the result of {a} - {b}.",
    "Would you work out {a} minus {b} for me?",
    "If you take {b} away from {a}, what is left?",
)
TOO_LARGE = (
    "That is too large for me. I only do small sums.",
    "These numbers are too large for me. I am a very small model.",
)


def operands(rng: random.Random) -> tuple[int, int]:
    """Mostly 0 to 20, where every case must be known; sometimes up to 99."""
    top = 20 if rng.random() < 0.75 else 99
    return rng.randint(0, top), rng.randint(0, top)


def said(number: int, rng: random.Random) -> str:
    """Digits, or now and then the word."""
    return NUMBER_WORDS[number] if number <= 20 and rng.random() < 0.06 else str(number)


def solved(a: int, sign: str, b: int) -> str:
    """`a + b = c`, which all answers contain."""
    result = {"+": a + b, "-": a - b, "x": a * b}[sign]
    return f"{a} {sign} {b} = {result}"


def sums(rng: random.Random) -> Pairs:
    """One sum, sometimes with a second one that goes on from its result."""
    a, b = operands(rng)
    draw = rng.random()
    if draw < 0.5:
        sign, forms = "+", ADD
    elif draw < 0.9:
        sign, forms = "-", SUBTRACT
        if a < b and rng.random() < 0.75:
            a, b = b, a
    else:
        sign, forms = "x", MULTIPLY
        a, b = rng.randint(0, 10), rng.randint(0, 10)
    question = rng.choice(forms).format(a=said(a, rng), b=said(b, rng))
    pairs = [(typed(question, rng), solved(a, sign, b) + ".")]
    result = {"+": a + b, "-": a - b, "x": a * b}[sign]
    if rng.random() < 0.15 and 0 <= result <= 99:
        pairs.append(further(result, rng))
    elif rng.random() < 0.15:
        c, d = operands(rng)
        pairs.append((rng.choice((f"And {c} + {d}?", f"and {c}+{d}", f"And what about {c} + {d}?")),
                      solved(c, "+", d) + "."))  # fmt: skip
    return pairs


def further(result: int, rng: random.Random) -> tuple[str, str]:
    """A question about the result of the sum before."""
    c = rng.randint(0, min(20, result) if rng.random() < 0.5 else 20)
    if c <= result and rng.random() < 0.4:
        form = rng.choice(("And minus {c}?", "Take away {c} from that.", "Minus {c}?", "minus {c}"))
        return form.format(c=c), solved(result, "-", c) + "."
    form = rng.choice(
        ("And plus {c}?", "Now add {c}.", "Add {c} to that.", "plus {c}", "Plus {c}?")
    )
    return form.format(c=c), solved(result, "+", c) + "."


def stories(rng: random.Random) -> Pairs:
    """A sum told as a little story."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    things, name = rng.choice(PLURALS), rng.choice(NAMES)
    if rng.random() < 0.5:
        form = rng.choice((
            "I have {a} {things} and get {b} more. How many do I have?",
            "{name} has {a} {things} and finds {b} more. How many {things} are there?",
            "There are {a} {things} here and {b} {things} there. How many are there in all?",
            "{name} buys {a} {things} and then {b} more. How many {things} is that?",
        ))  # fmt: skip
        sign, result = "+", a + b
    else:
        a, b = max(a, b), min(a, b)
        form = rng.choice((
            "I have {a} {things} and give away {b}. How many are left?",
            "{name} has {a} {things} and loses {b}. How many {things} are left?",
            "There are {a} {things}. {name} takes {b}. How many are left?",
            "I had {a} {things} and ate {b}. How many do I have now?",
        ))  # fmt: skip
        sign, result = "-", a - b
    question = form.format(a=a, b=b, things=things, name=name)
    return [(typed(question, rng), f"{solved(a, sign, b)}, so the answer is {result} {things}.")]


def chains(rng: random.Random) -> Pairs:
    """Three numbers, solved in two steps."""
    a, b, c = (rng.randint(0, 10) for _ in range(3))
    form = rng.choice(("{a} + {b} + {c}", "What is {a} + {b} + {c}?", "Add {a}, {b} and {c}.",
                       "How much is {a} + {b} + {c}?", "{a}+{b}+{c}"))  # fmt: skip
    steps = f"{solved(a, '+', b)}, and {solved(a + b, '+', c)}."
    return [(typed(form.format(a=a, b=b, c=c), rng), steps)]


def too_large(rng: random.Random) -> Pairs:
    """Sums that the model must decline."""
    a, b = rng.randint(200, 10 ** rng.randint(3, 6)), rng.randint(100, 10 ** rng.randint(3, 6))
    sign = rng.choice("+-*/")
    form = rng.choice(("{a} {sign} {b}", "What is {a} {sign} {b}?", "Compute {a} {sign} {b}.",
                       "How much is {a} {sign} {b}?", "{a}{sign}{b}"))  # fmt: skip
    return [(typed(form.format(a=a, b=b, sign=sign), rng), rng.choice(TOO_LARGE))]


def row(numbers: range) -> str:
    """`1, 2, 3.`"""
    return ", ".join(map(str, numbers)) + "."


def counting(rng: random.Random) -> Pairs:
    """Counting up, down or in steps, sometimes asked to go on or to turn around."""
    draw = rng.random()
    if draw < 0.3:
        end = rng.choice((3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10, 12, 15, 20, 20, 25, 30))
        form = rng.choice(("Count to {b}.", "Count up to {b}.", "Can you count to {b}?",
                           "Count from 1 to {b}.", "Please count to {b}.", "Count until {b}.",
                           "Say the numbers from 1 to {b}.", "List the numbers up to {b}.",
                           "Count from one to {b}.", "Write the numbers 1 to {b}."))  # fmt: skip
        numbers = range(1, end + 1)
        question = form.format(b=said(end, rng))
    elif draw < 0.6:
        a = rng.randint(0, 90)
        b = a + rng.randint(2, 16)
        form = rng.choice(("Count from {a} to {b}.", "Count up from {a} to {b}.",
                           "Can you count from {a} to {b}?", "Write the numbers {a} to {b}.",
                           "List the numbers from {a} to {b}.",
                           "Start at {a} and count to {b}."))  # fmt: skip
        numbers = range(a, b + 1)
        question = form.format(a=said(a, rng), b=said(b, rng))
    elif draw < 0.8:
        a = rng.choice((3, 5, 10, 10, 10, 20, rng.randint(3, 99)))
        b = max(rng.choice((0, 1, 1, a - rng.randint(2, 16))), a - 20, 0)
        form = rng.choice(("Count backwards from {a} to {b}.", "Count down from {a} to {b}.",
                           "Count back from {a} to {b}.",
                           "Can you count backwards from {a} to {b}?",
                           "List the numbers from {a} down to {b}."))  # fmt: skip
        if b == 1 and rng.random() < 0.5:
            form = rng.choice(("Count backwards from {a}.", "Count down from {a}.",
                               "Can you count down from {a}?"))  # fmt: skip
        numbers = range(a, b - 1, -1)
        question = form.format(a=said(a, rng), b=said(b, rng))
    else:
        return steps(rng)
    pairs = [(typed(question, rng), row(numbers))]
    if rng.random() < 0.15:
        turn = rng.choice(
            ("Now backwards.", "And backwards?", "Backwards please", "Now in reverse.")
        )
        pairs.append((turn, row(numbers[::-1])))
    return pairs


def steps(rng: random.Random) -> Pairs:
    """Counting by twos, threes, fives and tens."""
    size, name = rng.choice(((2, "twos"), (2, "twos"), (3, "threes"), (5, "fives"), (10, "tens")))
    start = rng.choice((0, size, size, size * rng.randint(0, 6)))
    end = start + size * rng.randint(3, 10)
    form = rng.choice(("Count by {name} from {a} to {b}.", "Count from {a} to {b} by {name}.",
                       "Count in {name} from {a} to {b}.",
                       "Count from {a} to {b} in steps of {size}."))  # fmt: skip
    if start == size and rng.random() < 0.6:
        form = rng.choice(("Count by {name} to {b}.", "Count in {name} up to {b}.",
                           "Count to {b} by {name}.",
                           "Can you count by {name} to {b}?"))  # fmt: skip
    question = form.format(name=name, size=size, a=start, b=end)
    return [(typed(question, rng), row(range(start, end + 1, size)))]


def neighbours(rng: random.Random) -> Pairs:
    """What comes before or after a number, and which of two is larger."""
    a, b = rng.sample(range(100), 2)
    draw = rng.random()
    if draw < 0.35:
        form = rng.choice(("What comes after {a}?", "Which number comes after {a}?",
                           "What is the number after {a}?",
                           "What number follows {a}?"))  # fmt: skip
        answer = f"After {a} comes {a + 1}."
    elif draw < 0.65:
        a += 1
        form = rng.choice(("What comes before {a}?", "Which number comes before {a}?",
                           "What is the number before {a}?"))  # fmt: skip
        answer = f"Before {a} comes {a - 1}."
    elif draw < 0.85:
        form = rng.choice(("Which is larger, {a} or {b}?", "What is bigger, {a} or {b}?",
                           "Is {a} or {b} larger?",
                           "Which number is bigger: {a} or {b}?"))  # fmt: skip
        answer = f"{max(a, b)} is larger than {min(a, b)}."
    else:
        form = rng.choice(("Which is smaller, {a} or {b}?", "What is smaller, {a} or {b}?"))
        answer = f"{min(a, b)} is smaller than {max(a, b)}."
    return [(typed(form.format(a=a, b=b), rng), answer)]
