"""Answers in text: the recorded ones of five servers, and what cannot be is refused."""

import dataclasses
import json

import numpy as np
import pytest
from recorded_answers import (
    TARGETS,
    VOCAB_SIZE,
    byte_level,
    gemma_like,
    load,
    same_answer,
    sample_request,
    score_request,
    texts,
)
from text_answers import IDS, chat, classic, completions, content, gemma, gemma_echo, qwen

from gkdjax.teachers.server.dialects import openai, sglang, vllm
from gkdjax.teachers.server.dialects.openai import ChatById, CompletionsById
from gkdjax.teachers.server.store.answers import sample_key
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity
from gkdjax.types import Message, SamplingParams
from gkdjax.utils.errors import WrongAnswer


@pytest.mark.parametrize("server", ["vllm", "sgl"])
def test_an_echo_in_text_says_what_ids_say(server):
    ids, answer = gemma_echo(server)
    request = score_request(ids, at=range(len(ids) - 1))
    (by_text,) = completions(gemma).read_scores(answer, [request])
    if server == "vllm":
        exact = vllm.PromptLogprobs("m", VOCAB_SIZE)
        answer = load("vllm-gemma3-tiny-plp")["response"]
    else:
        exact = sglang.Generate("m", VOCAB_SIZE)
        answer = load("sgl-gemma3-tiny-generate")["response"]
    (by_id,) = exact.read_scores(answer, [request])
    assert by_text.unmapped == 0
    same_answer(by_text, by_id)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        # vLLM shows the two bytes of "é" as "" and "é", SGLang as the vocabulary spells them
        ("vllm-qwen3-tiny-echo-mt0", r"tokens has '' at 10, where id 130"),
        ("sgl-qwen3-tiny-completions-echo", r"tokens has 'Ã' at 10, where id 130"),
        ("llama-server-echo", "generated text alone: the server ignores 'echo'"),
        ("llama-server-oov", "is an error: .*invalid tokens"),
    ],
)
def test_echoes_that_are_refused(file, why):
    with pytest.raises(WrongAnswer, match=f"^row 7.*{why}"):
        completions().read_scores(load(file)["response"], [score_request(IDS)])


def llama_cpp():
    """(a tokenizer of its strings, the ids, the answer); ids stand for strings as they come."""
    answer = load("llama-cpp-python-echo")["response"]
    logprobs = answer["choices"][0]["logprobs"]
    strings = [*logprobs["tokens"], *(key for row in logprobs["top_logprobs"][1:] for key in row)]
    ids = {string: 200 + i for i, string in enumerate(dict.fromkeys(strings))}
    answer["usage"]["prompt_tokens"] = len(logprobs["tokens"])  # as many as were kept
    return ids, [ids[token] for token in logprobs["tokens"]], answer


def test_an_echo_one_position_off_looks_right():
    """In llama-cpp-python's each row is consistent: what it says of token t is of t + 1. Nothing
    but a comparison with tokens that it drew shows it."""
    ids, sent, answer = llama_cpp()
    dialect = openai.Completions("m", VOCAB_SIZE, byte_level({i: s for s, i in ids.items()}))
    (read,) = dialect.read_scores(answer, [score_request(sent, top_k=20)])
    logprobs = answer["choices"][0]["logprobs"]
    for j, t in enumerate(TARGETS):
        assert read.target_logprob[j] == np.float32(logprobs["token_logprobs"][t + 1])
        named = {key: v for key, v in logprobs["top_logprobs"][t + 1].items() if key}
        best = sorted(named.items(), key=lambda pair: -pair[1])[:20]
        there = read.top_logprobs[j] > -np.inf  # a part of a character is shown as ""
        np.testing.assert_array_equal(read.top_ids[j][there], [ids[text] for text, _ in best])
    with pytest.raises(WrongAnswer, match="256, and 24 token ids were sent"):
        dialect.read_scores(load("llama-cpp-python-echo")["response"], [score_request(sent)])


def test_text_that_names_no_id_goes_into_the_tail():
    ids, answer = gemma_echo("sgl")
    row = answer["choices"][0]["logprobs"]["top_logprobs"][TARGETS[0] + 1]
    (lost, logprob), *rest = row.items()
    del row[lost]
    row["\ufffd"] = logprob
    (read,) = completions(gemma).read_scores(answer, [score_request(ids)])
    assert read.unmapped == 1
    mass = sum(np.exp(value) for _, value in rest)
    assert np.exp(read.tail_logprob[0]) == pytest.approx(1 - mass, rel=1e-6)
    assert read.top_logprobs[0, 2] == -np.inf


def test_a_target_of_shared_text_is_known_by_its_logprob():
    ids, answer = gemma_echo("vllm")
    shared = gemma_like(texts("vllm-gemma3-tiny-plp"))
    shared.add_tokens([" he"])  # beside "▁he", the id 780 at position 2
    (exact,) = completions(gemma).read_scores(answer, [score_request(ids, at=(1,))])
    dialect = openai.Completions("m", VOCAB_SIZE + 1, shared)
    same_answer(*dialect.read_scores(answer, [score_request(ids, at=(1,))]), exact)
    (read,) = dialect.read_scores(answer, [score_request(ids, at=(2,))])
    assert read.unmapped == 1  # where " he" is listed and is not the target


def test_an_echo_may_name_ids():
    recorded = load("vllm-qwen3-tiny-echo-mt1-ids")
    (read,) = completions().read_scores(recorded["response"], [score_request(IDS)])
    exact = vllm.EchoLogprobs("m", VOCAB_SIZE)
    same_answer(read, *exact.read_scores(recorded["response"], [score_request(IDS)]))


def test_what_is_asked_for():
    call = completions().score([score_request([5, 6], at=(0,))])
    assert call.path == "/v1/completions"
    assert call.body == {
        **{"model": "m", "prompt": [5, 6], "echo": True, "max_tokens": 1, "temperature": 0},
        "logprobs": 3,
    }
    drawn = {"model": "m", "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    drawn |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1}
    request = sample_request([5, 6], sampling=SamplingParams(9, 0.7, 0.9))
    call = completions().sample(request)
    assert call.body == drawn | {"prompt": [5, 6], "logprobs": 3}
    call = chat().sample(request)
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]
    assert call.path == "/v1/chat/completions"
    assert call.body == drawn | {"messages": said, "logprobs": True, "top_logprobs": 3}
    ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    more = ids | {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
    more |= {"stop_token_ids": [1]}
    request = sample_request([5, 6], sampling=SamplingParams(9, 0.7, 0.9))
    for plain, by_id in ((completions(), CompletionsById), (chat(), ChatById)):
        body = by_id("m", VOCAB_SIZE, qwen()).sample(request).body
        assert body == plain.sample(request).body | more
    score = CompletionsById("m", VOCAB_SIZE, qwen()).score([score_request([5, 6], at=(0,))])
    assert score.body["return_tokens_as_token_ids"]
    for dialect in (completions(), chat()):
        request = sample_request([5], sampling=SamplingParams(9, 0.7, 0.9, top_k=40))
        assert dialect.sample(request).body["top_k"] == 40


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


def test_chat_scores_nothing():
    with pytest.raises(NotImplementedError):
        chat().score([score_request([5, 6], at=(0,))])
    with pytest.raises(NotImplementedError):
        chat().read_scores({}, [score_request([5, 6], at=(0,))])
    assert chat().by_messages
    assert not completions().by_messages


@pytest.mark.parametrize("kind", [completions, chat])
@pytest.mark.parametrize("named_by", ["id", "bytes", "token"])
def test_llama_server(kind, named_by):
    answer = load("llama-server-v1" if kind is completions else "llama-server-chat")["response"]
    (said,) = content(answer)
    best = [(one["id"], one["logprob"]) for one in said["top_logprobs"]]
    drawn, logprob = said["id"], said["logprob"]
    for one in (said, *said["top_logprobs"]):
        kept = {"id", "bytes", "token"} if named_by == "id" else {"token", named_by}
        for key in {"id", "bytes"} - kept:
            del one[key]
    read = kind().read_sample(answer, sample_request(IDS))
    np.testing.assert_array_equal(read.target_ids, [drawn])
    np.testing.assert_array_equal(read.target_logprob, np.float32([logprob]))
    np.testing.assert_array_equal(read.top_ids, [[i for i, _ in best]])
    np.testing.assert_array_equal(read.top_logprobs, np.float32([[value for _, value in best]]))
    assert read.unmapped == 0
    assert not read.finished
    assert kind().read_sample(answer, sample_request(IDS, stop_ids=(drawn,))).finished


@pytest.mark.parametrize(("model", "tokenizer"), [("qwen3", qwen), ("gemma3", gemma)])
def test_vllm_chat(model, tokenizer):
    """The token drawn stands first, and one of the best two beside it."""
    answer = load(f"vllm-{model}-tiny-chat")["response"]
    ids = answer["choices"][0]["token_ids"]
    read = chat(tokenizer).read_sample(answer, sample_request(IDS, tokens=2, top_k=2))
    np.testing.assert_array_equal(read.target_ids, ids)
    drawn = np.float32([one["logprob"] for one in content(answer)])
    np.testing.assert_array_equal(read.target_logprob, drawn)
    known = 1 if model == "qwen3" else 0  # texts beside the drawn ones that the tokenizer has
    assert read.unmapped == 2 - known
    del answer["choices"][0]["token_ids"]
    again = chat(tokenizer).read_sample(answer, sample_request(IDS, tokens=2, top_k=2))
    same_answer(again, read)


def test_the_classic_form():
    read = completions().read_sample(classic("def", "lo"), sample_request(IDS, tokens=4))
    np.testing.assert_array_equal(read.target_ids, [321, 338])
    np.testing.assert_array_equal(read.top_ids, [[321, 355, 309], [338, 355, 309]])
    assert (read.finished, read.lost, read.unmapped) == (False, False, 0)


@pytest.mark.parametrize("token", ["no token", "\ufffd", "", "token_id:4096", "token_id:-1"])
def test_a_drawn_token_that_is_none_of_ours_loses_the_sample(token):
    read = completions().read_sample(classic("def", token), sample_request(IDS, tokens=4))
    assert read.lost
    assert len(read.target_ids) == 0


def test_parts_of_characters_may_be_shown_as_anything_where_ids_are_stated():
    answer = classic("def", "", "lo")
    answer["choices"][0]["token_ids"] = [321, 130, 105]
    read = completions().read_sample(answer, sample_request(IDS, tokens=4))
    np.testing.assert_array_equal(read.target_ids, [321, 130, 105])
    np.testing.assert_array_equal(read.top_ids[1:, 0], [130, 105])  # "lo" is not the id 338 here
    answer["choices"][0]["token_ids"] = [321, 130, 608]
    with pytest.raises(WrongAnswer, match=r"has 608, where .* says 'lo'"):
        completions().read_sample(answer, sample_request(IDS, tokens=4))


def test_where_a_character_is_begun_text_may_be_of_a_part_of_it():
    """vLLM shows the second byte of "é" as "é"; where none is begun "é" is a token of its own."""
    tokenizer = byte_level(texts("vllm-qwen3-tiny-plp") | {900: "é", 901: "ß"})
    answer = classic("def", "", "é")
    answer["choices"][0]["token_ids"] = [321, 130, 105]
    for row in answer["choices"][0]["logprobs"]["top_logprobs"]:
        row["ß"] = row.pop("name")
    request = sample_request(IDS, tokens=4)
    read = openai.Completions("m", VOCAB_SIZE, tokenizer).read_sample(answer, request)
    np.testing.assert_array_equal(read.target_ids, [321, 130, 105])
    assert [901 in row for row in read.top_ids] == [True, True, False]
    np.testing.assert_array_equal(read.top_ids[2, :2], [105, 309])
    assert read.unmapped == 1


def test_ids_that_are_stated_twice_must_agree():
    answer = classic("token_id:321", "token_id:130")
    answer["choices"][0]["token_ids"] = [321, 105]
    with pytest.raises(WrongAnswer, match=r"has 105, where .* says 'token_id:130'"):
        completions().read_sample(answer, sample_request(IDS, tokens=4))


def test_the_text_of_the_token_drawn_with_another_logprob_is_another_token():
    answer = classic("def", "")
    answer["choices"][0]["token_ids"] = [321, 130]
    answer["choices"][0]["logprobs"]["top_logprobs"][1][""] = -1.2
    read = completions().read_sample(answer, sample_request(IDS, tokens=4))
    np.testing.assert_array_equal(read.top_ids[1, :2], [355, 309])
    assert read.unmapped == 1


def test_one_text_twice_in_a_list_names_none():
    answer = load("llama-server-chat")["response"]
    for one in (*content(answer), *content(answer)[0]["top_logprobs"]):
        del one["id"], one["bytes"]
    content(answer)[0]["top_logprobs"][1]["token"] = " raises"
    read = chat().read_sample(answer, sample_request(IDS))
    assert read.unmapped == 2
    assert (read.top_logprobs > -np.inf).sum() == 1


def test_an_answer_that_ends_at_the_servers_own_limit_is_named():
    answer = classic("def", "lo")
    del answer["usage"]
    answer["choices"][0]["finish_reason"] = "length"
    assert len(completions().read_sample(answer, sample_request(IDS, tokens=2)).target_ids) == 2
    with pytest.raises(WrongAnswer, match=r'"length" after 2 tokens, and 3 .*max_new_tokens.* 2 '):
        completions().read_sample(answer, sample_request(IDS, tokens=3))
    answer["usage"] = {"prompt_tokens": len(IDS), "completion_tokens": 3}  # one is hidden
    assert not completions().read_sample(answer, sample_request(IDS, tokens=3)).finished


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "function_call"])
def test_what_is_no_response_is_lost(reason):
    answer = classic("def")
    answer["choices"][0] |= {"finish_reason": reason, "logprobs": None}
    assert completions().read_sample(answer, sample_request(IDS)).lost


@pytest.mark.parametrize("empty", [None, {"tokens": [], "token_logprobs": [], "top_logprobs": []}])
def test_an_empty_response_is_lost(empty):
    answer = classic()
    answer["choices"][0]["logprobs"] = empty
    assert completions().read_sample(answer, sample_request(IDS)).lost
