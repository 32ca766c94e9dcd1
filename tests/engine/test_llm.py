"""Offline generation with the embedded model."""

import pytest

from engine import LLM, SamplingParams
from engine.build import StartError
from scheduler.request import InvalidRequest

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", dtype="float32", cpu_threads=1, max_num_seqs=8)


def test_continues_texts_and_ids_alike(llm: LLM):
    outputs = llm.generate(["The cache keeps", "One block"], GREEDY, use_tqdm=False)
    assert [len(output.outputs) for output in outputs] == [1, 1]
    again = llm.generate([output.prompt_token_ids for output in outputs], GREEDY, use_tqdm=False)
    assert again == outputs
    assert all(output.outputs[0].text for output in outputs)


def test_a_single_prompt_may_stand_alone(llm: LLM):
    [output] = llm.generate("The cache", GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 12
    assert output.outputs[0].finish_reason in ("stop", "length")


def test_n_answers_differ_and_repeat_with_their_seed(llm: LLM):
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=12)
    first, second = (llm.generate(["The"], params, n=4, use_tqdm=False)[0] for _ in range(2))
    assert first == second
    assert len({answer.text for answer in first.outputs}) > 1


def test_shows_its_progress(llm: LLM, capsys: pytest.CaptureFixture[str]):
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().err


def test_a_bad_prompt_leaves_nothing_behind(llm: LLM):
    with pytest.raises(InvalidRequest, match="token id"):
        llm.generate([[10**9]], GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="the context is"):
        llm.generate([[5] * 5000], GREEDY, use_tqdm=False)
    assert llm.generate("The cache", GREEDY, use_tqdm=False)


def test_a_missing_model_is_one_line():
    with pytest.raises(StartError, match=r"no folder at /nowhere") as failed:
        LLM("/nowhere")
    assert "\n" not in str(failed.value)
