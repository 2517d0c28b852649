"""What dialects of /v1/completions have in common."""

from collections.abc import Callable, Sequence
from typing import Any

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer, collect
from gkdjax.teachers.server.dialects import base
from gkdjax.teachers.server.dialects.json_fields import JsonField, opened
from gkdjax.teachers.server.dialects.logprobs import (
    Key,
    TokenLogprobs,
    check_counts,
    check_read,
    check_written,
    position,
)
from gkdjax.utils.errors import WrongAnswer

PATH = "/v1/completions"
_PART = (
    ": a token that is a part of a character has no text of its own; where it is served by vLLM or"
    " SGLang, teacher.backend='vllm' or 'sglang' names it by id"
)
_UNCOUNTED = 4  # tokens of a prompt, at most


def drawing(model: str, request: SampleRequest) -> dict[str, Any]:
    """The part of a request body that says how to draw.

    What is not said a server may take from the model's generation_config.json, so all is said that
    OpenAI's own routes know; they refuse other fields.
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


def echo(asked: base.Dialect, requests: Sequence[ScoreRequest], **also: Any) -> base.Call:
    """A score request that has the server repeat the prompt with logprobs; one row alone.

    Args:
      asked: the dialect that sends it.
      requests: the row.
      also: more fields of the body.
    """
    base.check_scores(requests, asked)
    (request,) = requests
    body = {
        "model": asked.model,
        "prompt": request.ids.tolist(),
        "echo": True,
        "max_tokens": 1,  # not every server takes 0; it is cut off again
        "temperature": 0,
        "logprobs": request.top_k,
    }
    return base.call(PATH, body | also, tokens=len(request.ids), top_k=request.top_k)


def read_echo(
    answer: Any,
    request: ScoreRequest,
    *,
    vocab_size: int,
    is_token: Callable[[str, int], bool],
    id_of: Callable[[Key], int | None],
    by_id: bool,
) -> TeacherAnswer:
    """The answer to `echo`.

    Args:
      answer: parsed JSON.
      request: the row.
      vocab_size: of the ids in common.
      is_token: whether the server would write this string for this id.
      id_of: the id of a key, None if it names none.
      by_id: see `logprobs.check_counts`.
    """
    root = opened(answer, request.name)
    check_prompt_tokens(root, request)
    logprobs = only_choice(root)["logprobs"]
    ids = request.ids.tolist()
    if logprobs.find("content") is not None:
        raise logprobs.wrong("are of the generated text alone: the server ignores 'echo'")
    tokens, said = classic(logprobs, first=1)
    if len(tokens) - len(ids) not in (0, 1):
        raise logprobs.wrong(
            f"are of {len(tokens)} tokens, not of the {len(ids)} that were sent and one drawn: the"
            " server ignores 'echo', or adds tokens to the prompt"
        )
    for t, (token, i) in enumerate(zip(tokens, ids, strict=False)):
        if not is_token(token, i):
            part = "" if token and "\N{REPLACEMENT CHARACTER}" not in token else _PART
            raise logprobs["tokens"].wrong(f"has {token!r} at {t}, where id {i} was sent{part}")
    of_targets = [said[at] for at in request.at]  # the first token has none, so said[t] is of t + 1
    check_counts(of_targets, request.top_k, vocab_size, by_id=by_id)
    for one in of_targets:
        if hidden := one.hidden(request.top_k, vocab_size):
            raise WrongAnswer(
                f"{hidden}: use teacher.backend='vllm' or 'sglang' where one of them serves it:"
                " they name tokens by id; or a smaller teacher.top_k"
            )
    return collect(
        [
            position(one, ids[at + 1], id_of, one.collapsed(request.top_k, vocab_size))
            for one, at in zip(of_targets, request.at, strict=True)
        ],
        top_k=request.top_k,
        vocab_size=vocab_size,
        name=request.name,
    )


def check_prompt_tokens(root: JsonField, *requests: ScoreRequest | SampleRequest) -> None:
    """Raises WrongAnswer if the server says that it has read more or less than was sent."""
    if (usage := root.find("usage")) is not None:
        check_read(usage.find("prompt_tokens"), sum(len(request.ids) for request in requests))


def check_prompt_not_shortened(root: JsonField, request: SampleRequest) -> None:
    """Raises WrongAnswer if the server says that it has read much less than our own template makes.

    A few tokens are nothing: not all count those that stand before the first message, or add none.
    """
    usage = root.find("usage")
    read = None if usage is None else usage.find("prompt_tokens")
    if read is not None and read.whole() < len(request.ids) - _UNCOUNTED:
        raise read.wrong(
            f"is {read.value}, and the prompt has {len(request.ids)} tokens here: the server drops"
            " or shortens messages, or its chat template is another one"
        )


def check_completion_tokens(root: JsonField, shown: int) -> None:
    """Raises WrongAnswer if the server says that it has written more than it shows."""
    if (usage := root.find("usage")) is not None:
        check_written(usage.find("completion_tokens"), shown)


def written_tokens(root: JsonField, shown: int) -> int:
    """How many the server says that it has drawn, or else how many it shows."""
    usage = root.find("usage")
    said = None if usage is None else usage.find("completion_tokens")
    return shown if said is None else max(shown, said.whole())


def only_choice(root: JsonField) -> JsonField:
    """The choice of an answer that has one."""
    (choice,) = root["choices"].entries(1)
    return choice


def classic(logprobs: JsonField, first: int) -> tuple[list[str], list[TokenLogprobs]]:
    """The form of three lists side by side: `tokens`, `token_logprobs`, `top_logprobs`.

    Args:
      logprobs: the object that holds the lists.
      first: token from which on there are logprobs; before it there are nulls.

    Returns:
      the strings of all tokens, and what is said of each from `first` on.
    """
    tokens = [token.text() for token in logprobs["tokens"].entries()]
    own = logprobs["token_logprobs"].entries(len(tokens))
    top = logprobs["top_logprobs"].entries(len(tokens))
    for nothing in own[:first] + top[:first]:
        nothing.check_null()
    rows = zip(tokens[first:], own[first:], top[first:], strict=True)
    return tokens, [
        TokenLogprobs(
            *(best.path, token, logprob.number(), [(key, v.number()) for key, v in best.items()]),
            by_key=True,
        )
        for token, logprob, best in rows
    ]
