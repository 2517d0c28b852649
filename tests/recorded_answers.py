"""Answers of real servers, kept in teachers/server/recorded, and how tests spoil them.

A file holds {path, request, status, response}; of llama-server's the request is written after the
fact, and llama-cpp-python's answer is cut to its first 24 positions.
"""

import copy
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.types import Message, SamplingParams
from gkdjax.utils.errors import WrongAnswer

FILES = pathlib.Path(__file__).parent / "teachers" / "server" / "recorded"
VOCAB_SIZE = 4096  # of both models
TARGETS = (3, 6, 7, 10)  # positions that a test scores: not all, and not from the start


@functools.cache
def _text(name: str) -> str:
    return (FILES / f"{name}.json").read_text()


def load(name: str) -> dict:
    """A file of its own for each caller."""
    return json.loads(_text(name))


def score_request(ids: list[int], at: tuple[int, ...] = TARGETS, top_k: int = 3) -> ScoreRequest:
    return ScoreRequest("row 7", np.asarray(ids, np.int32), np.asarray(at, np.int32), top_k)


def sample_request(
    ids: list[int],
    *,
    tokens: int = 1,
    top_k: int = 3,
    stop_ids: tuple[int, ...] = (1,),
    sampling: SamplingParams | None = None,
) -> SampleRequest:
    sampling = sampling or SamplingParams(tokens, temperature=1.0, top_p=0.9)
    messages = (Message("system", "Be short."), Message("user", "hi"))
    return SampleRequest("row 7", np.asarray(ids, np.int32), messages, sampling, 5, stop_ids, top_k)


def vllm_prompt_logprobs(model="qwen3-tiny"):
    """(the ids, the answer)."""
    recorded = load(f"vllm-{model}-plp")
    return recorded["request"]["prompt"], recorded["response"]


def vllm_echo(model="qwen3-tiny"):
    recorded = load(f"vllm-{model}-echo-mt1-ids")
    return recorded["request"]["prompt"], recorded["response"]


def vllm_sample(model="qwen3-tiny"):
    """The one token that the echo's answer was drawn with, three times over, as a sample."""
    ids, answer = vllm_echo(model)
    choice = answer["choices"][0]
    for key, values in choice["logprobs"].items():
        choice["logprobs"][key] = [copy.deepcopy(values[-1]) for _ in range(3)]
    drawn = int(choice["logprobs"]["tokens"][0].removeprefix("token_id:"))
    choice |= {"token_ids": [drawn] * 3, "prompt_token_ids": ids, "prompt_logprobs": None}
    answer["usage"] |= {"completion_tokens": 3}
    return ids, drawn, answer


def texts(name: str) -> dict[int, str]:
    """The tokens' texts, as vLLM decoded them; a part of a character it shows otherwise."""
    rows = load(name)["response"]["choices"][0]["prompt_logprobs"][1:]
    pairs = [(int(i), entry["decoded_token"]) for row in rows for i, entry in row.items()]
    return {i: text for i, text in pairs if i not in PARTS}


PARTS = {130: "Ã", 105: "©"}  # the bytes of é in qwen3-tiny, as byte-level BPE spells them


def byte_level(texts: dict[int, str]) -> Any:
    """A byte-level tokenizer in which these ids have these texts; the other ids have odd ones."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = {i: "".join(s for s, _ in cut.pre_tokenize_str(text)) for i, text in texts.items()}
    return _tokenizer(spelled | PARTS, decoders.ByteLevel())


def gemma_like(texts: dict[int, str]) -> Any:
    """The same with "▁" for a space, and "<bos>"."""
    spelled = {i: text.replace(" ", "▁") for i, text in texts.items()} | {2: "<bos>"}
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _tokenizer(spelled, decoders.Sequence(parts))


def _tokenizer(spelled: dict[int, str], decoder: Any) -> Any:
    vocab = {spelled.get(i) or f"<unused{i}>": i for i in range(VOCAB_SIZE)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.decoder = decoder
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def same_answer(a: TeacherAnswer, b: TeacherAnswer) -> None:
    for name in ("target_ids", "target_logprob", "top_ids", "top_logprobs", "tail_logprob"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert (a.finished, a.unmapped, a.lost) == (b.finished, b.unmapped, b.lost)


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
    answer = copy.deepcopy(answer)
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


def set_at(*path, to):
    """A fault: the value at this place of the answer."""

    def spoil(answer):
        holder = answer
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = to

    return spoil


def in_choice(*path, to):
    return set_at("choices", 0, *path, to=to)


def answer_or_wrong(read: Callable[[Any], Any], answer: Any) -> bool:
    """Whether it was read; any error but the one that names the row fails the test."""
    try:
        read(answer)
    except WrongAnswer as error:
        assert str(error).startswith("row 7"), error
        assert "\n" not in str(error)
        str(error).encode()
        return False
    return True
