"""vLLM's own fields of /v1/completions: token ids in, and token ids out."""

import re
from typing import ClassVar

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer, lost_sample
from gkdjax.teachers.server.dialects import completions
from gkdjax.teachers.server.dialects.base import Call, Dialect, check_read, is_lost
from gkdjax.teachers.server.dialects.logprobs import TokenLogprobs, id_in
from gkdjax.teachers.server.json_fields import JsonField

_ID = re.compile("0|[1-9][0-9]{0,8}")


class _Vllm(Dialect):
    """Samples."""

    def sample(self, request: SampleRequest) -> Call:
        body = {"top_k": -1} | completions.sampling_fields(self.model, request)
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
        return Call(completions.PATH, body, tokens, request.top_k)

    def read_sample(self, root: JsonField, request: SampleRequest) -> TeacherAnswer:
        check_read(root.find("usage", "prompt_tokens"), len(request.ids))
        choice = completions.only_choice(root)
        if is_lost(choice["finish_reason"]):
            return lost_sample(request.top_k)
        _check_sent(choice, request)
        ids = [i.whole() for i in choice["token_ids"].entries()]
        keys, tokens = completions.token_lists(choice["logprobs"])
        if [id_in(key) for key in keys] != ids:
            raise choice.wrong("has other tokens in token_ids than in logprobs.tokens")
        stated = root.find("usage", "completion_tokens")
        return self.sampled(tokens, ids, request, choice["finish_reason"], stated)


class PromptLogprobs(_Vllm):
    """Scores by `prompt_logprobs`, whose keys are ids; the way to prefer."""

    rows_per_request: ClassVar[bool] = True

    def score(self, *requests: ScoreRequest) -> Call:
        (top_k,) = {request.top_k for request in requests}
        body = {
            "model": self.model,
            "prompt": [request.ids.tolist() for request in requests],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": top_k,
        }
        return Call(completions.PATH, body, sum(len(request.ids) for request in requests), top_k)

    def read_scores(self, root: JsonField, *requests: ScoreRequest) -> list[TeacherAnswer]:
        sent = sum(len(request.ids) for request in requests)
        check_read(root.find("usage", "prompt_tokens"), sent)
        choices = root["choices"].entries(len(requests))
        by_index = {choice["index"].whole(): choice.value for choice in choices}
        if sorted(by_index) != list(range(len(requests))):
            raise root["choices"].wrong(f"have the indices {sorted(by_index)}, one a row is right")
        return [
            self._read_row(JsonField(by_index[i], f"{one.name}: answer.choices[{i}]"), one)
            for i, one in enumerate(requests)
        ]

    def _read_row(self, choice: JsonField, request: ScoreRequest) -> TeacherAnswer:
        ids = request.ids.tolist()
        _check_sent(choice, request)
        first, *rows = choice["prompt_logprobs"].entries(len(ids))
        first.check_null()
        for row, i in zip(rows, ids[1:], strict=True):
            row[str(i)]  # what was sent has to be there, whether it is a target or not
        return self.scored([_by_id(rows[at], ids[at + 1]) for at in request.at], request)


class EchoLogprobs(_Vllm):
    """Scores by `echo`, for servers that refuse `prompt_logprobs`."""

    def score(self, request: ScoreRequest) -> Call:
        return completions.echo(self, request, return_tokens_as_token_ids=True)

    def read_scores(self, root: JsonField, request: ScoreRequest) -> list[TeacherAnswer]:
        return completions.read_echo(self, root, request)


def _by_id(row: JsonField, target_id: int) -> TokenLogprobs:
    """A row {"608": {"logprob": -8.03}, ...}."""
    top = {}
    for key, entry in row.items():
        if not _ID.fullmatch(key):
            raise row.wrong(f"has the key {key!r}, which is no token id")
        top[int(key)] = entry["logprob"].number()
    return TokenLogprobs(row.path, target_id, top[target_id], [*top.items()])


def _check_sent(choice: JsonField, request: ScoreRequest | SampleRequest) -> None:
    sent = choice.find("prompt_token_ids")
    if sent is not None and sent.value != request.ids.tolist():
        raise sent.wrong("are not the ids that were sent")
