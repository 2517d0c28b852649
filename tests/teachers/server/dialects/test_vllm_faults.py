"""vLLM's answers with a fault each: none is taken for an answer."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_answers import (
    VOCAB_SIZE,
    answer_or_wrong,
    in_choice,
    sample_request,
    score_request,
    set_at,
    spoiled,
    vllm_echo,
    vllm_prompt_logprobs,
    vllm_sample,
)

from gkdjax.teachers.server.dialects import vllm
from gkdjax.utils.errors import WrongAnswer

PLP = vllm.PromptLogprobs("m", VOCAB_SIZE)
ECHO = vllm.EchoLogprobs("m", VOCAB_SIZE)


def inserted_bos(answer):
    answer["choices"][0]["prompt_logprobs"].insert(1, {"2": {"logprob": -1.0}})


def repeated_choice(answer):
    answer["choices"] *= 2


def without_the_actual_id(answer):
    del answer["choices"][0]["prompt_logprobs"][2]["78"]  # no target, but it was sent


def without_choices(answer):
    del answer["choices"]


def one_too_many(answer):
    answer["choices"][0]["prompt_logprobs"][4] |= {"1": {"logprob": -15.0}}


def one_too_few(answer):
    del answer["choices"][0]["prompt_logprobs"][4]["3389"]
    del answer["choices"][0]["prompt_logprobs"][4]["4018"]


BEST = ("prompt_logprobs", 4, "3389", "logprob")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (inserted_bos, "prompt_logprobs has 13 entries, not 12"),
        (set_at("usage", "prompt_tokens", to=13), "usage.prompt_tokens is 13, and 12"),
        (in_choice("prompt_logprobs", 2, to=None), r"prompt_logprobs\[2\] is null"),
        (in_choice("prompt_logprobs", 0, to={}), r"prompt_logprobs\[0\] is {}, not null"),
        (in_choice("prompt_logprobs", to=None), "prompt_logprobs is null, not a list"),
        (without_the_actual_id, r"prompt_logprobs\[2\] has no '78'"),
        (in_choice("prompt_token_ids", to=[1, 2]), "are not the ids that were sent"),
        (repeated_choice, "choices has 2 entries, not 1"),
        (without_choices, "answer has no 'choices'"),
        (in_choice("index", to=1), r"indices \[1\]"),
        (in_choice("index", to="0"), 'is "0", not a whole number'),
        (in_choice("index", to=False), "is false, not a whole number"),
        (in_choice("index", to=0.0), "is 0.0, not a whole number"),
        (in_choice(*BEST, to=0.5), "above 1"),
        (in_choice(*BEST, to=-0.01), "together"),
        (in_choice(*BEST, to="-1"), 'is "-1", not a number'),
        (in_choice(*BEST, to=True), "is true, not a number"),
        (in_choice(*BEST, to=math.nan), "is nan"),
        (in_choice(*BEST, to=-(10**400)), "not a number of that size"),
        (in_choice("prompt_logprobs", 4, "03389", to={"logprob": -9.0}), "'03389', which is no"),
        (in_choice("prompt_logprobs", 4, "3.0", to={"logprob": -9.0}), "'3.0', which is no"),
        (one_too_many, "lists 5 most probable tokens, and 3"),
        (one_too_few, "lists 2 most probable tokens, and 3"),
        (set_at("error", to={"message": "out of memory"}), "is an error.*out of memory"),
        (set_at("object", to="error"), "is an error"),
    ],
)
def test_bad_prompt_logprobs(spoil, why):
    ids, answer = vllm_prompt_logprobs()
    spoil(answer)
    with pytest.raises(WrongAnswer, match=f"^row 7.*{why}"):
        PLP.read_scores(answer, [score_request(ids)])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (in_choice("logprobs", to=None), "logprobs is null, not an object"),
        (in_choice("logprobs", "tokens", 2, to="token_id:79"), "'token_id:79' at 2, where id 78"),
        (in_choice("logprobs", "tokens", to=["token_id:321"]), "token_logprobs has 13 entries"),
        (in_choice("logprobs", "token_logprobs", 0, to=-1.0), r"\[0\] is -1.0, not null"),
        (in_choice("logprobs", "token_logprobs", 3, to=None), "is null, not a number"),
        (in_choice("logprobs", "token_logprobs", 4, to=-8.0), "among the best"),
        (in_choice("logprobs", "top_logprobs", 4, "x", to=-8.0), "lists 5 most"),
        (in_choice("logprobs", "top_logprobs", 4, to=dict.fromkeys("abc", -9)), "by their text"),
    ],
)
def test_a_bad_echo(spoil, why):
    ids, answer = vllm_echo()
    spoil(answer)
    with pytest.raises(WrongAnswer, match=f"^row 7.*{why}"):
        ECHO.read_scores(answer, [score_request(ids)])


@pytest.mark.parametrize("tokens", [1, 11, 14])
def test_an_echo_of_another_length(tokens):
    ids, answer = vllm_echo()
    for key, values in answer["choices"][0]["logprobs"].items():
        answer["choices"][0]["logprobs"][key] = [*values, values[-1]][:tokens]
    with pytest.raises(WrongAnswer, match=f"row 7.* are of {tokens} tokens, not of the 12"):
        ECHO.read_scores(answer, [score_request(ids)])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (in_choice("token_ids", to=None), "token_ids is null"),
        (in_choice("token_ids", 1, to=5), "other tokens in token_ids"),
        (in_choice("token_ids", to=[992, 992]), "other tokens in token_ids"),
        (in_choice("token_ids", 1, to=992.0), "992.0, not a whole number"),
        (in_choice("prompt_token_ids", to=[1]), "are not the ids that were sent"),
        (in_choice("finish_reason", to="abort"), "gave up"),
        (in_choice("finish_reason", to=None), "finish_reason is null"),
        (in_choice("logprobs", "token_logprobs", 0, to=None), "is null, not a number"),
        (set_at("usage", "prompt_tokens", to=13), "13, and 12 token ids were sent"),
        (set_at("usage", "completion_tokens", to=5), "5, and the answer shows 3"),
        (repeated_choice, "choices has 2 entries, not 1"),
    ],
)
def test_a_bad_sample(spoil, why):
    ids, _, answer = vllm_sample()
    spoil(answer)
    with pytest.raises(WrongAnswer, match=f"^row 7.*{why}"):
        PLP.read_sample(answer, sample_request(ids, tokens=3))


def test_more_tokens_than_asked_for():
    ids, _, answer = vllm_sample()
    with pytest.raises(WrongAnswer, match="row 7: 3 tokens were drawn, and 2"):
        PLP.read_sample(answer, sample_request(ids, tokens=2))


READ = {
    "prompt_logprobs": (
        vllm_prompt_logprobs,
        lambda ids, a: PLP.read_scores(a, [score_request(ids)]),
    ),
    "echo": (vllm_echo, lambda ids, a: ECHO.read_scores(a, [score_request(ids)])),
    "sample": (vllm_sample, lambda ids, a: PLP.read_sample(a, sample_request(ids, tokens=3))),
}


@pytest.mark.parametrize("kind", READ)
@settings(deadline=None)
@given(st.data())
def test_whatever_it_is_it_is_an_answer_or_wrong(kind, data):
    make, read = READ[kind]
    ids, *_, answer = make()
    answer_or_wrong(lambda a: read(ids, a), data.draw(spoiled(answer)))
