"""What OpenAI's routes have in common wherever they are served: tokens come back as text.

Only where text names one id does an entry count; see `token_map`. Some servers give ids, too, if
they are asked: text does not tell the tokens that are parts of characters.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import transformers

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer, lost_sample
from gkdjax.teachers.server.dialects import base, completions
from gkdjax.teachers.server.dialects.json_fields import JsonField, opened
from gkdjax.teachers.server.dialects.logprobs import (
    Key,
    TokenLogprobs,
    check_counts,
    check_not_cut,
    id_in,
    is_lost,
    response,
)
from gkdjax.teachers.server.dialects.token_map import TokenMap

_IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True}


@dataclasses.dataclass(frozen=True)
class _ByText:
    """What the two routes share: how drawn tokens read."""

    model: str
    vocab_size: int
    tokenizer: transformers.PreTrainedTokenizerFast  # the teacher's
    rows_per_request: ClassVar[bool] = False
    asks_for_ids: ClassVar[bool] = False  # with fields that OpenAI's own servers refuse

    def _more(self, request: SampleRequest) -> dict[str, Any]:
        """Fields that vLLM and llama.cpp have beside OpenAI's: ids, and all that changes draws."""
        if not self.asks_for_ids:
            return {}
        return {
            "top_k": request.sampling.top_k or 0,  # 0: all
            "min_p": 0.0,
            "repetition_penalty": 1.0,  # vLLM's name
            "repeat_penalty": 1.0,  # llama.cpp's
            "stop_token_ids": list(request.stop_ids),
            **_IDS,
        }

    @functools.cached_property
    def _tokens(self) -> TokenMap:
        return TokenMap(self.tokenizer)

    def _id_of(self, key: Key) -> int | None:
        stated = id_in(key)
        if stated is not None:
            return stated
        return self._tokens.of_bytes(key) if isinstance(key, bytes) else self._tokens.of_string(key)

    def _response(
        self, root: JsonField, written: JsonField, request: SampleRequest
    ) -> TeacherAnswer:
        """The only choice as an answer; `written` is its text, "" or null if it has none."""
        choice = completions.only_choice(root)
        logprobs = choice.find("logprobs")
        if is_lost(choice["finish_reason"]) or (logprobs is None and written.value in ("", None)):
            return lost_sample(request.top_k, 0)
        if logprobs is None:
            raise choice.wrong("has no logprobs: the server ignores that they were asked for")
        content = logprobs.find("content")
        said = (
            _content(content) if content is not None else completions.classic(logprobs, first=0)[1]
        )
        check_counts(said, request.top_k, self.vocab_size, by_id=False)
        completions.check_completion_tokens(root, len(said))
        written_tokens = completions.written_tokens(root, len(said))
        check_not_cut(choice["finish_reason"], written_tokens, request)
        ids = self._drawn(said, choice.find("token_ids"))
        if any(id_in(key) is None for one in said for key, _ in one.top):
            begun = self._tokens.parts_before(ids)
            said = [_after_part(one) if b else one for one, b in zip(said, begun, strict=True)]
        return response(said, ids, request, vocab_size=self.vocab_size, id_of=self._id_of)

    def _drawn(
        self, said: Sequence[TokenLogprobs], token_ids: JsonField | None
    ) -> list[int | None]:
        """The ids of the tokens; None: the text does not tell."""
        by_text = [self._id_of(one.key) for one in said]
        if token_ids is None:
            return by_text
        ids = [i.whole() for i in token_ids.entries(len(said))]
        for i, read, one in zip(ids, by_text, said, strict=True):
            # A part of a character may be shown as nothing, or as what it completes.
            if read not in (i, None) and (id_in(one.key) is not None or self._tokens.is_whole(i)):
                raise token_ids.wrong(f"has {i}, where {one.where} says {one.key!r}")
        return ids


@dataclasses.dataclass(frozen=True)
class Completions(_ByText):
    """/v1/completions, of servers that take token ids as a prompt; some repeat it with logprobs."""

    by_messages: ClassVar[bool] = False

    def score(self, requests: Sequence[ScoreRequest]) -> base.Call:
        """See `base.Dialect`."""
        ids = {"return_tokens_as_token_ids": True} if self.asks_for_ids else {}
        return completions.echo(self, requests, **ids)

    def read_scores(self, answer: Any, requests: Sequence[ScoreRequest]) -> list[TeacherAnswer]:
        """See `base.Dialect`.

        A token whose text is no UTF-8 or is shared can be another one than was sent; and rows of
        logprobs that are all one position off look right. Only numbers tell: compare them with
        what the server draws.
        """
        (request,) = requests
        scored = completions.read_echo(
            answer,
            request,
            vocab_size=self.vocab_size,
            is_token=lambda text, i: id_in(text) == i or text == self._tokens.string(i),
            id_of=self._id_of,
            by_id=False,
        )
        return [scored]

    def sample(self, request: SampleRequest) -> base.Call:
        """See `base.Dialect`; the server's own limits on what is drawn, if any, stay."""
        base.check_sample(request, self)
        body = completions.drawing(self.model, request)
        body |= {"prompt": request.ids.tolist(), "logprobs": request.top_k}
        body |= self._more(request)
        tokens = len(request.ids) + request.sampling.max_new_tokens
        return base.call(completions.PATH, body, tokens=tokens, top_k=request.top_k)

    def read_sample(self, answer: Any, request: SampleRequest) -> TeacherAnswer:
        """See `base.Dialect`; most servers do not show the stop id, so nothing is finished."""
        root = opened(answer, request.name)
        completions.check_prompt_tokens(root, request)
        return self._response(root, completions.only_choice(root)["text"], request)


class CompletionsById(Completions):
    """The same, and asks for ids: vLLM gives them, others ignore that, or refuse it."""

    asks_for_ids: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Chat(_ByText):
    """/v1/chat/completions: the server renders the prompt itself, and scores nothing.

    `max_tokens` is what all servers know. OpenAI's models that want `max_completion_tokens` instead
    think in secret, and are no teachers.
    """

    by_messages: ClassVar[bool] = True

    def score(self, requests: Sequence[ScoreRequest]) -> base.Call:
        """See `base.Dialect`; there is no such request."""
        raise NotImplementedError("/v1/chat/completions takes no token ids and scores none")

    def read_scores(self, answer: Any, requests: Sequence[ScoreRequest]) -> list[TeacherAnswer]:
        """See `base.Dialect`; there is no such answer."""
        raise NotImplementedError("/v1/chat/completions takes no token ids and scores none")

    def sample(self, request: SampleRequest) -> base.Call:
        """See `base.Dialect`."""
        base.check_sample(request, self)
        body = completions.drawing(self.model, request)
        body |= {
            "messages": _messages(request),
            "logprobs": True,
            "top_logprobs": request.top_k,
        }
        if request.tools:
            # What is drawn is read as text. A server that leaves the tools out of the prompt then
            # is noticed by the prompt's length.
            body |= {"tools": list(map(_wrapped, json.loads(request.tools))), "tool_choice": "none"}
        if request.template_kwargs:  # a field of vLLM, SGLang and llama-server; others refuse it
            body["chat_template_kwargs"] = request.template_kwargs
        body |= self._more(request)
        tokens = len(request.ids) + request.sampling.max_new_tokens
        return base.call("/v1/chat/completions", body, tokens=tokens, top_k=request.top_k)

    def read_sample(self, answer: Any, request: SampleRequest) -> TeacherAnswer:
        """See `base.Dialect`.

        Some servers list the token drawn first and cut to K. It then stands among the best K though
        it may not be one of them: the mass outside is right all the same.
        """
        root = opened(answer, request.name)
        completions.check_prompt_not_shortened(root, request)
        written = completions.only_choice(root)["message"]["content"]
        return self._response(root, written, request)


class ChatById(Chat):
    """As `CompletionsById`."""

    asks_for_ids: ClassVar[bool] = True


def _after_part(said: TokenLogprobs) -> TokenLogprobs:
    """Where a character is begun: some servers show a part of it as the whole that it completes."""

    def named(key: Key, logprob: float) -> Key:
        own = (key, logprob) == (said.key, said.logprob)  # it is known by what was drawn
        return key if own or id_in(key) is not None or key.isascii() else _NAMELESS

    return dataclasses.replace(said, top=[(named(*entry), entry[1]) for entry in said.top])


_NAMELESS = ""  # no token reads so


def _messages(request: SampleRequest) -> list[dict]:
    """As the route has them: calls have an id and a type, and their arguments are JSON text."""
    messages, waiting, count = [m.for_template() for m in request.messages], [], 0
    for message in messages:
        if message.get("tool_calls"):
            calls = [
                {"id": f"call{count + i:05d}", "type": "function"} | dict(call)  # 9, as Mistral's
                for i, call in enumerate(map(_wrapped, message["tool_calls"]))
            ]
            for call in calls:
                said = {"arguments": {}} | call["function"]
                if not isinstance(said["arguments"], str):
                    said["arguments"] = json.dumps(said["arguments"], ensure_ascii=False)
                call["function"] = said
            count += len(calls)
            message["tool_calls"] = calls
            waiting = [call["id"] for call in calls]
        elif message["role"] == "tool" and "tool_call_id" not in message and waiting:
            message["tool_call_id"] = waiting.pop(0)
    return messages


def _wrapped(function: dict) -> dict:
    """A tool, or the call of one, in the longer of the two forms."""
    return function if "function" in function else {"type": "function", "function": function}


def _content(content: JsonField) -> list[TokenLogprobs]:
    """The form of one list, in which each token has a list of its own."""
    return [
        TokenLogprobs(
            token.path,
            _key(token),
            token["logprob"].number(),
            [(_key(one), one["logprob"].number()) for one in token["top_logprobs"].entries()],
        )
        for token in content.entries()
    ]


def _key(entry: JsonField) -> Key:
    """The most exact name that the server has for a token."""
    i = entry.find("id")
    if i is not None:
        return i.whole()
    text = entry["token"].text()
    raw = entry.find("bytes")
    if raw is None or id_in(text) is not None:
        return text
    found = [byte.whole() for byte in raw.entries()]
    if not all(0 <= byte < 256 for byte in found):
        raise raw.wrong("are no bytes")
    return bytes(found)
