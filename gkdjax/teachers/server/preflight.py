"""A server is trusted only after it has been tried: what it can do, and whether its numbers fit.

Short texts are written, greedily and drawn at temperature 1, and then scored again. A server that
inserts a token, shifts its answer by one position, ignores `echo` or `logprobs`, has another
tokenizer, or draws otherwise than it reports does not get past it.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from gkdjax.data.chat_template import Chat
from gkdjax.teachers.server import agreement, draws, served
from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.dialects.base import Dialect, exchange
from gkdjax.teachers.server.store.fingerprint import MOST_DRIFT, drift
from gkdjax.teachers.server.transport.client import RepeatedServerError, Transport
from gkdjax.types import Message, SamplingParams
from gkdjax.utils.errors import TeacherRefused, UserError, WrongAnswer

PROBE = (
    "The quick brown fox reads 1,234 books in the café on 5th Street; naïve readers ask: why?\n"
    "Der Fuchs liest weiter. Лиса читает дальше. 狐狸继续读书。\n\n\tdef f(x):\n        return x**2"
)
_PROBE_TOKENS = 64  # at most, of the text above
_WRITTEN_TOKENS = 8
_SHIFTED = "the logprobs are those of another position, or it does not draw by them"
_PENALTY = (
    "that one stands in the text before, so the server draws with a repetition penalty, which its"
    " logprobs do not have (llama-cpp-python's repeat_penalty is 1.1 unless it is told; vLLM takes"
    " repetition_penalty from the model's generation_config.json); switch it off where it is served"
)
_REFUSALS = 3  # the same 5xx answer to one dialect, in a row
_DRAWS = 3  # at most, until one is a text
_TEXTS = 6  # that are drawn at temperature 1, each after another part of the probe,
_DRAWN_TOKENS = 16  # of so many tokens,
_ROUNDS = 4  # and at most so often, until they tell an honest server from others
NAME = "the preflight"

_BEHIND = 1e-2  # nats, of a greedy answer's token behind the best one there


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a server turned out to be.

    Attributes:
      model: its name there.
      dialect: the name of the dialect that it speaks, see `connect.DIALECTS`.
      scores: it scores given ids.
      limits: why not.
      context_length: most tokens of a view, or None where it does not tell.
      top_k: as many logprobs of a token were asked for and came.
      tokenizer: how the vocabulary was compared.
      difference: median in nats between a token drawn and the same token scored; None: not scored.
      context_source: what says how long a view may be, for people; "" where nothing does.
      context_written: most tokens of a prompt and its answer; None: as `context_length`.
    """

    model: str
    dialect: str
    scores: bool
    limits: str
    context_length: int | None
    top_k: int
    tokenizer: str
    difference: float | None
    context_source: str = ""  # of what older stores keep
    context_written: int | None = None


@dataclasses.dataclass(frozen=True)
class Server:
    """One that passed."""

    dialect: Dialect
    findings: Findings
    probe: TeacherAnswer  # by which its weights are known


def examine(
    transport: Transport,
    api_model: str,
    dialects: dict[str, type[Dialect]],
    chat: Chat,
    vocab_size: int,
    top_k: int,
    sampling: SamplingParams,
    *,
    must_score: bool,
) -> Server:
    """Tries a server.

    Args:
      transport: to the server.
      api_model: its name for the model, or "" for the only one.
      dialects: name -> dialect; those are tried in this order.
      chat: the tokenizer that the teacher is said to have.
      vocab_size: the server may name ids below it, see `train.models.ids_of_server`.
      top_k: K of every request.
      sampling: as the run is going to draw.
      must_score: a server that does not score given ids is refused.

    Raises:
      UserError: it cannot be used, or not for this; with the reasons.
      TeacherUnreachable: it does not answer.
    """
    model, listed = served.model_of(transport, api_model)
    compared, told = served.compare_tokenizers(transport, model, chat, PROBE)
    window = listed or told or served.proxied(transport, model)
    read, written, source = window or (None, None, "")
    ids = probe_ids(chat)
    trials: dict[str, _Trial] = {}

    def attempt(name: str, asked: "Transport | _Impatient") -> bool:
        """Whether it scores, so that no other has to be tried."""
        dialect = dialects[name](model, vocab_size, chat.tokenizer)
        found = Findings(
            *(model, name, False, "", read, top_k, compared, None),
            context_source=source,
            context_written=written,
        )
        trials[name] = _try(asked, dialect, found, chat, ids, sampling)
        return trials[name].scores

    any(attempt(name, _Impatient(transport, _REFUSALS)) for name in dialects)
    broken = [name for name in trials if trials[name].broken]
    # Whatever is asked, it fails: the server is away, and is waited for. Else it may have come back
    # just after the better ways to ask it were given up.
    away = all(trial.broken and trial.server is None for trial in trials.values())
    any(attempt(name, transport if away else _Impatient(transport, 1)) for name in broken)
    usable = [trials[name].server for name in dialects if name in trials and trials[name].server]
    reasons = "; ".join(trial.reason for trial in trials.values() if trial.reason)
    for server in usable:
        if server.findings.scores:
            return server
    if must_score or not usable:
        raise UserError(f"{transport.root} cannot be used: {reasons}")
    logging.warning("%s: only its own text can be learnt: %s", transport.root, reasons)
    return usable[0]


class _Trial(NamedTuple):
    """How one dialect did."""

    server: Server | None  # None: it does not even write
    reason: str  # why it does not write or score; "" if it does both
    broken: bool  # and that was the same 5xx answer again and again

    @property
    def scores(self) -> bool:
        return self.server is not None and self.server.findings.scores


class _Impatient:
    """A transport to which the same 5xx answer, so many times in a row, is a refusal."""

    def __init__(self, transport: Transport, most_same: int):
        self._transport, self._most_same, self.root = transport, most_same, transport.root

    def post(self, path: str, body: dict, *, max_bytes: int, most_same: int) -> dict | list:
        """See `Transport.post`."""
        del most_same
        return self._transport.post(path, body, max_bytes=max_bytes, most_same=self._most_same)


def _try(
    transport: Transport | _Impatient,
    dialect: Dialect,
    found: Findings,
    chat: Chat,
    ids: np.ndarray,
    sampling: SamplingParams,
) -> _Trial:
    name, top_k = found.dialect, found.top_k
    try:
        written = _write(transport, dialect, chat, ids, top_k)
        _check_drawn(transport, dialect, chat, ids, written, sampling)
        drawn = _draw(transport, dialect, chat, ids, top_k, judged=sampling.temperature > 0)
    except (WrongAnswer, TeacherRefused, RepeatedServerError) as error:
        reason = f"{name} writes nothing that can be used: {error}"
        return _Trial(None, reason, isinstance(error, RepeatedServerError))
    try:
        # The others were drawn to judge the draws; so many tell whether scores agree.
        texts = [Text(sample_request(chat, ids, top_k, _WRITTEN_TOKENS), written), *drawn[:_TEXTS]]
        scored, difference = _score_again(transport, dialect, texts)
    except (WrongAnswer, TeacherRefused, RepeatedServerError, NotImplementedError) as error:
        found = dataclasses.replace(found, limits=str(error))
        reason = f"{name} does not score given ids: {error}"
        server = Server(dialect, found, written.rows(slice(None)))
        return _Trial(server, reason, isinstance(error, RepeatedServerError))
    found = dataclasses.replace(found, scores=True, difference=difference)
    return _Trial(Server(dialect, found, scored.rows(slice(len(ids) - 1))), "", False)


def probe_again(transport: Transport, server: Server, chat: Chat) -> TeacherAnswer:
    """What the server says now where it said `server.probe`."""
    ids, top_k = probe_ids(chat), server.findings.top_k
    if not server.findings.scores:
        return _write(transport, server.dialect, chat, ids, top_k)
    (scored,) = exchange(transport, server.dialect, [score_request(ids, top_k)])
    return scored


def probe_ids(chat: Chat) -> np.ndarray:
    """What every server is probed with: int32 [n]."""
    return np.asarray(chat.tokenizer(PROBE)["input_ids"][:_PROBE_TOKENS], np.int32)


def sample_request(chat: Chat, ids: np.ndarray, top_k: int, tokens: int) -> SampleRequest:
    """A greedy answer to the probe."""
    sampling = SamplingParams(tokens, temperature=0.0, top_p=1.0)
    messages = (Message("user", PROBE),)
    return SampleRequest(NAME, ids, messages, sampling, 0, chat.stop_ids, top_k)


def score_request(ids: np.ndarray, top_k: int) -> ScoreRequest:
    """Every token of `ids` that any other stands before."""
    return ScoreRequest(NAME, ids, np.arange(len(ids) - 1, dtype=np.int32), top_k)


def _write(
    transport: Transport, dialect: Dialect, chat: Chat, ids: np.ndarray, top_k: int
) -> TeacherAnswer:
    """A greedy answer; every token of it must be the most probable one where it stands."""
    request = sample_request(chat, ids, top_k, _WRITTEN_TOKENS)
    (answer,) = exchange(transport, dialect, [request])
    if answer.lost:
        raise WrongAnswer(
            f"{NAME}: {answer.unreadable}: if the tokenizer is not that of"
            f" {chat.directory}, name the teacher's own in config.teacher.tokenizer; else it names"
            " tokens by their text, and text does not tell which part of a character a token is:"
            " use teacher.backend='vllm' or 'sglang', which name tokens by id"
            if answer.unreadable
            else f"{NAME}: it wrote nothing"
        )
    _check_count(answer, top_k)
    behind = answer.top_logprobs[:, 0] - answer.target_logprob
    if behind.max() > _BEHIND:
        worst = int(behind.argmax())
        before = {*ids.tolist(), *answer.target_ids[:worst].tolist()}
        penalised = answer.top_ids[worst, 0] in before and answer.target_ids[worst] not in before
        raise WrongAnswer(
            f"{NAME}: token {worst} of a greedy answer is {behind[worst]:.3f} nats less probable"
            f" than the best there: {_PENALTY if penalised else _SHIFTED}"
        )
    return answer


def _check_drawn(
    transport: Transport,
    dialect: Dialect,
    chat: Chat,
    ids: np.ndarray,
    greedy: TeacherAnswer,
    sampling: SamplingParams,
) -> None:
    """Raises WrongAnswer if the logprobs of what is drawn are those after temperature and top p."""
    request = sample_request(chat, ids, greedy.top_ids.shape[1], _WRITTEN_TOKENS)
    sampling = dataclasses.replace(sampling, max_new_tokens=_WRITTEN_TOKENS)
    for seed in range(_DRAWS):
        request = dataclasses.replace(request, sampling=sampling, seed=seed)
        (drawn,) = exchange(transport, dialect, [request])
        if drawn.lost:  # or it ended at once, without a word
            continue
        # The first token of both follows the same text.
        apart = drift(drawn.rows(slice(1)), greedy.rows(slice(1)))
        if apart > MOST_DRIFT:
            raise WrongAnswer(
                f"{NAME}: with rollout.temperature={sampling.temperature}, .top_p="
                f"{sampling.top_p} and .top_k={sampling.top_k} the same token has logprobs"
                f" {apart:.3f} nats apart from those at temperature 0: they are taken after"
                " sampling's changes. Have the server give raw ones (vLLM: --logprobs-mode"
                " raw_logprobs), or draw at temperature 1 with top_p=1 and top_k=None"
            )
        return
    logging.warning(
        "%s: none of %d answers, drawn as the run is going to draw, has a token; whether their"
        " logprobs are raw is not known",
        *(transport.root, _DRAWS),
    )


def _check_count(answer: TeacherAnswer, top_k: int) -> None:
    counts = (answer.top_logprobs > -np.inf).sum(axis=-1)
    if answer.unmapped == 0 and counts.max() < top_k:
        raise WrongAnswer(
            f"{NAME}: {top_k} logprobs a token were asked for, and {counts.max()} came; set"
            f" config.teacher.top_k={counts.max()}"
        )


class Text(NamedTuple):
    """What a server wrote, and after what."""

    request: SampleRequest
    answer: TeacherAnswer

    @property
    def whole(self) -> np.ndarray:
        """int32 [T], the prompt and the answer."""
        return np.concatenate([self.request.ids, self.answer.target_ids])


def _draw(
    transport: Transport,
    dialect: Dialect,
    chat: Chat,
    ids: np.ndarray,
    top_k: int,
    *,
    judged: bool,
) -> list[Text]:
    """Texts drawn at temperature 1.

    Raises:
      WrongAnswer: if `judged`: they are not from the distributions that came with them.
    """
    texts: list[Text] = []
    for number in range(_ROUNDS):
        for k in range(_TEXTS):
            part = ids[: len(ids) - k * (len(ids) // (2 * _TEXTS))]
            request = dataclasses.replace(
                sample_request(chat, part, top_k, _DRAWN_TOKENS),
                sampling=SamplingParams(_DRAWN_TOKENS, temperature=1.0, top_p=1.0),
                seed=number * _TEXTS + k,
            )
            (answer,) = exchange(transport, dialect, [request])
            if not answer.lost:
                texts.append(Text(request, answer))
        tokens = [token for text in texts for token in draws.tokens_of(*text)]
        if not judged:
            return texts
        if tokens:
            verdict = draws.judge(tokens)
            if verdict.caught:
                raise _not_its_own(len(tokens), verdict)
            if verdict.enough:
                return texts
    if tokens and verdict.fine:
        logging.info(
            "%s: %d drawn tokens tell no temperature between 0.7 and 1.3 from 1: few are open",
            *(transport.root, len(tokens)),
        )
        return texts
    logging.warning(
        "%s: whether it draws as it reports is not known from %d drawn tokens: they are nearly"
        " certain, lost, or odd but not enough",
        *(transport.root, len(tokens)),
    )
    return texts


def _not_its_own(tokens: int, verdict: draws.Verdict) -> WrongAnswer:
    return WrongAnswer(
        f"{NAME}: {tokens} tokens that it drew at temperature 1 are not from the distributions that"
        f" it reports: their mean negative logprob is {verdict.surprise:.2f} nats and should be"
        f" {verdict.entropy:.2f}, and chance makes that of an honest server less than once in a"
        f" million times. Most likely {verdict.kind}. Switch that off where the model is served,"
        " or use another server"
    )


def _score_again(
    transport: Transport, dialect: Dialect, texts: Sequence[Text]
) -> tuple[TeacherAnswer, float]:
    """(every position of the first text, median difference of drawn and scored tokens in nats).

    Raises:
      WrongAnswer: they differ by more than the server's own noise explains.
    """
    requests = [score_request(text.whole, text.request.top_k) for text in texts]
    (first,) = exchange(transport, dialect, requests[:1])
    _check_count(first, texts[0].request.top_k)
    rest = [requests[1:]] if dialect.rows_per_request else [[one] for one in requests[1:]]
    answers = [first, *[a for part in rest if part for a in exchange(transport, dialect, part)]]
    scored = [
        answer.rows(slice(len(text.request.ids) - 1, None))
        for text, answer in zip(texts, answers, strict=True)
    ]
    found = agreement.apart([text.answer for text in texts], scored)
    if found.within(agreement.FLOOR):
        return first, found.median
    noise = _noise(transport, dialect, texts[1:])
    if not found.within(agreement.most(noise)):
        drawn, again = found.worst
        raise WrongAnswer(
            f"{NAME}: tokens that it drew have other logprobs when they are scored, one of them"
            f" {drawn:.3f} and then {again:.3f}: {found.median:.3f} nats apart (median of"
            f" {found.tokens}; its own noise of {noise:.4f} allows {agreement.most(noise):.3f}),"
            f" and a scored logprob moves by {found.slope:.2f} where a drawn one moves by 1 (from"
            " 0.95 to 1.05 is right): it shifts positions, adds a token, or does not compute at"
            " temperature 1"
        )
    logging.warning(
        "drawn and scored logprobs of the same tokens differ by %.3f nats (median), the server's"
        " own by %.3f (mean): it computes in a low precision",
        *(found.median, noise),
    )
    return first, found.median


def _noise(transport: Transport, dialect: Dialect, texts: Sequence[Text]) -> float:
    """How far a server is from itself: what it says of a place after it wrote or read the text."""
    written, read = [], []
    for request, answer in texts:
        half = len(answer.target_ids) // 2
        if not half:
            continue
        ids = np.concatenate([request.ids, answer.target_ids[:half]])
        once = dataclasses.replace(request, ids=ids, sampling=SamplingParams(1, 0.0, 1.0))
        (again,) = exchange(transport, dialect, [once])
        if not again.lost:
            written.append(answer.rows(slice(half, half + 1)))
            read.append(again.rows(slice(1)))
    return agreement.noise(written, read)
