"""Calling tools: a list of tools in the system turn, a call, a result, an answer."""

import json
import random
from dataclasses import dataclass

from models.embedded.corpus.numbers import solved
from models.embedded.corpus.vocabulary import NAMES, PLACES, THINGS, any_word, made_up_word

Message = dict[str, str]


@dataclass(frozen=True)
class Use:
    """One use of a tool: what is asked, the arguments, what comes back and what is said then."""

    tool: str
    question: str
    arguments: dict[str, object]
    result: dict[str, object]
    answer: str


DESCRIPTIONS = {
    "get_weather(city)": ("Get the weather of a city", "Current weather", "Weather in a city"),
    "get_time(city)": ("Get the time in a city", "Local time of a city"),
    "add(a, b)": ("Add two numbers", "Sum of two numbers"),
    "get_price(item)": ("Look up the price of an item", "Price of an item"),
    "search(query)": ("Search for a text", "Search the web", "Look something up"),
    "set_timer(minutes)": ("Set a timer", "Start a timer of some minutes"),
    "send_message(to, text)": ("Send a message", "Send a text to a person"),
}


def uses(rng: random.Random) -> dict[str, Use]:
    """A fresh random use of every tool."""
    city = rng.choice(PLACES) if rng.random() < 0.8 else made_up_word(rng).capitalize()
    name, item, word = rng.choice(NAMES), rng.choice(THINGS), any_word(rng)
    degrees, minutes, price = rng.randint(0, 35), rng.randint(1, 90), rng.randint(1, 99)
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "clear"))
    clock = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    ask = rng.choice
    return {
        "get_weather(city)": Use(
            "get_weather",
            ask(("What is the weather in {}?", "How is the weather in {}?", "Weather in {}?",
                 "Is it warm in {}?", "What's the weather like in {}?",
                 "what is the weather in {}", "Tell me the weather in {}.")).format(city),
            {"city": city}, {"sky": sky, "degrees": degrees},
            f"In {city} it is {sky} and {degrees} degrees.",
        ),
        "get_time(city)": Use(
            "get_time",
            ask(("What time is it in {}?", "Tell me the time in {}.", "Time in {}?")).format(city),
            {"city": city}, {"time": clock}, f"In {city} it is {clock}.",
        ),
        "add(a, b)": Use(
            "add",
            ask(("What is {} + {}?", "Add {} and {}.", "{} plus {}", "{} + {}")).format(a, b),
            {"a": a, "b": b}, {"result": a + b}, solved(a, "+", b) + ".",
        ),
        "get_price(item)": Use(
            "get_price",
            ask(("What does a {} cost?", "How much is a {}?", "Price of a {}?",
                 "What is the price of the {}?")).format(item),
            {"item": item}, {"price": price}, f"The {item} costs {price}.",
        ),
        "search(query)": Use(
            "search",
            ask(("Search for {}.", "Look up {}.", "Find {}", "search {}")).format(word),
            {"query": word}, {"found": price}, f"I found {price} results for {word}.",
        ),
        "set_timer(minutes)": Use(
            "set_timer",
            ask(("Set a timer for {} minutes.", "Wake me in {} minutes.",
                 "Start a timer of {} minutes.")).format(minutes),
            {"minutes": minutes}, {"ok": True}, f"The timer is set to {minutes} minutes.",
        ),
        "send_message(to, text)": Use(
            "send_message",
            ask(('Send "{1}" to {0}.', 'Write "{1}" to {0}.', "Tell {0}: {1}")).format(name, word),
            {"to": name, "text": word}, {"ok": True}, f"I sent the message to {name}.",
        ),
    }  # fmt: skip


def call_text(use: Use) -> str:
    """The call as the assistant writes it."""
    call = json.dumps({"name": use.tool, "arguments": use.arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def tool_lines(signatures: list[str], rng: random.Random) -> str:
    """The list of tools as the chat template renders it."""
    lines = [f"{signature}: {rng.choice(DESCRIPTIONS[signature])}" for signature in signatures]
    return "Tools:\n" + "\n".join(lines)


def tool_use(rng: random.Random) -> tuple[str, list[Message]]:
    """The tool list for the system turn, and one use of one of its tools."""
    signatures = rng.sample(list(DESCRIPTIONS), rng.choice((1, 1, 2, 3)))
    use = uses(rng)[rng.choice(signatures)]
    messages = [
        {"role": "user", "content": use.question},
        {"role": "assistant", "content": call_text(use)},
        {"role": "tool", "content": json.dumps(use.result)},
        {"role": "assistant", "content": use.answer},
    ]
    return tool_lines(signatures, rng), messages
