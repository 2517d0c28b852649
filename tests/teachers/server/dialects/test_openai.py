"""Answers in text: what OpenAI's routes are asked, and the recorded answers of five servers."""

import dataclasses
import json
import math

import numpy as np
import pytest
from recorded_answers import (
    ECHO,
    GENERATE,
    IDS,
    PLP,
    TARGETS,
    VOCAB_SIZE,
    ask,
    byte_level,
    chat,
    classic,
    completions,
    content,
    gemma,
    gemma_like,
    load,
    qwen,
    recorded,
    same_answer,
    sample_request,
    score_request,
    texts,
)

from gkdjax.teachers.server.dialects import openai
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity, sample_key
from gkdjax.types import Message, SamplingParams
from gkdjax.utils.errors import WrongAnswer

ECHOES = {"vllm": "vllm-gemma3-tiny-echo-mt0", "sgl": "sgl-gemma3-tiny-completions-echo"}


@pytest.mark.parametrize(
    ("server", "dialect", "exact"),
    [("vllm", PLP, "vllm-gemma3-tiny-plp"), ("sgl", GENERATE, "sgl-gemma3-tiny-generate")],
)
def test_an_echo_in_text_says_what_ids_say(server, dialect, exact):
    ids, answer = recorded(ECHOES[server])
    request = score_request(ids, at=range(len(ids) - 1))
    same_answer(ask(completions(gemma), answer, request), ask(dialect, recorded(exact)[1], request))
    _, answer = recorded("vllm-qwen3-tiny-echo-mt1-ids")  # which names ids
    by_id = [ask(one, answer, score_request(IDS)) for one in (completions(), ECHO)]
    same_answer(*by_id)


def test_an_echo_one_position_off_looks_right():
    """In llama-cpp-python's each row is consistent: what it says of token t is of t + 1. Nothing
    but a comparison with tokens that it drew shows it."""
    answer = load("llama-cpp-python-echo")["response"]
    logprobs = answer["choices"][0]["logprobs"]
    strings = [*logprobs["tokens"], *(key for row in logprobs["top_logprobs"][1:] for key in row)]
    ids = {string: 200 + i for i, string in enumerate(dict.fromkeys(strings))}
    sent = [ids[token] for token in logprobs["tokens"]]
    dialect = openai.Completions("m", VOCAB_SIZE, byte_level({i: s for s, i in ids.items()}))
    with pytest.raises(WrongAnswer, match="256, and 24 token ids were sent"):
        ask(dialect, answer, score_request(sent))
    answer["usage"]["prompt_tokens"] = len(sent)  # as many as were kept
    read = ask(dialect, answer, score_request(sent, top_k=20))
    for j, t in enumerate(TARGETS):
        assert read.target_logprob[j] == np.float32(logprobs["token_logprobs"][t + 1])
        named = {key: v for key, v in logprobs["top_logprobs"][t + 1].items() if key}
        best = sorted(named.items(), key=lambda pair: -pair[1])[:20]
        there = read.top_logprobs[j] > -np.inf  # a part of a character is shown as ""
        np.testing.assert_array_equal(read.top_ids[j][there], [ids[text] for text, _ in best])


def test_text_that_names_no_id_goes_into_the_tail():
    ids, answer = recorded(ECHOES["sgl"])
    row = answer["choices"][0]["logprobs"]["top_logprobs"][TARGETS[0] + 1]
    row["\ufffd"] = row.pop(next(iter(row)))
    read = ask(completions(gemma), answer, score_request(ids))
    assert read.unmapped == 1
    mass = sum(np.exp(value) for key, value in row.items() if key != "\ufffd")
    assert np.exp(read.tail_logprob[0]) == pytest.approx(1 - mass, rel=1e-6)
    assert read.top_logprobs[0, 2] == -np.inf


def test_a_target_of_shared_text_is_known_by_its_logprob():
    ids, answer = recorded(ECHOES["vllm"])
    shared = gemma_like(texts("vllm-gemma3-tiny-plp"))
    shared.add_tokens([" he"])  # beside "▁he", the id 780 at position 2
    dialect = openai.Completions("m", VOCAB_SIZE + 1, shared)
    exact = ask(completions(gemma), answer, score_request(ids, at=(1,)))
    same_answer(ask(dialect, answer, score_request(ids, at=(1,))), exact)
    # where " he" is listed and is not the target
    assert ask(dialect, answer, score_request(ids, at=(2,))).unmapped == 1


SAMPLING = {"model": "m", "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seed": 5, "n": 1}
SAMPLING |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
IDS_TOO = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
IDS_TOO |= {"return_token_ids": True, "return_tokens_as_token_ids": True, "stop_token_ids": [1]}
SAID = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("route", "by_id", "path", "prompt"),
    [
        (completions, openai.CompletionsById, "", {"prompt": [5, 6], "logprobs": 3}),
        (chat, openai.ChatById, "chat/", {"messages": SAID, "logprobs": True, "top_logprobs": 3}),
    ],
)
def test_what_samples_ask_for(route, by_id, path, prompt):
    request = sample_request([5, 6], sampling=SamplingParams(9, 0.7, 0.9))
    call = route().sample(request)
    assert call.path == f"/v1/{path}completions"
    assert call.body == SAMPLING | prompt
    assert by_id("m", VOCAB_SIZE, qwen()).sample(request).body == SAMPLING | prompt | IDS_TOO
    request = sample_request([5], sampling=SamplingParams(9, 0.7, 0.9, top_k=40))
    assert route().sample(request).body["top_k"] == 40
    assert route().by_messages == (route is chat)


def test_what_scores_ask_for():
    request = score_request([5, 6], at=(0,))
    body = {"model": "m", "prompt": [5, 6], "echo": True, "max_tokens": 1, "temperature": 0}
    call = completions().score(request)
    assert (call.path, call.body) == ("/v1/completions", body | {"logprobs": 3})
    by_id = openai.CompletionsById("m", VOCAB_SIZE, qwen()).score(request)
    assert by_id.body == call.body | {"return_tokens_as_token_ids": True}
    with pytest.raises(NotImplementedError):
        ask(chat(), {}, request)


def test_a_chat_server_gets_tools_and_calls_in_the_form_of_its_route():
    call = {"name": "look", "arguments": {"at": "é"}}
    tools = [{"name": "look", "parameters": {}}, {"type": "function", "function": {"name": "go"}}]
    given = {"id": "c", "type": "function", "function": call | {"arguments": '{"at": 1}'}}
    talk = (
        Message("assistant", "", json.dumps({"tool_calls": [call, given]})),
        *(Message("tool", "3"), Message("tool", "4", '{"tool_call_id":"c"}')),
    )
    request = dataclasses.replace(sample_request([5]), messages=talk, tools=json.dumps(tools))
    body = chat().sample(request).body
    assert body["tool_choice"] == "none"  # so that what is drawn comes as text
    assert body["tools"] == [{"type": "function", "function": tools[0]}, tools[1]]
    first = {"name": "look", "arguments": '{"at": "é"}'}
    first = {"id": "call00000", "type": "function", "function": first}
    assert body["messages"] == [
        {"role": "assistant", "content": "", "tool_calls": [first, given]},
        {"role": "tool", "content": "3", "tool_call_id": "call00000"},
        {"role": "tool", "content": "4", "tool_call_id": "c"},
    ]
    known = TeacherIdentity("f", "m", "t", None, {}, "")
    keys = {
        sample_key(known, dataclasses.replace(request, tools=t), by_messages=b)
        for t, b in (("", True), (request.tools, True), ("", False), (request.tools, False))
    }
    assert len(keys) == 3  # ids have the tools in them


@pytest.mark.parametrize("route", [completions, chat])
@pytest.mark.parametrize("named_by", ["id", "bytes", "token"])
def test_llama_server(route, named_by):
    answer = load("llama-server-v1" if route is completions else "llama-server-chat")["response"]
    (token,) = content(answer)
    best = [(one["id"], one["logprob"]) for one in token["top_logprobs"]]
    drawn, logprob = token["id"], token["logprob"]
    for one in (token, *token["top_logprobs"]):
        kept = {"id", "bytes", "token"} if named_by == "id" else {"token", named_by}
        for key in {"id", "bytes"} - kept:
            del one[key]
    read = ask(route(), answer, sample_request())
    np.testing.assert_array_equal(read.target_ids, [drawn])
    np.testing.assert_array_equal(read.target_logprob, np.float32([logprob]))
    np.testing.assert_array_equal(read.top_ids, [[i for i, _ in best]])
    np.testing.assert_array_equal(read.top_logprobs, np.float32([[value for _, value in best]]))
    assert (read.unmapped, read.finished) == (0, False)
    assert ask(route(), answer, sample_request(stop_ids=(drawn,))).finished


def test_odd_bytes_beside_an_id_and_one_text_twice():
    answer = load("llama-server-chat")["response"]
    content(answer)[0]["bytes"] = [256]  # the id comes first
    assert len(ask(chat(), answer, sample_request()).target_ids) == 1
    for one in (*content(answer), *content(answer)[0]["top_logprobs"]):
        del one["id"], one["bytes"]
    content(answer)[0]["top_logprobs"][1]["token"] = " raises"
    read = ask(chat(), answer, sample_request())
    assert (read.unmapped, (read.top_logprobs > -np.inf).sum()) == (2, 1)  # it names none


@pytest.mark.parametrize(("model", "tokenizer"), [("qwen3", qwen), ("gemma3", gemma)])
def test_vllm_chat(model, tokenizer):
    """The token drawn stands first, and one of the best two beside it."""
    answer = load(f"vllm-{model}-tiny-chat")["response"]
    request = sample_request(tokens=2, top_k=2)
    ids = answer["choices"][0]["token_ids"]
    read = ask(chat(tokenizer), answer, request)
    np.testing.assert_array_equal(read.target_ids, ids)
    drawn = np.float32([one["logprob"] for one in content(answer)])
    np.testing.assert_array_equal(read.target_logprob, drawn)
    # texts beside the drawn ones that the tokenizer has
    assert read.unmapped == 2 - (model == "qwen3")
    del answer["choices"][0]["token_ids"]
    same_answer(ask(chat(tokenizer), answer, request), read)


@pytest.mark.parametrize("token", ["no token", "\ufffd", "", "token_id:4096", "token_id:-1"])
def test_a_drawn_token_that_is_none_of_ours_loses_the_sample(token):
    read = ask(completions(), classic("def", token), sample_request(tokens=4))
    assert (read.lost, len(read.target_ids)) == (True, 0)


def test_parts_of_characters_may_be_shown_as_anything_where_ids_are_stated():
    ids = [321, 130, 105]
    read = ask(completions(), classic("def", "", "lo", ids=ids), sample_request(tokens=4))
    np.testing.assert_array_equal(read.target_ids, ids)
    np.testing.assert_array_equal(read.top_ids[1:, 0], ids[1:])  # "lo" is not the id 338 here
    with pytest.raises(WrongAnswer, match=r"has 105, where .* says 'token_id:130'"):
        twice = classic("token_id:321", "token_id:130", ids=[321, 105])
        ask(completions(), twice, sample_request(tokens=4))


def test_where_a_character_is_begun_text_may_be_of_a_part_of_it():
    """vLLM shows the second byte of "é" as "é"; where none is begun "é" is a token of its own."""
    tokenizer = byte_level(texts("vllm-qwen3-tiny-plp") | {900: "é", 901: "ß"})
    answer = classic("def", "", "é", ids=[321, 130, 105])
    for row in answer["choices"][0]["logprobs"]["top_logprobs"]:
        row["ß"] = row.pop("name")
    dialect = openai.Completions("m", VOCAB_SIZE, tokenizer)
    read = ask(dialect, answer, sample_request(tokens=4))
    np.testing.assert_array_equal(read.target_ids, [321, 130, 105])
    assert [901 in row for row in read.top_ids] == [True, True, False]
    np.testing.assert_array_equal(read.top_ids[2, :2], [105, 309])
    assert read.unmapped == 1


def test_the_text_of_the_token_drawn_with_another_logprob_is_another_token():
    answer = classic("def", "", ids=[321, 130])
    answer["choices"][0]["logprobs"]["top_logprobs"][1][""] = -1.2
    read = ask(completions(), answer, sample_request(tokens=4))
    np.testing.assert_array_equal(read.top_ids[1, :2], [355, 309])
    assert read.unmapped == 1


def test_an_answer_that_ends_at_the_servers_own_limit_is_named():
    answer = classic("def", "lo")
    del answer["usage"]
    answer["choices"][0]["finish_reason"] = "length"
    read = ask(completions(), answer, sample_request(tokens=2))
    np.testing.assert_array_equal(read.top_ids, [[321, 355, 309], [338, 355, 309]])
    assert (read.finished, read.lost, read.unmapped) == (False, False, 0)
    with pytest.raises(WrongAnswer, match=r'"length" after 2 tokens, and 3 .*max_new_tokens.* 2 '):
        ask(completions(), answer, sample_request(tokens=3))
    answer["usage"] = {"prompt_tokens": len(IDS), "completion_tokens": 3}  # one is hidden
    assert not ask(completions(), answer, sample_request(tokens=3)).finished
    with pytest.raises(WrongAnswer, match=r"row 7.*list 3 .* 5 were asked for: .*top_k=3"):
        ask(completions(), classic("def", "lo", "l", " he"), sample_request(tokens=4, top_k=5))


@pytest.mark.parametrize(
    ("tokens", "reason", "logprobs"),
    [
        *((["def"], reason, None) for reason in ("content_filter", "tool_calls", "function_call")),
        ([], "stop", None),
        ([], "stop", {"tokens": [], "token_logprobs": [], "top_logprobs": []}),
    ],
)
def test_what_is_no_response_is_lost(tokens, reason, logprobs):
    answer = classic(*tokens)
    answer["choices"][0] |= {"finish_reason": reason, "logprobs": logprobs}
    assert ask(completions(), answer, sample_request()).lost


@pytest.mark.parametrize(("rest", "lost"), [(0.05, False), (0.2, True)])
def test_tokens_that_share_a_text_are_counted_and_matter_by_what_they_may_have(rest, lost):
    """They leave an entry less, and the rest of the probability may be theirs."""
    answer = classic("def")
    logprobs = answer["choices"][0]["logprobs"]
    for key, share in zip(("def", "name", "):"), (0.6, 0.4 - rest - 0.1, 0.1), strict=True):
        logprobs["top_logprobs"][0][key] = math.log(share)
    logprobs["token_logprobs"] = [math.log(0.6)]
    read = ask(completions(), answer, sample_request(tokens=4, top_k=4))
    assert (read.lost, read.unmapped) == (lost, 1)
    assert (f"up to {rest:.2f} of" in read.unreadable) == lost
