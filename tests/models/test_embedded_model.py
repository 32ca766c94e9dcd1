"""The embedded checkpoint: its files load elsewhere, and it answers."""

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import embedded
from models.embedded.corpus import Conversation
from models.embedded.evaluate import Answerer, listed

FOLDER = embedded.path()
WEIGHTS = FOLDER / "model.safetensors"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from threads, and loses much to waiting when others work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Other:
    """The checkpoint as any program reads it: through `transformers`."""

    def __init__(self, dtype: torch.dtype):
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()

    @torch.inference_mode()
    def answers(self, chats: list[Conversation], limit: int = 128) -> list[str]:
        inputs = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        tokens = self.model.generate(
            **inputs, do_sample=False, max_length=None, max_new_tokens=limit
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)


@pytest.fixture(scope="module")
def other() -> Other:
    return Other(torch.float32)


def test_the_weights_are_small_and_in_bfloat16():
    assert WEIGHTS.stat().st_size <= 12e6
    with safe_open(WEIGHTS, "pt") as weights:
        tensors = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in tensors} == {"BF16"}


def test_the_config_describes_the_weights():
    config = json.loads((FOLDER / "config.json").read_text())
    with safe_open(WEIGHTS, "pt") as weights:
        tensors = list(weights.keys())
        assert "lm_head.weight" not in tensors and config["tie_word_embeddings"]
        embedding = weights.get_slice("model.embed_tokens.weight").get_shape()
        key = weights.get_slice("model.layers.0.self_attn.k_proj.weight").get_shape()
    assert embedding == [config["vocab_size"], config["hidden_size"]]
    assert key == [config["num_key_value_heads"] * config["head_dim"], config["hidden_size"]]
    assert config["num_key_value_heads"] < config["num_attention_heads"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_least_18_of_the_20_listed_questions_are_answered(dtype: torch.dtype):
    questions = listed()
    answers = Other(dtype).answers([case.chat for case in questions])
    wrong = [
        (case.chat[-1]["content"], answer)
        for case, answer in zip(questions, answers, strict=True)
        if not case.accepts(answer)
    ]
    assert len(questions) == 20
    assert len(wrong) <= 2, wrong


def test_every_answer_ends_with_the_end_of_turn(other: Other):
    ids = other.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Count to 5."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = other.model.generate(**ids, do_sample=False, max_length=None, max_new_tokens=60)
    assert tokens[0, -1] == other.model.config.eos_token_id
    assert other.tokenizer.decode(tokens[0, -1]) == "<|end|>"


def test_a_follow_up_uses_the_chat_before_it(other: Other):
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "My name is Nora."},
        {"role": "assistant", "content": "Nice to meet you, Nora!"},
        {"role": "user", "content": "What is my name?"},
    ]
    assert "Nora" in other.answers([chat])[0]


def test_the_network_of_the_evaluation_is_the_same_model(other: Other):
    chats = [case.chat for case in listed()[::4]]
    answerer = Answerer(FOLDER, torch.float32)
    assert [answerer.answer(chat) for chat in chats] == other.answers(chats)


def test_a_story_is_long_enough_to_watch_it_stream(other: Other):
    chat = [{"role": "user", "content": "Write a story about a quire of pages."}]
    assert len(other.answers([chat], limit=300)[0].split()) > 80
