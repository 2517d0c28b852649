"""A server is tried before it is trusted: what it can do, and whether its numbers are right.

It writes short texts, greedily and at temperature 1, and scores them afterwards. A server that
inserts a token, shifts its answer by one position, ignores `echo` or `logprobs`, has another
tokenizer, or does not sample from what it reports is refused.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from gkdjax.data.chat_template import Chat
from gkdjax.teachers.server import agreement, draws, served
from gkdjax.teachers.server.answers import Request, SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.dialects.base import Dialect
from gkdjax.teachers.server.scheduler import exchange
from gkdjax.teachers.server.store.fingerprint import MAX_DRIFT, drift
from gkdjax.teachers.server.transport.client import RepeatedServerError, Transport
from gkdjax.types import ContextLimit, Message, SamplingParams
from gkdjax.utils.errors import TeacherRefused, UserError, WrongAnswer

PROBE = (
    "The quick brown fox reads 1,234 books in the café on 5th Street; naïve readers ask: why?\n"
    "Der Fuchs liest weiter. Лиса читает дальше. 狐狸继续读书。\n\n\tdef f(x):\n        return x**2"
)
NAME = "the preflight"
_PROBE_TOKENS = 64  # at most, of that text
_WRITTEN_TOKENS = 8
_MAX_SAME = 3  # 5xx responses to one dialect in a row
_MAX_EMPTY = 3  # samples without a token
_TEXTS = 6  # sampled at temperature 1, each after another part of the probe,
_TEXT_TOKENS = 16  # with so many tokens,
_ROUNDS = 4  # and at most so often, until they are enough to judge the server
_MAX_BEHIND = 1e-2  # nats, of a token of a greedy answer behind the best one there
_SHIFTED = "the logprobs are those of another position, or it does not draw by them"
_PENALTY = (
    "that one stands in the text before, so the server draws with a repetition penalty, which its"
    " logprobs do not have (llama-cpp-python's repeat_penalty is 1.1 unless it is told; vLLM takes"
    " repetition_penalty from the model's generation_config.json); switch it off where it is served"
)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known about a server after the preflight; the store keeps it as JSON."""

    model: str  # its name there
    dialect: str  # a name of `connect.DIALECTS`
    scores: bool  # it scores given ids
    limits: str  # why it does not
    context_length: int | None  # of a view in tokens; None: unknown
    top_k: int  # so many logprobs of a token were asked for, and came
    tokenizer: str  # how the vocabulary was compared
    difference: float | None  # of sampled and scored logprobs, median in nats; None: not scored
    context_source: str = ""  # the source of `context_length`, for people; absent in older stores
    context_written: int | None = None  # of a prompt and its answer; None: as `context_length`


class Server(NamedTuple):
    """A server that passed."""

    dialect: Dialect
    findings: Findings
    probe: TeacherAnswer  # by which its weights are recognised


class Text(NamedTuple):
    """A text that a server wrote."""

    request: SampleRequest
    answer: TeacherAnswer


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
      transport, api_model: the server, and its name for the model; "" for the only one.
      dialects: by name, in the order in which they are tried.
      chat: the tokenizer that the teacher should have.
      vocab_size: limit of the ids that the server may name, see `train.models.ids_of_server`.
      top_k, sampling: of the run.
      must_score: refuse a server that does not score given ids.

    Raises:
      UserError: it cannot be used, with the reasons.
      TeacherUnreachable: it does not answer.
    """
    model, listed = served.model_of(transport, api_model)
    compared, by_tokenizer = served.compare_tokenizers(transport, model, chat, PROBE)
    limit = listed or by_tokenizer or served.proxied(transport, model) or ContextLimit(None, "")
    trials: dict[str, Trial] = {}

    def scores(name: str, most_same: int) -> bool:
        dialect = dialects[name](model, vocab_size, chat.tokenizer)
        found = Findings(
            *(model, name, False, "", limit.tokens, top_k, compared, None),
            *(limit.source, limit.written),
        )
        trials[name] = Trial(transport, dialect, chat, top_k, most_same)
        trials[name].run(found, sampling)
        return trials[name].scores

    any(scores(name, _MAX_SAME) for name in dialects)
    broken = [name for name, trial in trials.items() if trial.is_broken]
    # If all dialects fail the server is down, and is waited for. If only some do, it may have come
    # back just after the better ones were given up.
    is_down = all(trial.is_broken and trial.server is None for trial in trials.values())
    any(scores(name, 0 if is_down else 1) for name in broken)
    usable = [trials[name] for name in dialects if name in trials and trials[name].server]
    best = max(usable, key=lambda trial: trial.scores, default=None)
    if best and best.scores:
        return best.server
    reasons = "; ".join(trial.reason for trial in trials.values() if trial.reason)
    if must_score or not best:
        raise UserError(f"{transport.root} cannot be used: {reasons}")
    logging.warning("%s: only its own text can be learnt: %s", transport.root, reasons)
    return best.server


def probe_again(transport: Transport, server: Server, chat: Chat) -> TeacherAnswer:
    """Asks the server again for `server.probe`."""
    trial = Trial(transport, server.dialect, chat, server.findings.top_k)
    if not server.findings.scores:
        return trial.write()
    return trial.ask(score_request(probe_ids(chat), server.findings.top_k))[0]


def probe_ids(chat: Chat) -> np.ndarray:
    """The ids that every server is asked about: int32 [n]."""
    return np.asarray(chat.tokenizer(PROBE)["input_ids"][:_PROBE_TOKENS], np.int32)


def sample_request(chat: Chat, ids: np.ndarray, top_k: int, tokens: int) -> SampleRequest:
    """A greedy answer to the probe."""
    sampling = SamplingParams(tokens, temperature=0.0, top_p=1.0)
    messages = (Message("user", PROBE),)
    return SampleRequest(NAME, ids, messages, sampling, 0, chat.stop_ids, top_k)


def score_request(ids: np.ndarray, top_k: int) -> ScoreRequest:
    """All tokens but the first."""
    return ScoreRequest(NAME, ids, np.arange(len(ids) - 1, dtype=np.int32), top_k)


class Trial:
    """One dialect tried at a server."""

    def __init__(
        self, transport: Transport, dialect: Dialect, chat: Chat, top_k: int, most_same: int = 0
    ):
        """See `examine`, and `Transport.post` for `most_same`."""
        self._transport, self._dialect, self._chat = transport, dialect, chat
        self._top_k, self._most_same = top_k, most_same
        self._ids = probe_ids(chat)
        self._greedy = sample_request(chat, self._ids, top_k, _WRITTEN_TOKENS)
        self.server: Server | None = None  # None if it writes nothing that can be used
        self.reason = ""  # why it does not write or score
        self.is_broken = False  # the reason is the same 5xx response again and again

    @property
    def scores(self) -> bool:
        """Whether it writes and scores."""
        return self.server is not None and self.server.findings.scores

    def ask(self, *requests: Request) -> list[TeacherAnswer]:
        """The answers to one request, or to several that the dialect takes together."""
        return exchange(self._transport, self._dialect, requests, most_same=self._most_same)

    def run(self, found: Findings, sampling: SamplingParams) -> None:
        """Tries everything, and adds the results to `found`."""
        try:
            written = self.write()
            self._check_temperature(written, sampling)
            texts = self._sample(judge=sampling.temperature > 0)[:_TEXTS]
            self.server = Server(self._dialect, found, written.rows(slice(None)))
            scored, difference = self.score([Text(self._greedy, written), *texts])
            found = dataclasses.replace(found, scores=True, difference=difference)
            self.server = Server(self._dialect, found, scored.rows(slice(len(self._ids) - 1)))
        except (WrongAnswer, TeacherRefused, RepeatedServerError, NotImplementedError) as error:
            self.is_broken = isinstance(error, RepeatedServerError)
            fault = "does not score given ids" if self.server else "writes nothing that can be used"
            self.reason = f"{found.dialect} {fault}: {error}"
            if self.server:
                found = dataclasses.replace(found, limits=str(error))
                self.server = self.server._replace(findings=found)

    def write(self) -> TeacherAnswer:
        """A greedy answer, each token of which must be the most probable one."""
        (answer,) = self.ask(self._greedy)
        if answer.unreadable:
            raise WrongAnswer(
                f"{NAME}: {answer.unreadable}: if the tokenizer is not that of"
                f" {self._chat.directory}, name the teacher's own in config.teacher.tokenizer; else"
                " the server names tokens by text, which cannot name parts of characters: use"
                " teacher.backend='vllm' or 'sglang'"
            )
        if answer.lost:
            raise WrongAnswer(f"{NAME}: it wrote nothing")
        behind = answer.top_logprobs[:, 0] - answer.target_logprob
        worst = int(behind.argmax())
        if behind[worst] > _MAX_BEHIND:
            before = {*self._ids.tolist(), *answer.target_ids[:worst].tolist()}
            best, own = answer.top_ids[worst, 0], answer.target_ids[worst]
            reason = _PENALTY if best in before and own not in before else _SHIFTED
            raise WrongAnswer(
                f"{NAME}: token {worst} of a greedy answer is {behind[worst]:.3f} nats less"
                f" probable than the best there: {reason}"
            )
        return answer

    def _check_temperature(self, greedy: TeacherAnswer, sampling: SamplingParams) -> None:
        """Raises WrongAnswer if logprobs change with the temperature or top p of the run."""
        sampling = dataclasses.replace(sampling, max_new_tokens=_WRITTEN_TOKENS)
        for seed in range(_MAX_EMPTY):
            request = dataclasses.replace(self._greedy, sampling=sampling, seed=seed)
            (sampled,) = self.ask(request)
            if sampled.lost:  # or it ended at once, without a token
                continue
            # The first token of both follows the same text.
            distance = drift(sampled.rows(slice(1)), greedy.rows(slice(1)))
            if distance > MAX_DRIFT:
                raise WrongAnswer(
                    f"{NAME}: with rollout.temperature={sampling.temperature}, .top_p="
                    f"{sampling.top_p} and .top_k={sampling.top_k} logprobs are {distance:.3f} nats"
                    " apart from those at temperature 0: they are not raw. Have the server return"
                    " raw ones (vLLM: --logprobs-mode raw_logprobs), or sample at temperature 1"
                    " with top_p=1 and top_k=None"
                )
            return
        logging.warning(
            "%s: none of %d sampled answers has a token: whether their logprobs are raw is unknown",
            *(self._transport.root, _MAX_EMPTY),
        )

    def _sample(self, *, judge: bool) -> list[Text]:
        """Texts at temperature 1; WrongAnswer if `judge` and they are not from what is reported."""
        sampling = SamplingParams(_TEXT_TOKENS, temperature=1.0, top_p=1.0)
        texts, tokens, verdict = [], [], None
        for seed in range(_ROUNDS * _TEXTS):
            end = len(self._ids) - seed % _TEXTS * (len(self._ids) // (2 * _TEXTS))
            request = dataclasses.replace(
                self._greedy, ids=self._ids[:end], sampling=sampling, seed=seed
            )
            (answer,) = self.ask(request)
            if not answer.lost:
                texts.append(Text(request, answer))
                tokens += draws.tokens_of(request, answer)
            if (seed + 1) % _TEXTS:
                continue
            if not judge:
                return texts
            verdict = draws.judge(tokens) if tokens else None
            if verdict and verdict.caught:
                raise WrongAnswer(
                    f"{NAME}: {len(tokens)} tokens that it sampled at temperature 1 are not from"
                    " the distributions that it reports (by chance less than once in a million"
                    f" times): the mean negative logprob is {verdict.surprise:.2f} nats, and should"
                    f" be {verdict.entropy:.2f}. Most likely {verdict.kind}. Switch that off where"
                    " the model is served, or use another server"
                )
            if verdict and verdict.enough:
                return texts
        if verdict and verdict.fine:
            level = logging.INFO
            known = "tokens cannot tell temperatures between 0.7 and 1.3 from 1: few are uncertain"
        else:
            level = logging.WARNING
            known = "tokens do not show whether they are from what it reports"
        logging.log(level, "%s: %d sampled %s", self._transport.root, len(tokens), known)
        return texts

    def score(self, texts: Sequence[Text]) -> tuple[TeacherAnswer, float]:
        """Scores texts that the server wrote, and compares the logprobs.

        Returns:
          (all positions of the first text, median difference to the sampled logprobs in nats).
        """
        wholes = [np.concatenate([text.request.ids, text.answer.target_ids]) for text in texts]
        first, *rest = [score_request(ids, self._top_k) for ids in wholes]
        answers = self.ask(first)
        together = self._dialect.rows_per_request and len(rest) > 0
        for requests in [rest] if together else [[request] for request in rest]:
            answers += self.ask(*requests)
        scored = [
            answer.rows(slice(len(text.request.ids) - 1, None))
            for text, answer in zip(texts, answers, strict=True)
        ]
        found = agreement.compare([text.answer for text in texts], scored)
        if found.within(agreement.FLOOR):
            return answers[0], found.median
        noise = self._noise(texts[1:])
        most = agreement.max_median(noise)
        if not found.within(most):
            sampled, again = found.worst
            raise WrongAnswer(
                f"{NAME}: tokens that it sampled have other logprobs when they are scored, such as"
                f" {sampled:.3f} and then {again:.3f}: {found.median:.3f} nats apart (median of"
                f" {found.tokens}; its own noise of {noise:.4f} allows {most:.3f}), with a slope of"
                f" {found.slope:.2f} (0.95 to 1.05 is right): it shifts positions, adds a token, or"
                " does not compute at temperature 1"
            )
        logging.warning(
            "sampled and scored logprobs differ by %.3f nats (median), those of the server with"
            " itself by %.3f (mean): it computes in a low precision",
            *(found.median, noise),
        )
        return answers[0], found.median

    def _noise(self, texts: Sequence[Text]) -> float:
        """How the server's answers at one place differ after it wrote, and after it read a text."""
        written, read = [], []
        for request, answer in texts:
            if half := len(answer.target_ids) // 2:
                ids = np.concatenate([request.ids, answer.target_ids[:half]])
                greedy = SamplingParams(1, 0.0, 1.0)
                (again,) = self.ask(dataclasses.replace(request, ids=ids, sampling=greedy))
                if not again.lost:
                    written.append(answer.rows(slice(half, half + 1)))
                    read.append(again.rows(slice(1)))
        return agreement.noise(written, read)
