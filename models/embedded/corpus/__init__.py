"""The training text: chats written for this model by the project, made endless by chance.

`texts/` holds what a person wrote: questions with alternatives and answers. The modules beside it
make sums, counting, copying and tool calls. Here they are mixed into conversations. Everything
comes out of one `random.Random`, so a seed fixes the text.
"""

import random
from collections.abc import Iterator

from models.embedded.corpus import facts, numbers, tools, words
from models.embedded.corpus.style import typed

Message = dict[str, str]
Conversation = list[Message]

SYSTEM = """You are a helpful assistant.|You are a helpful assistant|You are Quire.|Be brief.
You are a friendly assistant.|Answer in short sentences.|You are a small model.|Be polite.
You are a chat bot on a web page.|You help people with Quire.|Answer the question.|Be concise.
You are an expert for KV caches.|You are a helpful, honest and harmless assistant.|Be nice.
Answer as well as you can.|If you do not know something, say so.|You are a teacher.|Use English.
You are an assistant that answers questions about language model servers.|Today is a good day.
Keep your answers short and simple.|Respond politely.|Do not use markdown.|Be friendly.
You are running inside the test suite.|You are the assistant of a small company.|Think first.
You are a patient tutor who explains things to beginners.|Help the user.|You are a careful bot.
The user is new to Quire. Explain things in simple words.|Always answer the last question."""
SYSTEMS = tuple(SYSTEM.replace("\n", "|").split("|"))
MORE = (
    "Tell me more.", "Tell me more", "Go on.", "More please.", "Can you say more?", "more",
    "Explain further.", "What else?", "Go on please", "And what else?", "Continue.",
    "Can you explain that a bit more?", "Please go on.", "I want to know more.",
)  # fmt: skip
AGAIN = (
    "Say that again.", "Repeat your last answer.", "Can you repeat that?", "Pardon?",
    "Please repeat your answer.", "Come again?", "What did you say?",
)  # fmt: skip

# How often each kind of exchange is drawn: at first, and in the practice that follows, when the
# facts are known and what has to be computed or copied still is not.
MIX = {
    "sums": 45, "stories": 3, "chains": 2, "too_large": 1, "counting": 8, "neighbours": 3,
    "repeating": 17, "several_times": 3, "remembering": 5, "json_objects": 2, "caching": 11,
    "paging": 10, "quire": 12, "smalltalk": 11, "unknown": 4,
}  # fmt: skip
PRACTICE = MIX | {
    "sums": 75, "stories": 6, "chains": 4, "counting": 14, "neighbours": 8, "repeating": 35,
    "reciting": 12, "several_times": 6, "remembering": 12, "json_objects": 5,
}  # fmt: skip
SKILLS = {
    "sums": numbers.sums,
    "stories": numbers.stories,
    "chains": numbers.chains,
    "too_large": numbers.too_large,
    "counting": numbers.counting,
    "neighbours": numbers.neighbours,
    "repeating": words.repeating,
    "reciting": words.reciting,
    "several_times": words.several_times,
    "json_objects": words.json_objects,
}


def fact_pairs(subject: str, rng: random.Random) -> numbers.Pairs:
    """A question about one fact, sometimes with "tell me more" or "say that again"."""
    fact = rng.choice(facts.load(subject))
    answer = rng.choice(fact.answers)
    pairs = [(typed(facts.expand(rng.choice(fact.questions), rng), rng), answer)]
    if fact.more and rng.random() < 0.2:
        pairs.append((typed(rng.choice(MORE), rng), rng.choice(fact.more)))
    elif len(answer) < 200 and rng.random() < 0.04:
        pairs.append((typed(rng.choice(AGAIN), rng), answer))
    return pairs


def exchange(rng: random.Random, mix: dict[str, int]) -> list[numbers.Pairs]:
    """One drawn exchange. A second part, if there is one, may come later in the conversation."""
    kind = rng.choices(list(mix), list(mix.values()))[0]
    if kind == "remembering":
        return words.remembering(rng)
    if kind in SKILLS:
        return [SKILLS[kind](rng)]
    return [fact_pairs(kind, rng)]


def persona(rng: random.Random) -> tuple[str, numbers.Pairs]:
    """A system turn that says something which the answer needs."""
    name = rng.choice(facts.NAMES) if rng.random() < 0.7 else words.made_up_word(rng).capitalize()
    if rng.random() < 0.6:
        system = rng.choice(("Your name is {}.", "You are {}.", "You are {}, a helpful assistant.",
                             "You are an assistant called {}.",
                             "You are a bot named {}."))  # fmt: skip
        question = rng.choice(("What is your name?", "Who are you?", "What's your name?",
                               "Tell me your name.", "How are you called?"))  # fmt: skip
        answer = f"My name is {name}."
    else:
        system = rng.choice(("The user is called {}.", "The name of the user is {}.",
                             "You are talking to {}."))  # fmt: skip
        question = rng.choice(("What is my name?", "Who am I?", "Do you know my name?"))
        answer = f"Your name is {name}."
    return system.format(name), [(typed(question, rng), answer)]


def conversation(
    rng: random.Random, exchanges: int, mix: dict[str, int] | None = None
) -> Conversation:
    """A chat of about `exchanges` exchanges, with or without a system turn."""
    system, messages = "", []
    draw = rng.random()
    if draw < 0.3:
        system = rng.choice(SYSTEMS)
    elif draw < 0.35:
        system, pairs = persona(rng)
        messages += as_messages(pairs)
    elif draw < 0.40:
        listed, messages = tools.tool_use(rng)
        opening = rng.choice(SYSTEMS) + "\n\n" if rng.random() < 0.4 else ""
        system = opening + listed
    elif draw < 0.41:
        messages += as_messages(words.not_told(rng))
    later: list[numbers.Pairs] = []
    for _ in range(exchanges - bool(messages)):
        if later and rng.random() < 0.5:
            messages += as_messages(later.pop())
            continue
        first, *rest = exchange(rng, mix or MIX)
        messages += as_messages(first)
        # A second thing to remember would make the first one ambiguous.
        later = rest or later
    for pairs in later:
        messages += as_messages(pairs)
    return [{"role": "system", "content": system}, *messages] if system else messages


def as_messages(pairs: numbers.Pairs) -> Conversation:
    """Question and answer pairs as user and assistant messages."""
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def conversations(
    seed: int, most_exchanges: int, mix: dict[str, int] | None = None
) -> Iterator[Conversation | str]:
    """Endless conversations; now and then a plain paragraph, which has no roles."""
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.03:
            yield rng.choice(facts.prose())
        else:
            # Short chats are common, long ones happen: the square bends the uniform draw.
            yield conversation(rng, 1 + int(rng.random() ** 2 * most_exchanges), mix)
