import math

import msgspec
import pytest

from engine.protocol import Submit, ToEngine
from scheduler.request import InvalidRequest, Request, RequestLimits, SamplingParams, build

LIMITS = {"vocab_size": 100, "max_model_len": 32, "seed": 9}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("seed", 2**63),
        ("presence_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.1),
        ("max_tokens", -1),
        ("min_tokens", -1),
    ],
)
def test_out_of_range_values_are_refused_by_name(field: str, value: object):
    with pytest.raises(InvalidRequest, match=field) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


def test_build_fills_in_seed_and_length():
    request = build("a", (1, 2), SamplingParams(), **LIMITS)
    assert (request.sampling.seed, request.sampling.max_tokens) == (9, 30)
    given = build("a", (1, 2), SamplingParams(seed=4, max_tokens=3), **LIMITS)
    assert (given.sampling.seed, given.sampling.max_tokens) == (4, 3)


def test_the_context_is_a_limit_with_numbers():
    build("a", (1,) * 30, SamplingParams(max_tokens=2), **LIMITS)
    with pytest.raises(InvalidRequest, match=r"32 tokens.*33 \(30 in messages, 3 in") as refused:
        build("a", (1,) * 30, SamplingParams(max_tokens=3), param="messages", **LIMITS)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(InvalidRequest, match="at least 1 to generate"):
        build("a", (1,) * 32, SamplingParams(), **LIMITS)


@pytest.mark.parametrize("token", [-1, 100, 2**40])
def test_ids_outside_the_vocabulary_are_refused(token: int):
    with pytest.raises(InvalidRequest, match=f"token id {token}.*ends at 99"):
        build("a", (1, token), SamplingParams(), **LIMITS)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_token_ids": (5, 100)}, "stop_token_ids.1"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias.-1"),
        ({"logit_bias": {5: 1.0, 100: 1.0}}, "logit_bias.100"),
        ({"min_tokens": 31}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    ],
)
def test_fields_that_need_the_model_to_be_judged(fields: dict[str, object], param: str):
    with pytest.raises(InvalidRequest) as refused:
        build("a", (1, 2), SamplingParams(**fields), **LIMITS)
    assert (refused.value.param, refused.value.code) == (param, "invalid_value")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", dict.fromkeys(range(4), 1.0)),
        ("stop_token_ids", (1, 2, 3)),
        ("logprobs", 2),
        ("prompt_logprobs", -1),
    ],
)
def test_the_operators_limits(field: str, value: object):
    limits = RequestLimits(n=4, stop_token_ids=2, logit_bias=3, logprobs=1)
    with pytest.raises(InvalidRequest, match=field) as refused:
        build("a", (1,), SamplingParams(**{field: value}), limits=limits, **LIMITS)
    assert refused.value.param == field
    with pytest.raises(InvalidRequest, match="n must be between 1 and 4, got 5"):
        build("a", (1,), SamplingParams(), n=5, limits=limits, **LIMITS)


def test_biases_are_between_minus_100_and_100():
    SamplingParams(logit_bias={3: -100, 4: 100.0})
    for bias in (100.5, math.nan):
        with pytest.raises(InvalidRequest) as refused:
            SamplingParams(logit_bias={3: bias})
        assert refused.value.param == "logit_bias.3"


def test_empty_prompts_and_n_out_of_range_are_refused():
    with pytest.raises(InvalidRequest, match="at least one token"):
        build("a", (), SamplingParams(), **LIMITS)
    for n in (0, 129):
        with pytest.raises(InvalidRequest, match="n must be between 1 and 128"):
            build("a", (1,), SamplingParams(), n=n, **LIMITS)


def test_a_request_crosses_the_process_boundary_unchanged():
    sampling = SamplingParams(
        temperature=0.5, seed=-(2**63), stop_token_ids=(3,), logit_bias={7: -1.5}
    )
    request = build("ä", (1, 2), sampling, n=2, **LIMITS)
    data = msgspec.msgpack.encode(Submit([request]))
    message = msgspec.msgpack.decode(data, type=ToEngine)
    assert isinstance(message, Submit)
    assert message.requests == [request]
    assert isinstance(message.requests[0], Request)
