"""SGLang's /generate: recorded answers read right, and what cannot be is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_answers import (
    TARGETS,
    VOCAB_SIZE,
    answer_or_wrong,
    load,
    sample_request,
    score_request,
    set_at,
    spoiled,
    vllm_prompt_logprobs,
)

from gkdjax.teachers.server.dialects import sglang, vllm
from gkdjax.types import SamplingParams
from gkdjax.utils.errors import UserError, WrongAnswer

MODELS = ("qwen3-tiny", "gemma3-tiny")
GENERATE = sglang.Generate("m", VOCAB_SIZE)


def scores(model="qwen3-tiny", file="generate-mt0", start=TARGETS[0]):
    """(the ids, the answer as it is from `start` on)."""
    recorded = load(f"sgl-{model}-{file}")
    meta = recorded["response"]["meta_info"]
    for key, nothing in (
        ("input_token_logprobs", lambda row: [None, *row[1:]]),
        ("input_top_logprobs", lambda row: None),
    ):
        first, *rest = meta[key][start:]
        meta[key] = [nothing(first), *rest]
    return recorded["request"]["input_ids"], recorded["response"]


def sample(model="qwen3-tiny"):
    """(the ids, the answer with the token drawn, three times over)."""
    recorded = load(f"sgl-{model}-generate")
    answer = recorded["response"]
    answer["output_ids"] *= 3
    for key in ("output_token_logprobs", "output_top_logprobs"):
        answer["meta_info"][key] = [[*row] for row in answer["meta_info"][key] * 3]
    answer["meta_info"]["completion_tokens"] = 3
    return recorded["request"]["input_ids"], answer


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("file", ["generate", "generate-mt0"])
def test_as_recorded(model, file):
    whole = load(f"sgl-{model}-{file}")["response"]["meta_info"]
    ids, answer = scores(model, file)
    (read,) = GENERATE.read_scores(answer, [score_request(ids)])
    np.testing.assert_array_equal(read.target_ids, [ids[t + 1] for t in TARGETS])
    for j, t in enumerate(TARGETS):
        assert read.target_logprob[j] == np.float32(whole["input_token_logprobs"][t + 1][0])
        logprobs, best, _ = zip(*whole["input_top_logprobs"][t + 1], strict=True)
        np.testing.assert_array_equal(read.top_ids[j], best)
        np.testing.assert_array_equal(read.top_logprobs[j], np.float32(logprobs))
        rest = 1 - sum(map(math.exp, logprobs))
        assert math.exp(read.tail_logprob[j]) == pytest.approx(rest, rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_from_the_start_it_says_what_vllm_says(model):
    ids, answer = scores(model, start=0)
    request = score_request(ids, at=tuple(range(len(ids) - 1)))
    (read,) = GENERATE.read_scores(answer, [request])
    (other,) = vllm.PromptLogprobs("m", VOCAB_SIZE).read_scores(
        vllm_prompt_logprobs(model)[1], [request]
    )
    np.testing.assert_array_equal(read.top_ids, other.top_ids)
    np.testing.assert_allclose(read.top_logprobs, other.top_logprobs, atol=2e-5)
    np.testing.assert_allclose(read.target_logprob, other.target_logprob, atol=2e-5)


def test_what_is_asked_for():
    call = GENERATE.score([score_request([5, 6, 7, 8], at=(1, 2))])
    assert call.path == "/generate"
    assert call.body == {
        "input_ids": [5, 6, 7, 8],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 1,
        "top_logprobs_num": 3,
    }
    assert call.max_bytes == 2**20 + 3 * 5 * 1024
    with pytest.raises(UserError, match="row 7: token id 4096"):
        GENERATE.score([score_request([5, VOCAB_SIZE, 7], at=(0,))])
    with pytest.raises(ValueError, match="2 rows"):
        GENERATE.score([score_request([5, 6], at=(0,))] * 2)


@pytest.mark.parametrize(("top_k", "sent"), [(None, -1), (40, 40)])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_what_a_sample_asks_for(temperature, top_k, sent):
    sampling = SamplingParams(9, temperature, 0.9, top_k)
    call = GENERATE.sample(sample_request([5, 6], sampling=sampling, stop_ids=(1, 4)))
    assert call.body["sampling_params"] == {
        **{"max_new_tokens": 9, "temperature": temperature, "top_p": 0.9, "top_k": sent},
        # what the server would take from the model's directory
        **{"min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
        **{"sampling_seed": 5, "stop_token_ids": [1, 4]},
        **{"skip_special_tokens": False, "no_stop_trim": True},
    }
    rest = {key: value for key, value in call.body.items() if key != "sampling_params"}
    assert rest == {"input_ids": [5, 6], "return_logprob": True, "top_logprobs_num": 3}


def test_a_temperature_that_moves_the_logprobs_is_refused():
    with pytest.raises(UserError, match=r"temperature 0\.7.*sample at 1 or 0"):
        GENERATE.sample(sample_request([5], sampling=SamplingParams(9, 0.7, 1.0)))


@pytest.mark.parametrize("model", MODELS)
def test_a_sample(model):
    ids, answer = sample(model)
    ((logprob, drawn, _),) = load(f"sgl-{model}-generate")["response"]["meta_info"][
        "output_token_logprobs"
    ]
    read = GENERATE.read_sample(answer, sample_request(ids, tokens=3))
    np.testing.assert_array_equal(read.target_ids, [drawn] * 3)
    np.testing.assert_array_equal(read.target_logprob, np.float32([logprob] * 3))
    assert (read.top_ids[:, 0] == drawn).all()  # it was drawn greedily
    assert not read.finished
    stopped = GENERATE.read_sample(answer, sample_request(ids, tokens=3, stop_ids=(drawn,)))
    assert stopped.finished
    np.testing.assert_array_equal(stopped.target_ids, [drawn])


def in_meta(*path, to):
    return set_at("meta_info", *path, to=to)


def inserted_bos(answer):
    answer["meta_info"]["input_token_logprobs"].insert(1, [-1.0, 2, None])
    answer["meta_info"]["input_top_logprobs"].insert(1, [[-1.0, 2, None]])


def doubled(answer):
    rows = answer["meta_info"]["input_top_logprobs"][1]
    rows[1] = rows[0]


def shifted(answer):
    rows = answer["meta_info"]["input_token_logprobs"]
    for row, before in zip(rows, [rows[0][1], *[row[1] for row in rows]], strict=False):
        row[1] = before


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (inserted_bos, "input_token_logprobs has 10 entries, not 9"),
        (in_meta("prompt_tokens", to=13), "13, and 12 token ids were sent"),
        (shifted, "is of id 338, where 10 was sent"),
        (in_meta("input_token_logprobs", 2, 1, to=5), "is of id 5, where 355 was sent"),
        (in_meta("input_token_logprobs", 2, 1, to=355.0), "355.0, not a whole number"),
        (in_meta("input_token_logprobs", 2, 1, to="355"), '"355", not a whole number'),
        (in_meta("input_token_logprobs", 2, to=[-1.0, 355]), "has 2 entries, not 3"),
        (in_meta("input_token_logprobs", 1, 0, to=None), "is null, not a number"),
        (in_meta("input_token_logprobs", 0, 0, to=-1.0), "is -1.0, not null"),
        (in_meta("input_top_logprobs", 0, to=[]), r"is \[\], not null"),
        (in_meta("input_top_logprobs", 1, to=None), "is null, not a list"),
        (in_meta("input_top_logprobs", 1, to=[]), "lists 0 most probable tokens, and 3"),
        (in_meta("input_top_logprobs", 1, 0, 0, to=0.5), "above 1"),
        (in_meta("input_top_logprobs", 1, 0, 0, to="-1"), "not a number"),
        (doubled, "lists id 3389 twice"),
        (in_meta("input_top_logprobs", to=[]), "has 0 entries, not 9"),
        (set_at("meta_info", to=None), "meta_info is null, not an object"),
        (set_at("error", to={"message": "no"}), "is an error"),
    ],
)
def test_bad_scores(spoil, why):
    ids, answer = scores()
    spoil(answer)
    with pytest.raises(WrongAnswer, match=f"^row 7.*{why}"):
        GENERATE.read_scores(answer, [score_request(ids)])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (set_at("output_ids", to=[2969]), "are other tokens than"),
        (set_at("output_ids", 1, to=True), "true, not a whole number"),
        (in_meta("output_top_logprobs", to=[]), "has 0 entries, not 3"),
        (in_meta("finish_reason", to={"type": "abort", "message": "x"}), "gave up"),
        (in_meta("finish_reason", to=None), "finish_reason is null"),
        (in_meta("completion_tokens", to=9), "9, and the answer shows 3"),
        (in_meta("prompt_tokens", to=13), "13, and 12 token ids were sent"),
    ],
)
def test_a_bad_sample(spoil, why):
    ids, answer = sample()
    spoil(answer)
    with pytest.raises(WrongAnswer, match=f"^row 7.*{why}"):
        GENERATE.read_sample(answer, sample_request(ids, tokens=3))


READ = {
    "scores": (scores, lambda ids, a: GENERATE.read_scores(a, [score_request(ids)])),
    "sample": (sample, lambda ids, a: GENERATE.read_sample(a, sample_request(ids, tokens=3))),
}


@pytest.mark.parametrize("kind", READ)
@settings(deadline=None)
@given(st.data())
def test_whatever_it_is_it_is_an_answer_or_wrong(kind, data):
    make, read = READ[kind]
    ids, answer = make()
    answer_or_wrong(lambda a: read(ids, a), data.draw(spoiled(answer)))
