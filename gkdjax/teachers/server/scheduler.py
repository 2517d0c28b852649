"""Answers to requests: from the store, from what is on its way, or from the server.

Threads ask the server while the device computes. What comes back is in the store before anybody
sees it, so that no answer is paid for twice.
"""

import collections
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gkdjax.teachers.server.answers import Request, SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.dialects.base import Dialect, exchange
from gkdjax.teachers.server.store.answers import AnswerStore, sample_key, score_key
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity, same_teacher
from gkdjax.teachers.server.store.suspects import Suspects
from gkdjax.teachers.server.transport.client import RepeatedServerError, ServerEnded, Transport
from gkdjax.teachers.server.transport.turns import Turns
from gkdjax.utils import text
from gkdjax.utils.errors import (
    GkdjaxError,
    Preempted,
    TeacherRefused,
    TeacherUnreachable,
    UserError,
    WrongAnswer,
)

# Of one request: a server that keeps the logprobs of a prompt needs 6 bytes a token and id.
REQUEST_TOKENS = 4096

_SEVERAL_UNREADABLE = 5  # responses; fewer say nothing of their share

_LOOK_UP_S = 0.2  # how often whoever waits looks whether it is to stop
_PROBE_EVERY = 256  # requests; and after each outage: somebody else may answer there now

_Part = dict[str, Request]  # key -> what is asked
_Answers = dict[str, TeacherAnswer]


class Pool:
    """Asks one teacher, with a bounded number of requests at a time."""

    def __init__(
        self,
        dialect: Dialect,
        transport: Transport | None,
        store: AnswerStore | None,
        known: TeacherIdentity,
        suspects: Suspects,
        *,
        probe: Callable[[], TeacherAnswer] | None,
        concurrency: int,
        max_unreadable: float,
    ):
        """Asks for nothing yet; `transport` and `store` are the pool's to close.

        Args:
          dialect: of the server.
          transport: to the server; None: the store has to have everything.
          store: of answers; None: what was answered is forgotten.
          known: whose answers they are.
          suspects: what is asked alone, because the server went away when it was asked before.
          probe: asks the server what it says now where it said `known.probe`; None without one.
          concurrency: requests at a time.
          max_unreadable: share of the responses bought that may name tokens by what names no id.
        """
        self._dialect, self._transport, self._store = dialect, transport, store
        self._known, self._probe = known, probe
        self._suspects, self._turns = suspects, Turns()
        self._ended_by: ServerEnded | None = None  # that a row ended the server while it was alone
        self._outages, self._since_probe = 0, 0  # of the transport when its weights were tried last
        self._threads = concurrent.futures.ThreadPoolExecutor(concurrency, "teacher")
        self._in_flight: dict[str, concurrent.futures.Future] = {}
        self.stopped = threading.Event()  # set: nobody waits for an answer any longer
        self._missing: dict[str, Request] | None = None  # None: a missing answer is an error
        self._lock, self._weights_lock = threading.Lock(), threading.Lock()
        self._counts = collections.Counter()
        self._max_unreadable, self._unreadable = max_unreadable, []

    def scores(self, requests: Sequence[ScoreRequest]) -> Callable[[], list[TeacherAnswer]]:
        """Begins to ask -> a function that waits for the answers, in the order of `requests`."""
        keys = [score_key(self._known, request) for request in requests]
        several = self._dialect.rows_per_request
        return self._ask(dict(zip(keys, requests, strict=True)), keys, several)

    def samples(self, requests: Sequence[SampleRequest]) -> Callable[[], list[TeacherAnswer]]:
        """As `scores`."""
        by_messages = self._dialect.by_messages
        keys = [sample_key(self._known, r, by_messages=by_messages) for r in requests]
        return self._ask(dict(zip(keys, requests, strict=True)), keys, False)

    @contextlib.contextmanager
    def collect_missing(self) -> Iterator[list[Request]]:
        """What the store lacks ends up in the list, gets an empty answer, and is not bought."""
        missing: list[Request] = []
        self._missing = {}
        try:
            yield missing
        finally:
            missing += self._missing.values()
            self._missing = None

    def report(self) -> dict[str, int]:
        """Counts, for results.json: what was bought, what the store had, what could not be used."""
        retries = 0 if self._transport is None else self._transport.retries
        names = ("asked", "stored", "bought", "read_tokens", "written_tokens", "unmapped", "lost")
        return {name: self._counts[name] for name in names} | {"retries": retries}

    def close(self) -> None:
        """Waits for what is on its way, as it is paid for, but begins nothing new."""
        if self._transport is not None:
            self._transport.close()
        self._threads.shutdown(cancel_futures=True)
        if self._store is not None:
            self._store.close()

    def _ask(
        self, requests: _Part, keys: Sequence[str], several: bool
    ) -> Callable[[], list[TeacherAnswer]]:
        on_the_way = {key: self._in_flight[key] for key in requests if key in self._in_flight}
        rest = {key: request for key, request in requests.items() if key not in on_the_way}
        found = {} if self._store is None else self._store.get(list(rest))
        rest = {key: request for key, request in rest.items() if key not in found}
        self._counts.update(asked=len(requests), stored=len(found))
        if rest and (self._transport is None or self._missing is not None):
            found |= self._miss(rest)
            return lambda: [found[key] for key in keys]
        alone = {key: rest.pop(key) for key in list(rest) if key in self._suspects}
        parts = _parts(rest) if several else _one_by_one(rest)
        for part in parts + _one_by_one(alone):
            future = self._threads.submit(self._buy, part, alone=part.keys() <= alone.keys())
            on_the_way |= dict.fromkeys(part, future)
        self._in_flight |= on_the_way

        def wait() -> list[TeacherAnswer]:
            try:
                for future in on_the_way.values():
                    found.update(self._result(future))
            finally:
                for key in on_the_way:
                    self._in_flight.pop(key, None)
            return [found[key] for key in keys]

        return wait

    def _result(self, future: concurrent.futures.Future) -> _Answers:
        while not self.stopped.is_set():
            if concurrent.futures.wait([future], timeout=_LOOK_UP_S).done:
                return future.result()
        raise Preempted("stopped by SIGTERM while a teacher's answer was on its way")

    def _buy(self, part: _Part, *, alone: bool = False) -> _Answers:
        requests = list(part.values())
        try:
            with self._turns.alone() if alone else self._turns.together():
                answers = exchange(self._transport, self._dialect, requests)
        except ServerEnded as error:
            self._suspects.add(part)
            if not alone and error.is_back:
                # All that was under way has the same to tell: only one by one it comes out which.
                return self._buy_all(_one_by_one(part), alone=True)
            told = _ended(requests, error, alone=alone)
            self._ended_by = told if alone else self._ended_by
            raise told from None
        except (RepeatedServerError, TeacherRefused) as error:
            if len(part) == 1:
                raise _about(requests[0], error) from None
            # One row of it may be what the server cannot stand: the halves tell which.
            keys = list(part)
            halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
            return self._buy_all([{key: part[key] for key in half} for half in halves], alone=alone)
        except GkdjaxError as error:
            if isinstance(error, TeacherUnreachable) and self._ended_by is not None:
                raise self._ended_by from None  # it is away because of that row, not of this one
            raise (_about(requests[0], error) if len(part) == 1 else error) from None
        self._check_weights()
        if self._store is not None:
            kind = "score" if isinstance(requests[0], ScoreRequest) else "sample"
            items = [(key, kind, a) for key, a in zip(part, answers, strict=True)]
            self._store.put(self._known.fingerprint, items)
        self._suspects.remove(part)
        self._count(requests, answers)
        self._check_readable()
        return dict(zip(part, answers, strict=True))

    def _buy_all(self, parts: Sequence[_Part], *, alone: bool) -> _Answers:
        bought: _Answers = {}
        for part in parts:
            bought |= self._buy(part, alone=alone)
        return bought

    def _check_weights(self) -> None:
        """Raises TeacherRefused if the server has other weights than when it was tried."""
        with self._weights_lock:
            self._since_probe += 1
            outages = self._transport.outages
            if outages == self._outages and self._since_probe < _PROBE_EVERY:
                return
            if not same_teacher(self._known.probe, self._probe_again()):
                raise TeacherRefused(
                    f"the server answers {self._known.model!r} with other weights than before;"
                    " serve those again"
                )
            self._outages, self._since_probe = outages, 0

    def _check_readable(self) -> None:
        """Raises WrongAnswer if too many responses were bought in vain."""
        with self._lock:
            lost, written = self._unreadable, self._counts["responses"]
            if len(lost) < _SEVERAL_UNREADABLE or len(lost) <= self._max_unreadable * written:
                return
            raise WrongAnswer(
                f"{len(lost)} of {written} responses bought are lost, more than"
                f" config.teacher.max_unreadable={self._max_unreadable} allows, for a token that"
                f" names no id here: {'; '.join(lost[:3])}. Where they are named by text, use"
                " teacher.backend='vllm' or 'sglang' if one of them serves the model: they name"
                " tokens by id. Where it is an id, the student has no such token: raise"
                " config.teacher.max_unreadable if so much may be lost"
            )

    def _probe_again(self) -> TeacherAnswer:
        try:
            with self._turns.together():
                return self._probe()
        except ServerEnded:  # because of what was asked beside it
            with self._turns.alone():
                return self._probe()

    def _miss(self, rest: _Part) -> _Answers:
        if self._missing is None:
            raise missing_error(list(rest.values()))
        self._missing |= rest
        return {key: _stand_in(request) for key, request in rest.items()}

    def _count(self, requests: Sequence[Request], answers: Sequence[TeacherAnswer]) -> None:
        with self._lock:
            self._counts.update(
                bought=len(requests),
                read_tokens=sum(len(request.ids) for request in requests),
                written_tokens=sum(
                    len(answer.target_ids)
                    for answer, request in zip(answers, requests, strict=True)
                    if isinstance(request, SampleRequest)
                ),
                unmapped=sum(answer.unmapped for answer in answers),
                lost=sum(answer.lost for answer in answers),
                responses=sum(isinstance(request, SampleRequest) for request in requests),
            )
            self._unreadable += [answer.unreadable for answer in answers if answer.unreadable]


def missing_error(requests: Sequence[Request]) -> UserError:
    """That these are not in the store, though there is nothing but the store."""
    names = list(dict.fromkeys(request.name for request in requests))
    return UserError(
        f"config.teacher.offline: the store lacks the answers to {len(requests)} requests, of"
        f" {text.some(names)}. Fill it with python -m gkdjax.tools.cache_teacher and the"
        " same config, or set config.teacher.offline=False"
    )


def _stand_in(request: Request) -> TeacherAnswer:
    """That says nothing, and whose text nobody refuses."""
    sampled = isinstance(request, SampleRequest)
    ids = np.asarray(request.stop_ids[:1], np.int32) if sampled else request.target_ids
    logprobs = np.full((len(ids), request.top_k), -np.inf, np.float32)
    zeros = np.zeros(len(ids), np.float32)
    top_ids = np.zeros(logprobs.shape, np.int32)
    return TeacherAnswer(ids, zeros, top_ids, logprobs, zeros, finished=sampled)


def _about(request: Request, error: GkdjaxError) -> GkdjaxError:
    if request.name in str(error):  # whoever read the answer has said it
        return error
    return type(error)(f"{request.name}: {error}")


def _ended(requests: Sequence[Request], error: ServerEnded, *, alone: bool) -> ServerEnded:
    names = text.some([request.name for request in requests])
    if alone:
        return type(error)(
            f"{names}: {error}. This process asked nothing else meanwhile: the server does not"
            " survive this row. Its log says why; leave the row out, or serve the model otherwise."
            " All other answers that came are kept"
        )
    return type(error)(
        f"{error}. It was asked about {names}, perhaps among others: the same command asks for"
        " these one by one, and names what the server does not survive"
    )


def _one_by_one(requests: _Part) -> list[_Part]:
    return [{key: request} for key, request in requests.items()]


def _parts(requests: _Part) -> list[_Part]:
    """Requests that are sent together; one that is longer than the budget goes alone."""
    parts, tokens = [{}], 0
    for key, request in requests.items():
        tokens += len(request.ids)
        if parts[-1] and tokens > REQUEST_TOKENS:
            parts.append({})
            tokens = len(request.ids)
        parts[-1][key] = request
    return [part for part in parts if part]
