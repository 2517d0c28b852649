"""vLLM: what it is asked, and its recorded answers read right."""

import math

import numpy as np
import pytest
from recorded_answers import (
    TARGETS,
    VOCAB_SIZE,
    load,
    same_answer,
    sample_request,
    score_request,
    vllm_echo,
    vllm_prompt_logprobs,
    vllm_sample,
)

from gkdjax.teachers.server.dialects import vllm
from gkdjax.types import SamplingParams
from gkdjax.utils.errors import UserError, WrongAnswer

MODELS = ("qwen3-tiny", "gemma3-tiny")
PLP = vllm.PromptLogprobs("m", VOCAB_SIZE)
ECHO = vllm.EchoLogprobs("m", VOCAB_SIZE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("file", ["plp", "rti"])
def test_prompt_logprobs_as_recorded(model, file):
    recorded = load(f"vllm-{model}-{file}")
    ids = recorded["request"]["prompt"]
    (answer,) = PLP.read_scores(recorded["response"], [score_request(ids)])
    np.testing.assert_array_equal(answer.target_ids, [ids[t + 1] for t in TARGETS])
    for j, t in enumerate(TARGETS):
        row = recorded["response"]["choices"][0]["prompt_logprobs"][t + 1]
        best = sorted((entry["rank"], int(i)) for i, entry in row.items())[:3]
        logprobs = [row[str(i)]["logprob"] for _, i in best]
        assert answer.target_logprob[j] == np.float32(row[str(ids[t + 1])]["logprob"])
        np.testing.assert_array_equal(answer.top_ids[j], [i for _, i in best])
        np.testing.assert_array_equal(answer.top_logprobs[j], np.float32(logprobs))
        rest = 1 - sum(map(math.exp, logprobs))
        assert math.exp(answer.tail_logprob[j]) == pytest.approx(rest, rel=1e-6)
    assert (answer.unmapped, answer.finished, answer.lost) == (0, False, False)


@pytest.mark.parametrize("model", MODELS)
def test_an_echo_says_the_same(model):
    ids, answer = vllm_echo(model)
    (by_echo,) = ECHO.read_scores(answer, [score_request(ids)])
    (by_prompt,) = PLP.read_scores(vllm_prompt_logprobs(model)[1], [score_request(ids)])
    same_answer(by_echo, by_prompt)


def test_an_echo_without_the_token_drawn_says_the_same():
    ids, answer = vllm_echo()
    (whole,) = ECHO.read_scores(answer, [score_request(ids)])
    for values in answer["choices"][0]["logprobs"].values():
        values.pop()
    same_answer(ECHO.read_scores(answer, [score_request(ids)])[0], whole)


@pytest.mark.parametrize("model", MODELS)
def test_an_echo_keyed_by_text_is_refused(model):
    recorded = load(f"vllm-{model}-echo-mt0")
    with pytest.raises(
        WrongAnswer, match=r"row 7: .*tokens has '(def|<bos>)' at 0, where id \d+ was"
    ):
        ECHO.read_scores(recorded["response"], [score_request(recorded["request"]["prompt"])])


def test_every_position_can_be_a_target():
    ids, answer = vllm_prompt_logprobs()
    request = score_request(ids, at=tuple(range(len(ids) - 1)))
    (scored,) = PLP.read_scores(answer, [request])
    np.testing.assert_array_equal(scored.target_ids, ids[1:])
    same_answer(scored, ECHO.read_scores(vllm_echo()[1], [request])[0])


def test_rows_come_back_by_their_index():
    ids, answer = vllm_prompt_logprobs()
    other, second = vllm_prompt_logprobs("gemma3-tiny")
    alone = PLP.read_scores(answer, [score_request(ids)]) + PLP.read_scores(
        second, [score_request(other)]
    )
    both = answer | {"choices": [second["choices"][0] | {"index": 1}, answer["choices"][0]]}
    both["usage"]["prompt_tokens"] = len(ids) + len(other)
    together = PLP.read_scores(both, [score_request(ids), score_request(other)])
    for one, again in zip(alone, together, strict=True):
        same_answer(one, again)
    both["choices"][0]["index"] = 0
    with pytest.raises(WrongAnswer, match="indices"):
        PLP.read_scores(both, [score_request(ids), score_request(other)])


def test_what_is_asked_for():
    call = PLP.score([score_request([5, 6, 7], at=(0,)), score_request([8, 9], at=(0,))])
    assert call.path == "/v1/completions"
    asked = {"model": "m", "prompt": [[5, 6, 7], [8, 9]], "max_tokens": 1, "temperature": 0}
    assert call.body == asked | {"prompt_logprobs": 3}
    assert call.max_bytes == 2**20 + 5 * 5 * 1024
    assert ECHO.score([score_request([5, 6], at=(0,))]).body == {
        **{"model": "m", "prompt": [5, 6], "max_tokens": 1, "temperature": 0, "logprobs": 3},
        **{"echo": True, "return_tokens_as_token_ids": True},
    }


@pytest.mark.parametrize(("top_k", "sent"), [(None, -1), (40, 40)])
def test_what_a_sample_asks_for(top_k, sent):
    request = sample_request([5, 6], sampling=SamplingParams(9, 0.7, 0.9, top_k), stop_ids=(1, 4))
    call = PLP.sample(request)
    assert call == ECHO.sample(request)
    said = {"max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": sent, "seed": 5, "n": 1}
    said |= {"model": "m", "prompt": [5, 6], "logprobs": 3, "stop_token_ids": [1, 4]}
    said |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    assert said.items() <= call.body.items()
    # what the server would take from the model's directory
    assert call.body["repetition_penalty"] == 1
    assert call.body["min_p"] == call.body["presence_penalty"] == 0
    assert call.body["frequency_penalty"] == 0
    assert call.max_bytes == 2**20 + (2 + 9) * 5 * 1024


@pytest.mark.parametrize("model", MODELS)
def test_a_sample(model):
    ids, drawn, answer = vllm_sample(model)
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    best = sorted(((v, int(k.removeprefix("token_id:"))) for k, v in top.items()), reverse=True)
    read = PLP.read_sample(answer, sample_request(ids, tokens=3))
    np.testing.assert_array_equal(read.target_ids, [drawn] * 3)
    np.testing.assert_array_equal(read.target_logprob, np.float32([top[f"token_id:{drawn}"]] * 3))
    np.testing.assert_array_equal(read.top_ids, [[i for _, i in best[:3]]] * 3)
    np.testing.assert_array_equal(read.top_logprobs, np.float32([[v for v, _ in best[:3]]] * 3))
    assert not read.finished


def test_a_sample_ends_with_its_stop_id():
    ids, drawn, answer = vllm_sample()
    read = PLP.read_sample(answer, sample_request(ids, tokens=3, stop_ids=(7, drawn)))
    np.testing.assert_array_equal(read.target_ids, [drawn])  # what follows is not of it
    assert read.finished


def test_a_stop_that_is_not_shown_leaves_the_response_unfinished():
    ids, _, answer = vllm_sample()
    answer["choices"][0]["finish_reason"] = "stop"
    answer["usage"]["completion_tokens"] = 4
    read = PLP.read_sample(answer, sample_request(ids, tokens=4))
    assert len(read.target_ids) == 3
    assert not read.finished


def test_a_drawn_token_beyond_the_vocabulary_loses_the_sample():
    ids, _, answer = vllm_sample()
    answer["choices"][0]["token_ids"][1] = VOCAB_SIZE
    answer["choices"][0]["logprobs"]["tokens"][1] = f"token_id:{VOCAB_SIZE}"
    read = PLP.read_sample(answer, sample_request(ids, tokens=3))
    assert read.lost
    assert len(read.target_ids) == 0


@pytest.mark.parametrize(
    ("ids", "at", "why"),
    [
        ([5, VOCAB_SIZE], (0,), f"row 7: token id {VOCAB_SIZE} "),
        ([-1, 5], (0,), "row 7: token id -1 "),
        ([], (), "row 7: 0 ids"),
        ([5, 6], (), "must rise"),
        ([5, 6], (1,), "must rise"),
        ([5, 6, 7], (-1, 0), "must rise"),
        ([5, 6, 7, 8], (1, 1), "must rise"),
        ([5, 6, 7, 8], (1, 0), "must rise"),
    ],
)
def test_what_is_not_sent(ids, at, why):
    for dialect in (PLP, ECHO):
        with pytest.raises(ValueError, match=why):
            dialect.score([score_request(ids, at=at)])


def test_samples_that_are_not_asked_for():
    with pytest.raises(UserError, match="token id 4096"):
        PLP.sample(sample_request([VOCAB_SIZE]))
    with pytest.raises(ValueError, match="top_k=0"):
        PLP.sample(sample_request([5], top_k=0))
    with pytest.raises(ValueError, match="2 rows"):
        ECHO.score([score_request([5, 6], at=(0,))] * 2)
