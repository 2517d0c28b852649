"""Answers in text with a fault each: none is taken for an answer."""

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_answers import (
    TARGETS,
    answer_or_wrong,
    in_choice,
    load,
    sample_request,
    score_request,
    set_at,
    spoiled,
)
from text_answers import IDS, chat, classic, completions, content, gemma, gemma_echo

from gkdjax.utils.errors import WrongAnswer


def ids_twice(answer):
    rows = content(answer)[0]["top_logprobs"]
    rows[1]["id"] = rows[0]["id"]


def choices_missing(answer):
    del answer["choices"]


CONTENT = ("logprobs", "content", 0)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (in_choice("logprobs", to=None), "has no logprobs: the server ignores"),
        (in_choice("logprobs", to={"content": None}), "has no 'tokens'"),
        (in_choice("finish_reason", to="abort"), "gave up"),
        (in_choice(*CONTENT, "id", to=1371.0), "1371.0, not a whole number"),
        (in_choice(*CONTENT, "logprob", to="-1"), "not a number"),
        (in_choice(*CONTENT, "logprob", to=0.5), "above 1"),
        (in_choice(*CONTENT, "top_logprobs", to=None), "is null, not a list"),
        (in_choice(*CONTENT, "top_logprobs", 0, "logprob", to=-0.001), "together"),
        (ids_twice, "lists id 3553 twice"),
        (in_choice(*CONTENT, "bytes", to=[256]), None),  # the id comes first
        (set_at("usage", "completion_tokens", to=40), "think in secret"),
        (choices_missing, "has no 'choices'"),
        (set_at("error", to="no"), "is an error"),
    ],
)
def test_a_bad_sample(spoil, why):
    answer = load("llama-server-chat")["response"]
    spoil(answer)
    if why is None:
        assert len(chat().read_sample(answer, sample_request(IDS)).target_ids) == 1
        return
    with pytest.raises(WrongAnswer, match=f"^row 7.*{why}"):
        chat().read_sample(answer, sample_request(IDS))


@pytest.mark.parametrize("byte", [256, -1, 1.0, "a", True])
def test_bytes_that_are_none(byte):
    answer = load("llama-server-chat")["response"]
    content(answer)[0] |= {"id": None, "bytes": [32, byte]}
    with pytest.raises(WrongAnswer, match=r"^row 7.*bytes.* (are no bytes|not a whole number)"):
        chat().read_sample(answer, sample_request(IDS))


def test_a_server_with_a_limit_of_its_own():
    answer = classic("def", "lo", "l", " he")
    with pytest.raises(
        WrongAnswer, match=r"row 7.*list 3 .* 5 were asked for: set teacher\.top_k=3"
    ):
        completions().read_sample(answer, sample_request(IDS, tokens=4, top_k=5))


@pytest.mark.parametrize(("rest", "lost"), [(0.05, False), (0.2, True)])
def test_tokens_that_share_a_text_are_counted_and_matter_by_what_they_may_have(rest, lost):
    """They leave an entry less, and the rest of the probability may be theirs."""
    answer = classic("def")
    said = answer["choices"][0]["logprobs"]
    for key, share in zip(("def", "name", "):"), (0.6, 0.4 - rest - 0.1, 0.1), strict=True):
        said["top_logprobs"][0][key] = math.log(share)
    said["token_logprobs"] = [math.log(0.6)]
    read = completions().read_sample(answer, sample_request(IDS, tokens=4, top_k=4))
    assert (read.lost, read.unmapped) == (lost, 1)
    assert (f"up to {rest:.2f} of" in read.unreadable) == lost
    ids, echo = gemma_echo("sgl")
    row = echo["choices"][0]["logprobs"]["top_logprobs"][TARGETS[0] + 1]
    del row[next(iter(row))]
    with pytest.raises(WrongAnswer, match=r"row 7.* 2 texts for 3 tokens.*backend='vllm'"):
        completions(gemma).read_scores(echo, [score_request(ids)])


def test_a_prompt_that_was_added_to():
    answer = classic("def")
    answer["usage"]["prompt_tokens"] += 1
    with pytest.raises(WrongAnswer, match="13, and 12 token ids were sent"):
        completions().read_sample(answer, sample_request(IDS))
    ids, echo = gemma_echo("sgl")
    for values in echo["choices"][0]["logprobs"].values():
        values.insert(1, copy.deepcopy(values[1]))
    del echo["usage"]
    with pytest.raises(WrongAnswer, match="of 14 tokens, not of the 12"):
        completions(gemma).read_scores(echo, [score_request(ids)])
    for values in echo["choices"][0]["logprobs"].values():
        values.pop()
    with pytest.raises(WrongAnswer, match="at 2, where id 780 was sent"):
        completions(gemma).read_scores(echo, [score_request(ids)])


def _read_scores(answer):
    return completions(gemma).read_scores(answer, [score_request(gemma_echo("sgl")[0])])


READ = {
    "echo": (lambda: gemma_echo("sgl")[1], _read_scores),
    "classic": (
        lambda: classic("def", "lo"),
        lambda a: completions().read_sample(a, sample_request(IDS, tokens=4)),
    ),
    "chat": (
        lambda: load("vllm-qwen3-tiny-chat")["response"],
        lambda a: chat().read_sample(a, sample_request(IDS, tokens=2, top_k=2)),
    ),
    "llama-server": (
        lambda: load("llama-server-v1")["response"],
        lambda a: completions().read_sample(a, sample_request(IDS)),
    ),
}


@pytest.mark.parametrize("kind", READ)
@settings(deadline=None)
@given(st.data())
def test_whatever_it_is_it_is_an_answer_or_wrong(kind, data):
    make, read = READ[kind]
    answer_or_wrong(read, data.draw(spoiled(make())))
