"""Answers of real servers, kept in teachers/server/recorded, and dialects that read them.

A file holds {path, request, status, response}; of llama-server's the request is written after the
fact, and llama-cpp-python's answer is cut to its first 24 positions.
"""

import copy
import functools
import json
import pathlib
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gkdjax.teachers.server.answers import Request, SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.dialects import openai, sglang, vllm
from gkdjax.teachers.server.dialects.base import Dialect
from gkdjax.teachers.server.scheduler import exchange
from gkdjax.types import Message, SamplingParams

FILES = pathlib.Path(__file__).parent / "teachers" / "server" / "recorded"
VOCAB_SIZE = 4096  # of both models
TARGETS = (3, 6, 7, 10)  # positions that a test scores: not all, and not from the start
IDS = [321, 608, 78, 338, 10, 355, 309, 273, 326, 300, 130, 105]  # of most recorded requests
PARTS = {130: "Ã", 105: "©"}  # the bytes of é in qwen3-tiny, as byte-level BPE spells them
PLP = vllm.PromptLogprobs("m", VOCAB_SIZE)
ECHO = vllm.EchoLogprobs("m", VOCAB_SIZE)
GENERATE = sglang.Generate("m", VOCAB_SIZE)


def ask(dialect: Dialect, answer: Any, *requests: Request) -> TeacherAnswer | list[TeacherAnswer]:
    """What a server's answer is to these requests; not in a list where there is one."""

    class Server:
        def post(self, path, body, read, **_):
            return read(answer)

    found = exchange(Server(), dialect, requests)
    return found[0] if len(found) == 1 else found


def score_request(ids: list[int], at: tuple[int, ...] = TARGETS, top_k: int = 3) -> ScoreRequest:
    return ScoreRequest("row 7", np.asarray(ids, np.int32), np.asarray(at, np.int32), top_k)


def sample_request(
    ids: list[int] = IDS,
    *,
    tokens: int = 1,
    top_k: int = 3,
    stop_ids: tuple[int, ...] = (1,),
    sampling: SamplingParams | None = None,
) -> SampleRequest:
    sampling = sampling or SamplingParams(tokens, temperature=1.0, top_p=0.9)
    messages = (Message("system", "Be short."), Message("user", "hi"))
    return SampleRequest("row 7", np.asarray(ids, np.int32), messages, sampling, 5, stop_ids, top_k)


@functools.cache
def _text(name: str) -> str:
    return (FILES / f"{name}.json").read_text()


def load(name: str) -> dict:
    """A file of its own for each caller."""
    return json.loads(_text(name))


def recorded(name: str) -> tuple[list[int], dict]:
    """(the ids that were sent, the answer)."""
    file = load(name)
    sent = file["request"]
    return sent["input_ids"] if "input_ids" in sent else sent["prompt"], file["response"]


def vllm_sample(model: str = "qwen3-tiny") -> tuple[list[int], int, dict]:
    """(the ids, the one token that was drawn beside an echo, three times over as a sample)."""
    ids, answer = recorded(f"vllm-{model}-echo-mt1-ids")
    choice = answer["choices"][0]
    for key, values in choice["logprobs"].items():
        choice["logprobs"][key] = [copy.deepcopy(values[-1]) for _ in range(3)]
    drawn = int(choice["logprobs"]["tokens"][0].removeprefix("token_id:"))
    choice |= {"token_ids": [drawn] * 3, "prompt_token_ids": ids, "prompt_logprobs": None}
    answer["usage"] |= {"completion_tokens": 3}
    return ids, drawn, answer


def sglang_scores(
    model: str = "qwen3-tiny", file: str = "generate-mt0", start: int = TARGETS[0]
) -> tuple[list[int], dict]:
    """(the ids, the answer as it is from `start` on)."""
    ids, answer = recorded(f"sgl-{model}-{file}")
    meta = answer["meta_info"]
    own, top = (meta[key][start:] for key in ("input_token_logprobs", "input_top_logprobs"))
    meta["input_token_logprobs"] = [[None, *own[0][1:]], *own[1:]]
    meta["input_top_logprobs"] = [None, *top[1:]]
    return ids, answer


def sglang_sample(model: str = "qwen3-tiny") -> tuple[list[int], dict]:
    """(the ids, the answer with the token drawn, three times over)."""
    ids, answer = recorded(f"sgl-{model}-generate")
    answer["output_ids"] *= 3
    for key in ("output_token_logprobs", "output_top_logprobs"):
        answer["meta_info"][key] = [[*row] for row in answer["meta_info"][key] * 3]
    answer["meta_info"]["completion_tokens"] = 3
    return ids, answer


def texts(name: str) -> dict[int, str]:
    """The tokens' texts, as vLLM decoded them; a part of a character it shows otherwise."""
    rows = load(name)["response"]["choices"][0]["prompt_logprobs"][1:]
    pairs = [(int(i), entry["decoded_token"]) for row in rows for i, entry in row.items()]
    return {i: text for i, text in pairs if i not in PARTS}


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


@functools.cache
def qwen() -> Any:
    llama_server = {321: "def", 2969: "ater", 1280: " ExtendedContext", 3470: "fault"}
    llama_server |= {1371: " item", 3553: " raises", 3964: " ssl", 1295: "end"}
    return byte_level(texts("vllm-qwen3-tiny-plp") | llama_server | {1005: " 4", 3885: "shake"})


@functools.cache
def gemma() -> Any:
    return gemma_like(texts("vllm-gemma3-tiny-plp") | {0: "<pad>", 3932: " (1"})


@functools.cache
def completions(tokenizer=qwen) -> openai.Completions:
    return openai.Completions("m", VOCAB_SIZE, tokenizer())


@functools.cache
def chat(tokenizer=qwen) -> openai.Chat:
    return openai.Chat("m", VOCAB_SIZE, tokenizer())


def content(answer: dict) -> list[dict]:
    return answer["choices"][0]["logprobs"]["content"]


def classic(*tokens: str, ids: list[int] | None = None) -> dict:
    """A sample in the form of three lists: the token's text and what follows it in order."""
    top = [
        {text: -1.0 - 0.5 * n for n, text in enumerate((token, "name", "):"))} for token in tokens
    ]
    own = [-1.0] * len(tokens)
    logprobs = {"tokens": list(tokens), "token_logprobs": own, "top_logprobs": top}
    choice = {"index": 0, "text": "".join(tokens), "finish_reason": "stop", "logprobs": logprobs}
    usage = {"prompt_tokens": len(IDS), "completion_tokens": len(tokens) + 1}
    return {"choices": [choice | ({} if ids is None else {"token_ids": ids})], "usage": usage}


def same_answer(a: TeacherAnswer, b: TeacherAnswer) -> None:
    for name in ("target_ids", "target_logprob", "top_ids", "top_logprobs", "tail_logprob"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert (a.finished, a.unmapped, a.lost) == (b.finished, b.unmapped, b.lost)
