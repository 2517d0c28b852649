"""vLLM's own fields of /v1/completions: token ids in, and token ids out."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from gkdjax.teachers.server.answers import (
    SampleRequest,
    ScoreRequest,
    TeacherAnswer,
    collect,
    lost_sample,
)
from gkdjax.teachers.server.dialects import base, completions
from gkdjax.teachers.server.dialects.json_fields import JsonField, opened
from gkdjax.teachers.server.dialects.logprobs import (
    TokenLogprobs,
    check_counts,
    check_not_cut,
    id_in,
    is_lost,
    position,
    response,
)


@dataclasses.dataclass(frozen=True)
class _Vllm:
    """What the two ways to score share: names, and how to sample."""

    model: str
    vocab_size: int
    tokenizer: Any = None  # all dialects are made alike; this one's answers are in ids
    by_messages: ClassVar[bool] = False

    def sample(self, request: SampleRequest) -> base.Call:
        """See `base.Dialect`."""
        base.check_sample(request, self)
        body = {"top_k": -1} | completions.drawing(self.model, request)
        body |= {
            "prompt": request.ids.tolist(),
            "logprobs": request.top_k,
            "stop_token_ids": list(request.stop_ids),
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        tokens = len(request.ids) + request.sampling.max_new_tokens
        return base.call(completions.PATH, body, tokens=tokens, top_k=request.top_k)

    def read_sample(self, answer: Any, request: SampleRequest) -> TeacherAnswer:
        """See `base.Dialect`; a stop id is shown, and is the response's last."""
        root = opened(answer, request.name)
        completions.check_prompt_tokens(root, request)
        choice = completions.only_choice(root)
        if is_lost(choice["finish_reason"]):
            return lost_sample(request.top_k, 0)
        _check_sent(choice.find("prompt_token_ids"), request.ids.tolist())
        ids = [i.whole() for i in choice["token_ids"].entries()]
        tokens, said = completions.classic(choice["logprobs"], first=0)
        if [id_in(token) for token in tokens] != ids:
            raise choice.wrong("has other tokens in token_ids than in logprobs.tokens")
        check_counts(said, request.top_k, self.vocab_size, by_id=True)
        completions.check_completion_tokens(root, len(ids))
        check_not_cut(choice["finish_reason"], len(ids), request)
        return response(said, ids, request, vocab_size=self.vocab_size, id_of=id_in)


@dataclasses.dataclass(frozen=True)
class PromptLogprobs(_Vllm):
    """Scores by `prompt_logprobs`, which is keyed by id; the way to prefer."""

    rows_per_request: ClassVar[bool] = True

    def score(self, requests: Sequence[ScoreRequest]) -> base.Call:
        """See `base.Dialect`; all rows are asked for the same K."""
        base.check_scores(requests, self)
        (top_k,) = {request.top_k for request in requests}
        body = {
            "model": self.model,
            "prompt": [request.ids.tolist() for request in requests],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": top_k,
        }
        tokens = sum(len(request.ids) for request in requests)
        return base.call(completions.PATH, body, tokens=tokens, top_k=top_k)

    def read_scores(self, answer: Any, requests: Sequence[ScoreRequest]) -> list[TeacherAnswer]:
        """See `base.Dialect`."""
        root = opened(answer, requests[0].name)
        completions.check_prompt_tokens(root, *requests)
        choices = root["choices"].entries(len(requests))
        by_index = {choice["index"].whole(): choice for choice in choices}
        if sorted(by_index) != list(range(len(requests))):
            raise root["choices"].wrong(f"have the indices {sorted(by_index)}, one a row is right")
        return [
            self._row(JsonField(by_index[i].value, f"{request.name}: answer.choices[{i}]"), request)
            for i, request in enumerate(requests)
        ]

    def _row(self, choice: JsonField, request: ScoreRequest) -> TeacherAnswer:
        ids = request.ids.tolist()
        _check_sent(choice.find("prompt_token_ids"), ids)
        first, *rows = choice["prompt_logprobs"].entries(len(ids))
        first.check_null()
        for row, i in zip(rows, ids[1:], strict=True):
            row[str(i)]  # what was sent has to be there, whether it is a target or not
        said = [_by_id(rows[at], ids[at + 1]) for at in request.at]
        check_counts(said, request.top_k, self.vocab_size, by_id=True)
        return collect(
            [position(one, one.key, id_in) for one in said],
            top_k=request.top_k,
            vocab_size=self.vocab_size,
            name=request.name,
        )


@dataclasses.dataclass(frozen=True)
class EchoLogprobs(_Vllm):
    """Scores by `echo`, for servers that refuse `prompt_logprobs`."""

    rows_per_request: ClassVar[bool] = False

    def score(self, requests: Sequence[ScoreRequest]) -> base.Call:
        """See `base.Dialect`."""
        return completions.echo(self, requests, return_tokens_as_token_ids=True)

    def read_scores(self, answer: Any, requests: Sequence[ScoreRequest]) -> list[TeacherAnswer]:
        """See `base.Dialect`."""
        (request,) = requests
        scored = completions.read_echo(
            answer,
            request,
            vocab_size=self.vocab_size,
            is_token=lambda token, i: id_in(token) == i,
            id_of=id_in,
            by_id=True,
        )
        return [scored]


def _by_id(row: JsonField, target_id: int) -> TokenLogprobs:
    """A row {"608": {"logprob": -8.03}, ...}."""
    top = [(_id_of_key(row, key), entry["logprob"].number()) for key, entry in row.items()]
    return TokenLogprobs(row.path, target_id, dict(top)[target_id], top)


def _id_of_key(row: JsonField, key: str) -> int:
    if not _ID.fullmatch(key):
        raise row.wrong(f"has the key {key!r}, which is no token id")
    return int(key)


_ID = re.compile("0|[1-9][0-9]{0,8}")


def _check_sent(prompt_token_ids: JsonField | None, ids: list[int]) -> None:
    if prompt_token_ids is not None and prompt_token_ids.value != ids:
        raise prompt_token_ids.wrong("are not the ids that were sent")
