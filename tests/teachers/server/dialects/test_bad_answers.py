"""Recorded answers with a fault each, in every dialect: none is taken for an answer."""

import copy
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_answers import (
    ECHO,
    GENERATE,
    IDS,
    PLP,
    ask,
    chat,
    classic,
    completions,
    content,
    gemma,
    load,
    recorded,
    sample_request,
    score_request,
    sglang_sample,
    sglang_scores,
    vllm_sample,
)

from gkdjax.utils.errors import WrongAnswer

GEMMA_IDS = load("sgl-gemma3-tiny-completions-echo")["request"]["prompt"]
# name -> (the dialect, the request, a new answer)
KINDS = {
    "prompt_logprobs": (PLP, score_request(IDS), lambda: recorded("vllm-qwen3-tiny-plp")[1]),
    "echo": (ECHO, score_request(IDS), lambda: recorded("vllm-qwen3-tiny-echo-mt1-ids")[1]),
    "sample": (PLP, sample_request(tokens=3), lambda: vllm_sample()[2]),
    "sglang scores": (GENERATE, score_request(IDS), lambda: sglang_scores()[1]),
    "sglang sample": (GENERATE, sample_request(tokens=3), lambda: sglang_sample()[1]),
    "text echo": (
        completions(gemma),
        score_request(GEMMA_IDS),
        lambda: load("sgl-gemma3-tiny-completions-echo")["response"],
    ),
    "classic": (completions(), sample_request(tokens=4), lambda: classic("def", "lo")),
    "vllm chat": (
        chat(),
        sample_request(tokens=2, top_k=2),
        lambda: load("vllm-qwen3-tiny-chat")["response"],
    ),
    "llama-server": (completions(), sample_request(), lambda: load("llama-server-v1")["response"]),
    "chat": (chat(), sample_request(), lambda: load("llama-server-chat")["response"]),
}


def at(*path, to):
    """A fault: the value at this place of the answer."""

    def spoil(answer):
        for key in path[:-1]:
            answer = answer[key]
        answer[path[-1]] = to

    return spoil


def choice(*path, to):
    return at("choices", 0, *path, to=to)


def meta(*path, to):
    return at("meta_info", *path, to=to)


def without(*path):
    def spoil(answer):
        for key in path[:-1]:
            answer = answer[key]
        del answer[path[-1]]

    return spoil


def repeated_choice(answer):
    answer["choices"] *= 2


def inserted_bos(answer):
    if "meta_info" in answer:
        answer["meta_info"]["input_token_logprobs"].insert(1, [-1.0, 2, None])
        answer["meta_info"]["input_top_logprobs"].insert(1, [[-1.0, 2, None]])
    else:
        answer["choices"][0]["prompt_logprobs"].insert(1, {"2": {"logprob": -1.0}})


def places(*which):
    """Only these of the lists' entries, without what the server states beside them."""

    def spoil(answer):
        answer["usage"] = None
        logprobs = answer["choices"][0]["logprobs"]
        for key, values in logprobs.items():
            logprobs[key] = [copy.deepcopy(values[place]) for place in which]

    return spoil


def one_too_few(answer):
    for key in ("3389", "4018"):
        del answer["choices"][0]["prompt_logprobs"][4][key]


def shifted(answer):
    rows = answer["meta_info"]["input_token_logprobs"]
    for row, before in zip(rows, [rows[0][1], *[row[1] for row in rows]], strict=False):
        row[1] = before


def doubled(answer):
    rows = answer["meta_info"]["input_top_logprobs"][1]
    rows[1] = rows[0]


def ids_twice(answer):
    rows = content(answer)[0]["top_logprobs"]
    rows[1]["id"] = rows[0]["id"]


def shared_text(answer):
    row = answer["choices"][0]["logprobs"]["top_logprobs"][4]
    del row[next(iter(row))]


BEST = ("prompt_logprobs", 4, "3389", "logprob")
TOP, OWN = ("logprobs", "top_logprobs"), ("logprobs", "token_logprobs")
FIRST = ("logprobs", "content", 0)
RAW = {"token": " x", "logprob": -1.0, "top_logprobs": []}
FAULTS = {
    "prompt_logprobs": [
        (inserted_bos, "prompt_logprobs has 13 entries, not 12"),
        (at("usage", "prompt_tokens", to=13), "usage.prompt_tokens is 13, and 12"),
        (choice("prompt_logprobs", 2, to=None), r"prompt_logprobs\[2\] is null"),
        (choice("prompt_logprobs", 0, to={}), r"prompt_logprobs\[0\] is {}, not null"),
        # no target, but it was sent
        (without("choices", 0, "prompt_logprobs", 2, "78"), r"prompt_logprobs\[2\] has no '78'"),
        (choice("prompt_token_ids", to=[1, 2]), "are not the ids that were sent"),
        (repeated_choice, "choices has 2 entries, not 1"),
        (without("choices"), "answer has no 'choices'"),
        (choice("index", to=1), r"indices \[1\]"),
        (choice("index", to=0.0), "is 0.0, not a whole number"),
        (choice(*BEST, to=0.5), "above 1"),
        (choice(*BEST, to=-0.01), "together"),
        (choice(*BEST, to=math.nan), "is nan"),
        (choice(*BEST, to=-(10**400)), "not a number of that size"),
        (choice("prompt_logprobs", 4, "03389", to={"logprob": -9.0}), "'03389', which is no"),
        (choice("prompt_logprobs", 4, "3.0", to={"logprob": -9.0}), "'3.0', which is no"),
        (choice("prompt_logprobs", 4, "1", to={"logprob": -15.0}), "lists 5 most .*, and 3"),
        (one_too_few, "lists 2 most probable tokens, and 3"),
    ],
    "echo": [
        (choice("logprobs", to=None), "logprobs is null, not an object"),
        (choice("logprobs", "tokens", 2, to="token_id:79"), "'token_id:79' at 2, where id 78"),
        (choice("logprobs", "tokens", to=["token_id:321"]), "token_logprobs has 13 entries"),
        (choice(*OWN, 0, to=-1.0), r"\[0\] is -1.0, not null"),
        (choice(*OWN, 4, to=-8.0), "among the best"),
        (choice(*TOP, 4, "x", to=-8.0), "lists 5 most"),
        (choice(*TOP, 4, to=dict.fromkeys("abc", -9)), "by their text"),
        *((places(*range(n)), f"are of {n} tokens, not of the 12") for n in (1, 11)),
    ],
    "sample": [
        (choice("token_ids", to=None), "token_ids is null"),
        (choice("token_ids", 1, to=5), "other tokens in token_ids"),
        (choice("token_ids", 1, to=992.0), "992.0, not a whole number"),
        (choice("prompt_token_ids", to=[1]), "are not the ids that were sent"),
        (choice("finish_reason", to="abort"), "gave up"),
        (at("usage", "prompt_tokens", to=13), "13, and 12 token ids were sent"),
        (at("usage", "completion_tokens", to=5), "5, and the answer shows 3"),
        (repeated_choice, "choices has 2 entries, not 1"),
    ],
    "sglang scores": [
        (inserted_bos, "input_token_logprobs has 10 entries, not 9"),
        (meta("prompt_tokens", to=13), "13, and 12 token ids were sent"),
        (shifted, "is of id 338, where 10 was sent"),
        (meta("input_token_logprobs", 2, 1, to=5), "is of id 5, where 355 was sent"),
        (meta("input_token_logprobs", 2, to=[-1.0, 355]), "has 2 entries, not 3"),
        (meta("input_token_logprobs", 0, 0, to=-1.0), "is -1.0, not null"),
        (meta("input_top_logprobs", 0, to=[]), r"is \[\], not null"),
        (meta("input_top_logprobs", 1, to=[]), "lists 0 most probable tokens, and 3"),
        (doubled, "lists id 3389 twice"),
        (meta("input_top_logprobs", to=[]), "has 0 entries, not 9"),
    ],
    "sglang sample": [
        (at("output_ids", to=[2969]), "are other tokens than"),
        (meta("output_top_logprobs", to=[]), "has 0 entries, not 3"),
        (meta("finish_reason", to={"type": "abort", "message": "x"}), "gave up"),
        (meta("completion_tokens", to=9), "9, and the answer shows 3"),
        (meta("prompt_tokens", to=13), "13, and 12 token ids were sent"),
    ],
    "text echo": [
        (places(0, 1, *range(1, 13)), "of 14 tokens, not of the 12"),
        (places(0, 1, *range(1, 12)), "at 2, where id 780 was sent"),
        (shared_text, "2 texts for 3 tokens.*backend='vllm'"),
    ],
    "classic": [
        (at("usage", "prompt_tokens", to=13), "13, and 12 token ids were sent"),
        # parts of characters may be shown as anything, whole ones may not
        (choice("token_ids", to=[321, 608]), "has 608, where .* says 'lo'"),
        (places(*[0] * 5), "5 tokens were drawn, and 4"),
    ],
    "chat": [
        (choice("logprobs", to=None), "has no logprobs: the server ignores"),
        (choice("logprobs", to={"content": None}), "has no 'tokens'"),
        (choice("finish_reason", to="abort"), "gave up"),
        (choice(*FIRST, "id", to=1371.0), "1371.0, not a whole number"),
        (choice(*FIRST, "top_logprobs", 0, "logprob", to=-0.001), "together"),
        (ids_twice, "lists id 3553 twice"),
        (at("usage", "completion_tokens", to=40), "think in secret"),
        (at("usage", "prompt_tokens", to=7), "7, and the prompt has 12 tokens here"),
        *((choice(*FIRST, to=RAW | {"bytes": [32, b]}), "are no bytes") for b in (256, -1)),
        *(
            (choice(*FIRST, to=RAW | {"bytes": [b]}), "not a whole number")
            for b in (1.0, "a", True)
        ),
    ],
}


@pytest.mark.parametrize(
    ("kind", "spoil", "why"),
    [(kind, *fault) for kind, faults in FAULTS.items() for fault in faults],
)
def test_a_fault_is_named(kind, spoil, why):
    dialect, request, make = KINDS[kind]
    answer = make()
    spoil(answer)
    with pytest.raises(WrongAnswer, match=f"^row 7.*{why}"):
        ask(dialect, answer, request)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        # vLLM shows the two bytes of "é" as "" and "é", SGLang as the vocabulary spells them
        ("vllm-qwen3-tiny-echo-mt0", r"tokens has '' at 10, where id 130"),
        ("sgl-qwen3-tiny-completions-echo", r"tokens has 'Ã' at 10, where id 130"),
        ("llama-server-echo", "generated text alone: the server ignores 'echo'"),
    ],
)
def test_recorded_echoes_that_are_refused(file, why):
    with pytest.raises(WrongAnswer, match=f"^row 7.*{why}"):
        ask(completions(), load(file)["response"], score_request(IDS))


@pytest.mark.parametrize("model", ["qwen3-tiny", "gemma3-tiny"])
def test_an_echo_by_text_is_refused_where_ids_were_asked_for(model):
    ids, answer = recorded(f"vllm-{model}-echo-mt0")
    with pytest.raises(WrongAnswer, match=r"row 7: .*tokens has '(def|<bos>)' at 0, where id \d+"):
        ask(ECHO, answer, score_request(ids))


_ODD = st.sampled_from(
    [
        *(None, True, 0, 1, -1, 3.0, -0.5, 1e308, -1e308, 10**400, 2**40, -9999.0),
        *("", "3", "token_id:3", "\ud800", [], {}, [[]], [None], {"0": None}, {"error": "x"}),
        *(float("nan"), float("inf")),
    ]
)


@st.composite
def spoiled(draw: st.DrawFn, answer: Any) -> Any:
    """An answer with one to three values replaced, removed, doubled, or put elsewhere."""
    for _ in range(draw(st.integers(1, 3))):
        places = _places(answer)
        if not places:
            break
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        other, place = places[draw(st.integers(0, len(places) - 1))]
        value = copy.deepcopy(draw(_ODD) if draw(st.booleans()) else other[place])
        match draw(st.sampled_from(["replace", "remove", "insert"])):
            case "replace":
                holder[key] = value
            case "remove":
                del holder[key]
            case "insert" if isinstance(holder, list):
                holder.insert(key, value)
            case "insert":
                holder[draw(st.sampled_from(["0", "01", "token_id:5", "id", "error"]))] = value
    return answer


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of everything below `value`."""
    if not isinstance(value, dict | list):
        return []
    keys = value if isinstance(value, dict) else range(len(value))
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(st.data())
def test_whatever_comes_it_is_an_answer_or_an_error_that_names_the_row(kind, data):
    dialect, request, make = KINDS[kind]
    answer = data.draw(spoiled(make()))
    try:
        ask(dialect, answer, request)
    except WrongAnswer as error:
        assert str(error).startswith("row 7"), error
        assert "\n" not in str(error)
        str(error).encode()
