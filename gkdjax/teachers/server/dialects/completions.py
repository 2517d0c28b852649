"""What dialects of /v1/completions have in common."""

from typing import Any

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.dialects.base import Call, Dialect, check_read
from gkdjax.teachers.server.dialects.logprobs import TokenLogprobs
from gkdjax.teachers.server.json_fields import JsonField

PATH = "/v1/completions"
_PART = (
    ": a token that is a part of a character has no text of its own; where it is served by vLLM or"
    " SGLang, teacher.backend='vllm' or 'sglang' names it by id"
)


def sampling_fields(model: str, request: SampleRequest) -> dict[str, Any]:
    """How to sample, in the fields of OpenAI's own routes, which refuse others.

    A server may take what is not said from the model's generation_config.json: all is said.
    """
    sampling = request.sampling
    top_k = {} if sampling.top_k is None else {"top_k": sampling.top_k}
    return {
        "model": model,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "seed": request.seed,
    } | top_k


def echo(dialect: Dialect, request: ScoreRequest, **also: Any) -> Call:
    """Has the server repeat the prompt with logprobs; `also`: more fields of the body."""
    body = {
        "model": dialect.model,
        "prompt": request.ids.tolist(),
        "echo": True,
        "max_tokens": 1,  # not every server takes 0; it is cut off again
        "temperature": 0,
        "logprobs": request.top_k,
    }
    return Call(PATH, body | also, len(request.ids), request.top_k)


def read_echo(dialect: Dialect, root: JsonField, request: ScoreRequest) -> list[TeacherAnswer]:
    """The answer to `echo`."""
    check_read(root.find("usage", "prompt_tokens"), len(request.ids))
    logprobs = only_choice(root)["logprobs"]
    ids = request.ids.tolist()
    if logprobs.find("content") is not None:
        raise logprobs.wrong("are of the generated text alone: the server ignores 'echo'")
    keys, tokens = token_lists(logprobs, first=1)
    if len(keys) - len(ids) not in (0, 1):
        raise logprobs.wrong(
            f"are of {len(keys)} tokens, not of the {len(ids)} that were sent and one drawn: the"
            " server ignores 'echo', or adds tokens to the prompt"
        )
    for t, (key, i) in enumerate(zip(keys, ids, strict=False)):
        if not dialect.names(key, i):
            part = "" if key and "\N{REPLACEMENT CHARACTER}" not in key else _PART
            raise logprobs["tokens"].wrong(f"has {key!r} at {t}, where id {i} was sent{part}")
    # The first token has no logprob, so tokens[t] is token t + 1.
    return [dialect.scored([tokens[at] for at in request.at], request)]


def only_choice(root: JsonField) -> JsonField:
    """The choice of an answer that has one."""
    return root["choices"].entries(1)[0]


def token_lists(logprobs: JsonField, first: int = 0) -> tuple[list[str], list[TokenLogprobs]]:
    """(all tokens as strings, what is reported about each from `first` on; before it are nulls).

    This is the form of three lists side by side: `tokens`, `token_logprobs`, `top_logprobs`.
    """
    keys = [token.text() for token in logprobs["tokens"].entries()]
    own = logprobs["token_logprobs"].entries(len(keys))
    top = logprobs["top_logprobs"].entries(len(keys))
    for nothing in own[:first] + top[:first]:
        nothing.check_null()
    return keys, [
        TokenLogprobs(
            *(best.path, key, logprob.number(), [(k, v.number()) for k, v in best.items()]),
            by_key=True,
        )
        for key, logprob, best in zip(keys[first:], own[first:], top[first:], strict=True)
    ]
