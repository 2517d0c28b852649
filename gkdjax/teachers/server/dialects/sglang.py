"""SGLang's /generate: token ids in, rows of [logprob, id, text] out."""

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer, lost_sample
from gkdjax.teachers.server.dialects.base import Call, Dialect, check_read, is_lost
from gkdjax.teachers.server.dialects.logprobs import TokenLogprobs
from gkdjax.teachers.server.json_fields import JsonField
from gkdjax.utils.errors import UserError

PATH = "/generate"


class Generate(Dialect):
    """Scores and samples by the server's native route; it serves one model, whatever its name."""

    def score(self, request: ScoreRequest) -> Call:
        start = int(request.at[0])
        sampling = {"max_new_tokens": 0, "temperature": 0}
        more = {"logprob_start_len": start}
        return _call(request, sampling, len(request.ids) - start, **more)

    def read_scores(self, root: JsonField, request: ScoreRequest) -> list[TeacherAnswer]:
        meta = root["meta_info"]
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
        tokens = [_token(own[t], top[t]) for t in request.at - start + 1]
        return [self.scored(tokens, request)]

    def sample(self, request: SampleRequest) -> Call:
        sampling = request.sampling
        if sampling.temperature not in (0, 1):  # greedy ones are those of temperature 1
            raise UserError(
                f"SGLang gives the logprobs of what it draws at temperature {sampling.temperature},"
                " and a teacher's are those of temperature 1; sample at 1 or 0"
            )
        fields = {
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
        }
        return _call(request, fields, sampling.max_new_tokens)

    def read_sample(self, root: JsonField, request: SampleRequest) -> TeacherAnswer:
        meta = root["meta_info"]
        check_read(meta.find("prompt_tokens"), len(request.ids))
        if is_lost(meta["finish_reason"]["type"]):
            return lost_sample(request.top_k)
        own = meta["output_token_logprobs"].entries()
        top = meta["output_top_logprobs"].entries(len(own))
        tokens = [_token(*rows) for rows in zip(own, top, strict=True)]
        ids = [token.key for token in tokens]
        if [i.whole() for i in root["output_ids"].entries()] != ids:
            raise root["output_ids"].wrong("are other tokens than meta_info.output_token_logprobs")
        reason, stated = meta["finish_reason"]["type"], meta.find("completion_tokens")
        return self.sampled(tokens, ids, request, reason, stated)


def _call(request: ScoreRequest | SampleRequest, sampling: dict, tokens: int, **more) -> Call:
    body = {
        "input_ids": request.ids.tolist(),
        "sampling_params": sampling,
        "return_logprob": True,
        "top_logprobs_num": request.top_k,
    }
    return Call(PATH, body | more, tokens, request.top_k)


def _token(own: JsonField, top: JsonField) -> TokenLogprobs:
    best = [(_id(row), _logprob(row)) for row in top.entries()]
    return TokenLogprobs(top.path, _id(own), _logprob(own), best)


def _logprob(row: JsonField) -> float:
    return row.entries(3)[0].number()


def _id(row: JsonField) -> int:
    return row.entries(3)[1].whole()
