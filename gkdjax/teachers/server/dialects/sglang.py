"""SGLang's /generate: token ids in, rows of [logprob, id, text] out."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from gkdjax.teachers.server.answers import (
    SampleRequest,
    ScoreRequest,
    TeacherAnswer,
    collect,
    lost_sample,
)
from gkdjax.teachers.server.dialects import base
from gkdjax.teachers.server.dialects.json_fields import JsonField, opened
from gkdjax.teachers.server.dialects.logprobs import (
    TokenLogprobs,
    check_counts,
    check_not_cut,
    check_read,
    check_written,
    id_in,
    is_lost,
    position,
    response,
)
from gkdjax.utils.errors import UserError

PATH = "/generate"


@dataclasses.dataclass(frozen=True)
class Generate:
    """Scores and samples by the server's native route; it serves one model, whatever its name."""

    model: str
    vocab_size: int
    tokenizer: Any = None  # all dialects are made alike; this one's answers are in ids
    rows_per_request: ClassVar[bool] = False
    by_messages: ClassVar[bool] = False

    def score(self, requests: Sequence[ScoreRequest]) -> base.Call:
        """See `base.Dialect`; only what follows the first predicting position is asked for."""
        base.check_scores(requests, self)
        (request,) = requests
        body = {
            "input_ids": request.ids.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": int(request.at[0]),
            "top_logprobs_num": request.top_k,
        }
        tokens = len(request.ids) - int(request.at[0])
        return base.call(PATH, body, tokens=tokens, top_k=request.top_k)

    def read_scores(self, answer: Any, requests: Sequence[ScoreRequest]) -> list[TeacherAnswer]:
        """See `base.Dialect`."""
        (request,) = requests
        meta = opened(answer, request.name)["meta_info"]
        check_read(meta.find("prompt_tokens"), len(request.ids))
        start = int(request.at[0])
        ids = request.ids[start:].tolist()
        own = meta["input_token_logprobs"].entries(len(ids))
        top = meta["input_top_logprobs"].entries(len(ids))
        for row, i in zip(own, ids, strict=True):
            if _id(row) != i:
                raise row.wrong(f"is of id {_id(row)}, where {i} was sent")
        for first in (own[0].entries()[0], top[0]):  # nothing before it was asked for
            first.check_null()
        after = request.at - start + 1
        said = [_said(own[t], top[t]) for t in after]
        check_counts(said, request.top_k, self.vocab_size, by_id=True)
        scored = collect(
            [position(one, one.key, id_in) for one in said],
            top_k=request.top_k,
            vocab_size=self.vocab_size,
            name=request.name,
        )
        return [scored]

    def sample(self, request: SampleRequest) -> base.Call:
        """See `base.Dialect`.

        Raises:
          UserError: a temperature that the logprobs of drawn tokens would be taken at.
        """
        base.check_sample(request, self)
        sampling = request.sampling
        if sampling.temperature not in (0, 1):  # greedy ones are those of temperature 1
            raise UserError(
                f"SGLang gives the logprobs of what it draws at temperature {sampling.temperature},"
                " and a teacher's are those of temperature 1; sample at 1 or 0"
            )
        body = {
            "input_ids": request.ids.tolist(),
            "sampling_params": {
                "max_new_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": -1 if sampling.top_k is None else sampling.top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "sampling_seed": request.seed,
                "stop_token_ids": list(request.stop_ids),
                "skip_special_tokens": False,
                "no_stop_trim": True,
            },
            "return_logprob": True,
            "top_logprobs_num": request.top_k,
        }
        return base.call(PATH, body, tokens=sampling.max_new_tokens, top_k=request.top_k)

    def read_sample(self, answer: Any, request: SampleRequest) -> TeacherAnswer:
        """See `base.Dialect`; a stop id is shown, and is the response's last."""
        root = opened(answer, request.name)
        meta = root["meta_info"]
        check_read(meta.find("prompt_tokens"), len(request.ids))
        if is_lost(meta["finish_reason"]["type"]):
            return lost_sample(request.top_k, 0)
        own = meta["output_token_logprobs"].entries()
        top = meta["output_top_logprobs"].entries(len(own))
        said = [_said(*rows) for rows in zip(own, top, strict=True)]
        ids = [one.key for one in said]
        if [i.whole() for i in root["output_ids"].entries()] != ids:
            raise root["output_ids"].wrong("are other tokens than meta_info.output_token_logprobs")
        check_counts(said, request.top_k, self.vocab_size, by_id=True)
        check_written(meta.find("completion_tokens"), len(ids))
        check_not_cut(meta["finish_reason"]["type"], len(ids), request)
        return response(said, ids, request, vocab_size=self.vocab_size, id_of=id_in)


def _said(own: JsonField, top: JsonField) -> TokenLogprobs:
    best = [(_id(row), _logprob(row)) for row in top.entries()]
    return TokenLogprobs(top.path, _id(own), _logprob(own), best)


def _logprob(row: JsonField) -> float:
    return row.entries(3)[0].number()


def _id(row: JsonField) -> int:
    return row.entries(3)[1].whole()
