"""OpenAI's routes, wherever they are served: tokens come back as text.

An entry counts only where its text names one id, see `token_map`. Some servers give ids, too, if
they are asked: text does not tell the tokens that are parts of characters.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any, ClassVar

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer, lost_sample
from gkdjax.teachers.server.dialects import completions
from gkdjax.teachers.server.dialects.base import Call, Dialect, check_read, is_lost
from gkdjax.teachers.server.dialects.logprobs import Key, TokenLogprobs, id_in
from gkdjax.teachers.server.dialects.token_map import TokenMap
from gkdjax.teachers.server.json_fields import JsonField

_UNCOUNTED = 4  # tokens of a prompt, at most


class _ByText(Dialect):
    """The two routes' way to name tokens."""

    by_id: ClassVar[bool] = False
    asks_for_ids: ClassVar[bool] = False  # with fields that OpenAI's own servers refuse

    @functools.cached_property
    def _tokens(self) -> TokenMap:
        return TokenMap(self.tokenizer)

    def id_of(self, key: Key) -> int | None:
        stated = id_in(key)
        return self._tokens.id_of(key) if stated is None else stated

    def names(self, key: str, i: int) -> bool:
        return id_in(key) == i or key == self._tokens.string(i)

    def _sample(self, request: SampleRequest, path: str, prompt: dict[str, Any]) -> Call:
        body = completions.sampling_fields(self.model, request) | prompt
        if self.asks_for_ids:  # with fields of vLLM and llama.cpp, and all that changes samples
            body |= {
                "top_k": request.sampling.top_k or 0,  # 0: all
                "min_p": 0.0,
                "repetition_penalty": 1.0,  # vLLM's name
                "repeat_penalty": 1.0,  # llama.cpp's
                "stop_token_ids": list(request.stop_ids),
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            }
        tokens = len(request.ids) + request.sampling.max_new_tokens
        return Call(path, body, tokens, request.top_k)

    def _read_sample(
        self, root: JsonField, text: JsonField, request: SampleRequest
    ) -> TeacherAnswer:
        """The only choice as an answer; `text` is "" or null if it has none."""
        choice = completions.only_choice(root)
        logprobs, reason = choice.find("logprobs"), choice["finish_reason"]
        if is_lost(reason) or (logprobs is None and text.value in ("", None)):
            return lost_sample(request.top_k)
        if logprobs is None:
            raise choice.wrong("has no logprobs: the server ignores that they were asked for")
        content = logprobs.find("content")
        tokens = completions.token_lists(logprobs)[1] if content is None else _content(content)
        ids = self._sampled_ids(tokens, choice.find("token_ids"))
        if any(id_in(key) is None for token in tokens for key, _ in token.top):
            begun = self._tokens.parts_before(ids)
            pairs = zip(tokens, begun, strict=True)
            tokens = [_after_part(token) if b else token for token, b in pairs]
        return self.sampled(tokens, ids, request, reason, root.find("usage", "completion_tokens"))

    def _sampled_ids(
        self, tokens: Sequence[TokenLogprobs], token_ids: JsonField | None
    ) -> list[int | None]:
        """The ids of the tokens; None: the text does not tell."""
        by_text = [self.id_of(token.key) for token in tokens]
        if token_ids is None:
            return by_text
        ids = [i.whole() for i in token_ids.entries(len(tokens))]
        for i, read, token in zip(ids, by_text, tokens, strict=True):
            # A part of a character may be shown as nothing, or as what it completes.
            if read not in (i, None) and (id_in(token.key) is not None or self._tokens.is_whole(i)):
                raise token_ids.wrong(f"has {i}, where {token.where} says {token.key!r}")
        return ids


class Completions(_ByText):
    """/v1/completions, of servers that take token ids as a prompt; some repeat it with logprobs."""

    def score(self, request: ScoreRequest) -> Call:
        ids = {"return_tokens_as_token_ids": True} if self.asks_for_ids else {}
        return completions.echo(self, request, **ids)

    def read_scores(self, root: JsonField, request: ScoreRequest) -> list[TeacherAnswer]:
        """An echo; only numbers show a fault in it: compare them with what the server samples.

        A token whose text is no UTF-8 or is shared can be another one than was sent; and logprobs
        that are all one position off look right.
        """
        return completions.read_echo(self, root, request)

    def sample(self, request: SampleRequest) -> Call:
        prompt = {"prompt": request.ids.tolist(), "logprobs": request.top_k}
        return self._sample(request, completions.PATH, prompt)

    def read_sample(self, root: JsonField, request: SampleRequest) -> TeacherAnswer:
        check_read(root.find("usage", "prompt_tokens"), len(request.ids))
        return self._read_sample(root, completions.only_choice(root)["text"], request)


class CompletionsById(Completions):
    """The same, and asks for ids: vLLM gives them, others ignore that, or refuse it."""

    asks_for_ids: ClassVar[bool] = True


class Chat(_ByText):
    """/v1/chat/completions: the server renders the prompt itself, and scores nothing.

    `max_tokens` is what all servers know. OpenAI's models that want `max_completion_tokens` instead
    think in secret, and are no teachers.
    """

    by_messages: ClassVar[bool] = True

    def score(self, *requests: ScoreRequest) -> Call:
        raise NotImplementedError("/v1/chat/completions takes no token ids and scores none")

    def read_scores(self, root: JsonField, *requests: ScoreRequest) -> list[TeacherAnswer]:
        return self.score()

    def sample(self, request: SampleRequest) -> Call:
        prompt = {"messages": _messages(request), "logprobs": True, "top_logprobs": request.top_k}
        if request.tools:
            # What is sampled is read as text. A server that leaves the tools out of the prompt then
            # is noticed by the prompt's length.
            tools = list(map(_wrapped, json.loads(request.tools)))
            prompt |= {"tools": tools, "tool_choice": "none"}
        if request.template_kwargs:  # a field of vLLM, SGLang and llama-server; others refuse it
            prompt["chat_template_kwargs"] = request.template_kwargs
        return self._sample(request, "/v1/chat/completions", prompt)

    def read_sample(self, root: JsonField, request: SampleRequest) -> TeacherAnswer:
        """Some servers list the sampled token first and cut to K: it need not be of the best K.

        The mass outside is right all the same.
        """
        read = root.find("usage", "prompt_tokens")
        # A few tokens are nothing: not all servers count those that stand before the first message.
        if read is not None and read.whole() < len(request.ids) - _UNCOUNTED:
            raise read.wrong(
                f"is {read.value}, and the prompt has {len(request.ids)} tokens here: the server"
                " drops or shortens messages, or its chat template is another one"
            )
        return self._read_sample(root, completions.only_choice(root)["message"]["content"], request)


class ChatById(Chat):
    """The same, and asks for ids, as `CompletionsById`."""

    asks_for_ids: ClassVar[bool] = True


def _after_part(token: TokenLogprobs) -> TokenLogprobs:
    """The token without text that is not ASCII; its own entry stays.

    Where a character is begun, some servers show a part of it as the whole that it completes.
    """

    def named(key: Key, logprob: float) -> Key:
        own = (key, logprob) == (token.key, token.logprob)
        return key if own or id_in(key) is not None or key.isascii() else ""  # names no token

    return dataclasses.replace(token, top=[(named(*entry), entry[1]) for entry in token.top])


def _messages(request: SampleRequest) -> list[dict]:
    """As the route has them: calls have an id and a type, and their arguments are JSON text."""
    messages, waiting, ids = [m.for_template() for m in request.messages], [], itertools.count()
    for message in messages:
        if message.get("tool_calls"):
            calls = message["tool_calls"] = list(map(_wrapped, message["tool_calls"]))
            for i, call in enumerate(calls):
                function = {"arguments": {}} | call["function"]
                if not isinstance(function["arguments"], str):
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
                new = {"id": f"call{next(ids):05d}", "type": "function"}  # 9 characters: Mistral's
                calls[i] = new | call | {"function": function}
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
    text, raw = entry["token"].text(), entry.find("bytes")
    if raw is None or id_in(text) is not None:
        return text
    found = [byte.whole() for byte in raw.entries()]
    if not all(0 <= byte < 256 for byte in found):
        raise raw.wrong("are no bytes")
    return bytes(found)
