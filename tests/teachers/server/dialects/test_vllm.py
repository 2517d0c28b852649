"""vLLM and SGLang, which name tokens by id: what they are asked, and how their answers read."""

import math

import numpy as np
import pytest
from recorded_answers import (
    ECHO,
    GENERATE,
    PLP,
    TARGETS,
    VOCAB_SIZE,
    ask,
    load,
    recorded,
    same_answer,
    sample_request,
    score_request,
    sglang_sample,
    sglang_scores,
    vllm_sample,
)

from gkdjax.types import SamplingParams
from gkdjax.utils.errors import UserError, WrongAnswer

MODELS = ("qwen3-tiny", "gemma3-tiny")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("file", ["plp", "rti"])
def test_prompt_logprobs_and_echo_as_recorded(model, file):
    ids, answer = recorded(f"vllm-{model}-{file}")
    read = ask(PLP, answer, score_request(ids))
    np.testing.assert_array_equal(read.target_ids, [ids[t + 1] for t in TARGETS])
    for j, t in enumerate(TARGETS):
        row = answer["choices"][0]["prompt_logprobs"][t + 1]
        best = sorted((entry["rank"], int(i)) for i, entry in row.items())[:3]
        logprobs = [row[str(i)]["logprob"] for _, i in best]
        assert read.target_logprob[j] == np.float32(row[str(ids[t + 1])]["logprob"])
        np.testing.assert_array_equal(read.top_ids[j], [i for _, i in best])
        np.testing.assert_array_equal(read.top_logprobs[j], np.float32(logprobs))
        rest = 1 - sum(map(math.exp, logprobs))
        assert math.exp(read.tail_logprob[j]) == pytest.approx(rest, rel=1e-6)
    assert (read.unmapped, read.finished, read.lost) == (0, False, False)
    _, echo = recorded(f"vllm-{model}-echo-mt1-ids")
    every = score_request(ids, at=tuple(range(len(ids) - 1)))
    same_answer(ask(PLP, answer, every), ask(ECHO, echo, every))
    for values in echo["choices"][0]["logprobs"].values():
        values.pop()  # the token that was drawn
    same_answer(ask(ECHO, echo, score_request(ids)), read)


def test_rows_come_back_by_their_index():
    rows = [recorded(f"vllm-{model}-plp") for model in MODELS]
    requests = [score_request(ids) for ids, _ in rows]
    alone = [ask(PLP, answer, request) for (_, answer), request in zip(rows, requests, strict=True)]
    (ids, first), (other, second) = rows
    both = first | {"choices": [second["choices"][0] | {"index": 1}, first["choices"][0]]}
    both["usage"]["prompt_tokens"] = len(ids) + len(other)
    for one, again in zip(alone, ask(PLP, both, *requests), strict=True):
        same_answer(one, again)
    both["choices"][0]["index"] = 0
    with pytest.raises(WrongAnswer, match="indices"):
        ask(PLP, both, *requests)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("file", ["generate", "generate-mt0"])
def test_sglang_as_recorded(model, file):
    whole = load(f"sgl-{model}-{file}")["response"]["meta_info"]
    ids, answer = sglang_scores(model, file)
    read = ask(GENERATE, answer, score_request(ids))
    np.testing.assert_array_equal(read.target_ids, [ids[t + 1] for t in TARGETS])
    for j, t in enumerate(TARGETS):
        logprobs, best, _ = zip(*whole["input_top_logprobs"][t + 1], strict=True)
        assert read.target_logprob[j] == np.float32(whole["input_token_logprobs"][t + 1][0])
        np.testing.assert_array_equal(read.top_ids[j], best)
        np.testing.assert_array_equal(read.top_logprobs[j], np.float32(logprobs))
    ids, answer = sglang_scores(model, file, start=0)
    every = score_request(ids, at=tuple(range(len(ids) - 1)))
    read, vllm = ask(GENERATE, answer, every), ask(PLP, recorded(f"vllm-{model}-plp")[1], every)
    np.testing.assert_array_equal(read.top_ids, vllm.top_ids)
    for name in ("top_logprobs", "target_logprob", "tail_logprob"):
        np.testing.assert_allclose(getattr(read, name), getattr(vllm, name), atol=2e-5)


@pytest.mark.parametrize("model", MODELS)
def test_samples(model):
    ids, drawn, answer = vllm_sample(model)
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    best = sorted(((v, int(k.removeprefix("token_id:"))) for k, v in top.items()), reverse=True)
    cases = [(PLP, answer, ids, drawn, [v for v, _ in best[:3]], [i for _, i in best[:3]])]
    ids, answer = sglang_sample(model)
    logprobs, best, _ = zip(*answer["meta_info"]["output_top_logprobs"][0], strict=True)
    cases.append((GENERATE, answer, ids, best[0], logprobs, best))  # it was drawn greedily
    for dialect, answer, ids, drawn, logprobs, best in cases:
        read = ask(dialect, answer, sample_request(ids, tokens=3))
        np.testing.assert_array_equal(read.target_ids, [drawn] * 3)
        np.testing.assert_array_equal(read.top_ids, [best] * 3)
        np.testing.assert_array_equal(read.top_logprobs, np.float32([logprobs] * 3))
        own = float(np.float32(logprobs[best.index(drawn)])) if drawn in best else None
        assert own is None or (read.target_logprob == own).all()
        assert not read.finished
        stopped = ask(dialect, answer, sample_request(ids, tokens=3, stop_ids=(7, drawn)))
        np.testing.assert_array_equal(stopped.target_ids, [drawn])  # what follows is not of it
        assert stopped.finished
        with pytest.raises(WrongAnswer, match="row 7: 3 tokens were drawn, and 2"):
            ask(dialect, answer, sample_request(ids, tokens=2))


def test_a_stop_that_is_not_shown_and_a_token_beyond_the_vocabulary():
    ids, _, answer = vllm_sample()
    answer["choices"][0]["finish_reason"] = "stop"
    answer["usage"]["completion_tokens"] = 4
    read = ask(PLP, answer, sample_request(ids, tokens=4))
    assert (len(read.target_ids), read.finished) == (3, False)
    answer["choices"][0]["token_ids"][1] = VOCAB_SIZE
    answer["choices"][0]["logprobs"]["tokens"][1] = f"token_id:{VOCAB_SIZE}"
    read = ask(PLP, answer, sample_request(ids, tokens=4))
    assert (len(read.target_ids), read.lost) == (0, True)


def test_what_scores_ask_for():
    two = score_request([5, 6, 7], at=(0,)), score_request([8, 9], at=(0,))
    call, body = PLP.score(*two), {"model": "m", "max_tokens": 1, "temperature": 0}
    assert (call.path, call.max_bytes) == ("/v1/completions", 2**20 + 5 * 5 * 1024)
    assert call.body == body | {"prompt": [[5, 6, 7], [8, 9]], "prompt_logprobs": 3}
    echo = {"prompt": [8, 9], "logprobs": 3, "echo": True, "return_tokens_as_token_ids": True}
    assert ECHO.score(two[1]).body == body | echo
    call = GENERATE.score(score_request([5, 6, 7, 8], at=(1, 2)))
    assert (call.path, call.max_bytes) == ("/generate", 2**20 + 3 * 5 * 1024)
    assert call.body == {
        **{"input_ids": [5, 6, 7, 8], "return_logprob": True, "top_logprobs_num": 3},
        **{"sampling_params": {"max_new_tokens": 0, "temperature": 0}, "logprob_start_len": 1},
    }


@pytest.mark.parametrize(("top_k", "sent"), [(None, -1), (40, 40)])
def test_what_samples_ask_for(top_k, sent):
    """All that the server would else take from the model's directory is said."""
    how = SamplingParams(9, 0.7, 0.9, top_k)
    request = sample_request([5, 6], sampling=how, stop_ids=(1, 4))
    call = PLP.sample(request)
    assert call == ECHO.sample(request)
    assert call.body == {
        **{"model": "m", "prompt": [5, 6], "n": 1, "max_tokens": 9, "logprobs": 3, "seed": 5},
        **{"temperature": 0.7, "top_p": 0.9, "top_k": sent, "min_p": 0.0},
        **{"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0},
        **{"stop_token_ids": [1, 4], "skip_special_tokens": False},
        **{"return_token_ids": True, "return_tokens_as_token_ids": True},
    }
    assert call.max_bytes == 2**20 + (2 + 9) * 5 * 1024
    with pytest.raises(UserError, match=r"temperature 0\.7.*sample at 1 or 0"):
        GENERATE.sample(request)
    how = SamplingParams(9, 0, 0.9, top_k)
    assert GENERATE.sample(sample_request([5, 6], sampling=how, stop_ids=(1, 4))).body == {
        **{"input_ids": [5, 6], "return_logprob": True, "top_logprobs_num": 3},
        "sampling_params": {
            **{"max_new_tokens": 9, "temperature": 0, "top_p": 0.9, "top_k": sent, "min_p": 0.0},
            **{"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0},
            **{"sampling_seed": 5, "stop_token_ids": [1, 4]},
            **{"skip_special_tokens": False, "no_stop_trim": True},
        },
    }


TWO = score_request([5, 6], at=(0,))


@pytest.mark.parametrize(
    ("requests", "why"),
    [
        ([score_request([5, VOCAB_SIZE], at=(0,))], f"row 7: token id {VOCAB_SIZE} "),
        ([score_request([-1, 5], at=(0,))], "row 7: token id -1 "),
        ([score_request([], at=())], "row 7: 0 ids"),
        ([score_request([5, 6], at=())], "must rise"),
        ([score_request([5, 6], at=(1,))], "must rise"),
        ([score_request([5, 6, 7], at=(-1, 0))], "must rise"),
        ([score_request([5, 6, 7, 8], at=(1, 1))], "must rise"),
        ([score_request([5, 6, 7, 8], at=(1, 0))], "must rise"),
        ([sample_request([VOCAB_SIZE])], "token id 4096"),
        ([sample_request([5], top_k=0)], "top_k=0"),
        ([TWO, TWO], "2 rows do not go"),
        ([], "0 rows do not go"),
    ],
)
def test_what_is_not_sent(requests, why):
    with pytest.raises(ValueError, match=why):
        ask(ECHO, {}, *requests)
