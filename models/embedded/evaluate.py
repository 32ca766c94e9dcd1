"""Asks the embedded model and counts right answers: `python -m models.embedded.evaluate`.

Facts, sums and copying are asked in words that are not in the training text; other skills in known
words with new contents.
"""

import argparse
import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tqdm import tqdm

from models import embedded
from models.embedded import corpus
from models.embedded.corpus import Conversation, facts, numbers, tools, words
from models.embedded.network import Llama, Shape
from models.embedded.tokenizer import render

SEED = 1_000_003


@dataclass(frozen=True)
class Case:
    """A chat that ends with a question, and what a right answer contains."""

    subject: str
    chat: Conversation
    accept: str

    def accepts(self, answer: str) -> bool:
        """Whether `answer` is right."""
        return re.search(self.accept, answer) is not None


def asked(subject: str, question: str, accept: str, before: Conversation | None = None) -> Case:
    """A case whose chat is one question, after the messages in `before`."""
    return Case(subject, [*(before or []), {"role": "user", "content": question}], accept)


def exactly(answer: str) -> str:
    """The pattern of one whole answer."""
    return f"^{re.escape(answer)}$"


def listed() -> list[Case]:
    """The twenty questions that the tests ask."""
    questions = json.loads((embedded.path() / "questions.json").read_text())
    return [asked("listed", question["ask"], question["accept"]) for question in questions]


def fact_cases(rng: random.Random) -> Iterator[Case]:
    """Every held-out way to ask for a fact."""
    for subject in facts.SUBJECTS:
        for fact in facts.load(subject):
            for question in fact.held_out:
                yield asked(subject, facts.expand(question, rng), f"(?i){fact.accept}")


def sum_cases(rng: random.Random) -> Iterator[Case]:
    """All sums from 0 to 20 in one held-out phrasing each, and some two-digit ones."""
    small = list(itertools.product(range(21), repeat=2))
    large = [(rng.randint(21, 99), rng.randint(21, 99)) for _ in range(60)]
    for subject, pairs in (("sums 0..20", small), ("sums 21..99", large)):
        for a, b in pairs:
            result = re.escape(numbers.solved(a, "+", b)) + r"\b"
            yield asked(subject, rng.choice(numbers.HELD_OUT_ADD).format(a=a, b=b), result)
            if a >= b:
                result = re.escape(numbers.solved(a, "-", b)) + r"\b"
                question = rng.choice(numbers.HELD_OUT_SUBTRACT).format(a=a, b=b)
                yield asked(subject, question, result)


def skill_cases(rng: random.Random) -> Iterator[Case]:
    """Counting, copying, remembering, JSON and tools: known phrasings, new contents."""
    for subject, skill in (
        ("counting", numbers.counting),
        ("neighbours", numbers.neighbours),
        ("sum stories", numbers.stories),
        ("repeat n times, reverse", words.several_times),
        ("json", words.json_objects),
    ):
        for _ in range(40):
            question, answer = skill(rng)[0]
            yield asked(subject, question, exactly(answer))
    for _ in range(80):
        text = words.payload(rng)
        yield asked("repeating", rng.choice(words.HELD_OUT_REPEAT).format(x=text), exactly(text))
    for _ in range(40):
        told, (pair,) = words.remembering(rng)
        chat = corpus.as_messages([*told, *numbers.sums(rng)[:1]])
        yield asked("remembering", pair[0], exactly(pair[1]), chat)
        system, chat = tools.tool_use(rng)
        before = [{"role": "system", "content": system}]
        yield asked("tool call", chat[0]["content"], exactly(chat[1]["content"]), before)
        yield Case("tool result", [*before, *chat[:3]], exactly(chat[3]["content"]))


def long_chat_cases(rng: random.Random) -> Iterator[Case]:
    """A held-out question at the end of a chat of about 700 to 1700 tokens."""
    for exchanges in (15, 25, 35):
        for subject in ("caching", "paging", "quire"):
            for fact in rng.sample(facts.load(subject), 6):
                before = corpus.conversation(rng, exchanges)
                if before[0]["role"] == "system" and "Tools:" in before[0]["content"]:
                    before = before[5:]
                question = facts.expand(fact.held_out[0], rng)
                yield asked("long chats", question, f"(?i){fact.accept}", before)


def cases() -> list[Case]:
    """All questions of the evaluation; the same ones in every run."""
    rng = random.Random(SEED)
    groups = (fact_cases, sum_cases, skill_cases, long_chat_cases)
    return listed() + [case for group in groups for case in group(rng)]


class Answerer:
    """The checkpoint in `folder`, decoding greedily with the training-side network."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        config = json.loads((folder / "config.json").read_text())
        self.end = config["eos_token_id"]
        self.shape = Shape(**{field.name: config[field.name] for field in fields(Shape)})
        self.dtype = dtype
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = Llama(self.shape, stream=dtype).to(dtype)
        self.model.load_state_dict(load_file(folder / "model.safetensors"))

    def prompt(self, chat: Conversation) -> list[int]:
        """The tokens of a chat, up to where the answer starts."""
        text = "".join(piece for piece, _ in render(chat)) + "<|assistant|>"
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @torch.inference_mode()
    def answer(self, chat: Conversation, limit: int = 400) -> str:
        """What the model says next in the chat."""
        sizes = (1, self.shape.num_key_value_heads, 0, self.shape.head_dim)
        pasts = [
            [torch.empty(sizes, dtype=self.dtype) for _ in range(2)]
            for _ in range(self.shape.num_hidden_layers)
        ]
        tokens, said = self.prompt(chat), []
        while len(said) < limit:
            token = int(self.model(torch.tensor([tokens]), pasts)[0, -1].argmax())
            if token == self.end:
                break
            said.append(token)
            tokens = [token]
        return self.tokenizer.decode(said)


def main() -> None:
    """Prints right answers by subject."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=embedded.path())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--every", type=int, default=1, help="ask only every n-th question")
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers")
    args = parser.parse_args()
    torch.set_num_threads(1)  # steps of one token are too small to share
    answerer = Answerer(args.folder, getattr(torch, args.dtype))
    right: dict[str, list[bool]] = defaultdict(list)
    for case in tqdm(cases()[:: args.every], unit="question", disable=args.wrong):
        answer = answerer.answer(case.chat)
        right[case.subject].append(case.accepts(answer))
        if args.wrong and not case.accepts(answer):
            print(f"{case.subject} | {case.chat[-1]['content']} | {answer}")
    for subject, marks in right.items():
        print(f"{subject:24} {sum(marks):4} of {len(marks):4}  {sum(marks) / len(marks):6.1%}")


if __name__ == "__main__":
    main()
