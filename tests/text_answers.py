"""Recorded answers in text, and dialects whose tokenizers have those texts."""

import functools

from recorded_answers import VOCAB_SIZE, byte_level, gemma_like, load, texts

from gkdjax.teachers.server.dialects import openai

IDS = [321, 608, 78, 338, 10, 355, 309, 273, 326, 300, 130, 105]  # of most recorded requests
LLAMA_SERVER = {321: "def", 2969: "ater", 1280: " ExtendedContext", 3470: "fault"}
CHATS = {1371: " item", 3553: " raises", 3964: " ssl", 1295: "end", 1005: " 4", 3885: "shake"}


@functools.cache
def qwen():
    return byte_level(texts("vllm-qwen3-tiny-plp") | LLAMA_SERVER | CHATS)


@functools.cache
def gemma():
    pad_and_last = {0: "<pad>", 3932: " (1"}
    return gemma_like(texts("vllm-gemma3-tiny-plp") | pad_and_last)


@functools.cache
def completions(tokenizer=qwen):
    return openai.Completions("m", VOCAB_SIZE, tokenizer())


@functools.cache
def chat(tokenizer=qwen):
    return openai.Chat("m", VOCAB_SIZE, tokenizer())


def gemma_echo(server):
    recorded = load(
        f"{server}-gemma3-tiny-{'echo-mt0' if server == 'vllm' else 'completions-echo'}"
    )
    return recorded["request"]["prompt"], recorded["response"]


def content(answer):
    return answer["choices"][0]["logprobs"]["content"]


def classic(*tokens):
    """A sample in the form of three lists: the token's text and what follows it in order."""
    top = [
        {text: -1.0 - 0.5 * n for n, text in enumerate((token, "name", "):"))} for token in tokens
    ]
    return {
        "choices": [
            {
                "index": 0,
                "text": "".join(tokens),
                "finish_reason": "stop",
                "logprobs": {
                    "tokens": list(tokens),
                    "token_logprobs": [-1.0] * len(tokens),
                    "top_logprobs": top,
                },
            }
        ],
        "usage": {"prompt_tokens": len(IDS), "completion_tokens": len(tokens) + 1},
    }
