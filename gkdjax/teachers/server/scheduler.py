"""Answers to requests: from the store, from requests under way, or from the server.

Threads ask the server while the device computes. An answer is in the store before it is used, so
that none is paid for twice.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from gkdjax.report import run_files
from gkdjax.teachers.server.answers import Request, SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.dialects import base
from gkdjax.teachers.server.dialects.base import Dialect
from gkdjax.teachers.server.json_fields import opened
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.teachers.server.store.fingerprint import (
    TeacherIdentity,
    same_teacher,
    sample_key,
    score_key,
)
from gkdjax.teachers.server.transport.client import RepeatedServerError, ServerCrashed, Transport
from gkdjax.utils import errors, files
from gkdjax.utils.errors import GkdjaxError, UserError
from gkdjax.utils.text import some

# In one request: a server that keeps the logprobs of a prompt needs 6 bytes a token and id.
REQUEST_TOKENS = 4096
_MIN_UNREADABLE = 5  # responses; fewer say nothing about their share
_POLL_S = 0.2  # how often a waiting thread looks whether it is to stop
_PROBE_EVERY = 256  # requests, and after each outage: other weights may be served by then

_Batch = dict[str, Request]  # key -> request
_Answers = dict[str, TeacherAnswer]


class Suspects:
    """Keys of requests during which a server went away: they are sent alone until it answers.

    A file of the run has them, so that the next start does not send them together again.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._lock = path, threading.Lock()
        self._keys = set((run_files.load(path) or {"keys": ()})["keys"])

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def update(self, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> None:
        """Adds and removes keys, and writes the file if they have changed."""
        with self._lock:
            keys = (self._keys | set(add)) - set(remove)
            if keys != self._keys:
                self._keys = keys
                files.write_json(self._path, {"keys": sorted(keys)})
            if not keys:
                self._path.unlink(missing_ok=True)


@dataclasses.dataclass
class Pool:
    """Asks one teacher, with a bounded number of requests at a time."""

    dialect: Dialect
    transport: Transport | None  # None: the store has to have everything
    store: AnswerStore | None  # None: answers are forgotten
    teacher: TeacherIdentity  # whose answers they are
    suspects: Suspects
    _: dataclasses.KW_ONLY
    probe: Callable[[], TeacherAnswer] | None  # asks the server again for `teacher.probe`
    concurrency: int
    max_unreadable: float  # largest share of responses that may be lost to tokens without an id

    def __post_init__(self):
        self._threads = concurrent.futures.ThreadPoolExecutor(self.concurrency, "teacher")
        self._turnstile, self._slots = threading.Lock(), threading.Semaphore(self.concurrency)
        self._in_flight: dict[str, concurrent.futures.Future] = {}
        self._missing: _Batch | None = None  # collects what the store lacks; None: an error
        self._fatal: ServerCrashed | None = None  # of a row that the server did not survive alone
        self._outages = self._since_probe = 0  # at the last probe, and requests since
        self._lock, self._probe_lock = threading.Lock(), threading.Lock()
        self._counts, self._unreadable = collections.Counter(), []
        self.stopped = threading.Event()  # once set, nobody waits for an answer any longer

    def scores(self, requests: Sequence[ScoreRequest]) -> Callable[[], list[TeacherAnswer]]:
        """Sends requests -> a function that waits for the answers, in the same order."""
        keys = [score_key(self.teacher, request) for request in requests]
        return self._request(keys, requests, together=self.dialect.rows_per_request)

    def samples(self, requests: Sequence[SampleRequest]) -> Callable[[], list[TeacherAnswer]]:
        """Like `scores`."""
        by_messages = self.dialect.by_messages
        keys = [sample_key(self.teacher, r, by_messages=by_messages) for r in requests]
        return self._request(keys, requests, together=False)

    @contextlib.contextmanager
    def collect_missing(self) -> Iterator[list[Request]]:
        """Requests that the store cannot answer get an empty answer and end up in the list."""
        missing: list[Request] = []
        self._missing = {}
        try:
            yield missing
        finally:
            missing += self._missing.values()
            self._missing = None

    def report(self) -> dict[str, int]:
        """Counts of requests, answers and tokens, for results.json."""
        names = ("asked", "stored", "bought", "read_tokens", "written_tokens", "unmapped", "lost")
        retries = 0 if self.transport is None else self.transport.retries
        return {name: self._counts[name] for name in names} | {"retries": retries}

    def close(self) -> None:
        """Closes transport and store after the requests under way, as they are paid for."""
        if self.transport is not None:
            self.transport.close()
        self._threads.shutdown(cancel_futures=True)
        if self.store is not None:
            self.store.close()

    def _request(
        self, keys: Sequence[str], requests: Sequence[Request], *, together: bool
    ) -> Callable[[], list[TeacherAnswer]]:
        rest = dict(zip(keys, requests, strict=True))
        futures = {key: self._in_flight[key] for key in rest if key in self._in_flight}
        new = [key for key in rest if key not in futures]
        answers = {} if self.store is None else self.store.get(new)
        self._counts.update(asked=len(rest), stored=len(answers))
        rest = {key: rest[key] for key in new if key not in answers}
        if rest and self._missing is not None:
            self._missing |= rest
            answers |= {key: _empty_answer(request) for key, request in rest.items()}
        elif rest and self.transport is None:
            raise missing_error(list(rest.values()))
        else:
            alone = {key: rest.pop(key) for key in list(rest) if key in self.suspects}
            for batch in _batches(rest, REQUEST_TOKENS if together else 0) + _batches(alone):
                future = self._threads.submit(self._buy, batch, alone=batch.keys() <= alone.keys())
                futures |= dict.fromkeys(batch, future)
        self._in_flight |= futures

        def wait() -> list[TeacherAnswer]:
            try:
                for future in futures.values():
                    answers.update(self._result(future))
            finally:
                for key in futures:
                    self._in_flight.pop(key, None)
            return [answers[key] for key in keys]

        return wait

    def _result(self, future: concurrent.futures.Future) -> _Answers:
        while not self.stopped.is_set():
            if concurrent.futures.wait([future], timeout=_POLL_S).done:
                return future.result()
        raise errors.Preempted("stopped by SIGTERM while a teacher's answer was on its way")

    def _buy(self, *batches: _Batch, alone: bool = False) -> _Answers:
        """Asks the server for batches, one after the other."""
        answers: _Answers = {}
        for batch in batches:
            answers |= self._buy_batch(batch, list(batch.values()), alone)
        return answers

    def _buy_batch(self, batch: _Batch, requests: list[Request], alone: bool) -> _Answers:
        try:
            with self._turn(alone=alone):
                answers = exchange(self.transport, self.dialect, requests)
        except ServerCrashed as error:
            self.suspects.update(add=batch)
            if error.came_back and not alone:
                # Requests under way at the same time fail alike: one by one shows which it was.
                return self._buy(*_batches(batch), alone=True)
            names = some([request.name for request in requests])
            if alone:
                self._fatal = ServerCrashed(
                    f"{names}: {error}. This process asked nothing else meanwhile: the server does"
                    " not survive this row. Its log says why; leave the row out, or serve the model"
                    " otherwise. All other answers that came are kept"
                )
                raise self._fatal from None
            raise ServerCrashed(
                f"{error}. It was asked about {names}, perhaps among others: the same command asks"
                " for these one by one, and names what the server does not survive"
            ) from None
        except GkdjaxError as error:
            if len(requests) == 1:
                own = f"{requests[0].name}: {error}"
                error = error if requests[0].name in str(error) else type(error)(own)
            elif isinstance(error, RepeatedServerError | errors.TeacherRefused):
                # A single row may be the reason: the halves show which.
                items, middle = list(batch.items()), len(batch) // 2
                return self._buy(dict(items[:middle]), dict(items[middle:]), alone=alone)
            if self._fatal is not None and type(error) is errors.TeacherUnreachable:
                error = self._fatal  # that row is the reason, not this one
            raise error from None
        self._check_weights()
        if self.store is not None:
            kind = "score" if isinstance(requests[0], ScoreRequest) else "sample"
            items = [(key, kind, answer) for key, answer in zip(batch, answers, strict=True)]
            self.store.put(self.teacher.fingerprint, items)
        self.suspects.update(remove=batch)
        self._count(requests, answers)
        return dict(zip(batch, answers, strict=True))

    @contextlib.contextmanager
    def _turn(self, *, alone: bool = False) -> Iterator[None]:
        """Waits for a slot, or for all of them; a thread that waits for all lets no other pass."""
        slots = self.concurrency if alone else 1
        with self._turnstile:
            for _ in range(slots):
                self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release(slots)

    def _check_weights(self) -> None:
        """Raises TeacherRefused if the server has other weights than at the preflight."""
        with self._probe_lock:
            self._since_probe += 1
            outages = self.transport.outages
            if outages == self._outages and self._since_probe < _PROBE_EVERY:
                return
            try:
                with self._turn():
                    probe = self.probe()
            except ServerCrashed:  # because of a request at the same time
                with self._turn(alone=True):
                    probe = self.probe()
            if not same_teacher(self.teacher.probe, probe):
                raise errors.TeacherRefused(
                    f"the server answers {self.teacher.model!r} with other weights than before;"
                    " serve those again"
                )
            self._outages, self._since_probe = outages, 0

    def _count(self, requests: Sequence[Request], answers: Sequence[TeacherAnswer]) -> None:
        """Counts answers, and raises WrongAnswer if too many responses were bought in vain."""
        sampled = isinstance(requests[0], SampleRequest)
        with self._lock:
            self._counts.update(
                bought=len(requests),
                read_tokens=sum(len(request.ids) for request in requests),
                written_tokens=sampled * sum(len(answer.target_ids) for answer in answers),
                unmapped=sum(answer.unmapped for answer in answers),
                lost=sum(answer.lost for answer in answers),
                responses=sampled * len(requests),
            )
            self._unreadable += [answer.unreadable for answer in answers if answer.unreadable]
            lost, written = self._unreadable, self._counts["responses"]
            if len(lost) >= _MIN_UNREADABLE and len(lost) > self.max_unreadable * written:
                raise errors.WrongAnswer(
                    f"{len(lost)} of {written} responses bought are lost to tokens without an id"
                    f" here, more than config.teacher.max_unreadable={self.max_unreadable} allows:"
                    f" {'; '.join(lost[:3])}. If the server names tokens by text, use"
                    " teacher.backend='vllm' or 'sglang'; if by id, the student lacks them: raise"
                    " config.teacher.max_unreadable if so much may be lost"
                )


def exchange(
    transport: Transport, dialect: Dialect, requests: Sequence[Request], *, most_same: int = 0
) -> list[TeacherAnswer]:
    """Asks one request, or several to score if the dialect takes them together -> the answers.

    `most_same` is that of `Transport.post`; 0: what suits the number of requests.

    Raises:
      NotImplementedError: the dialect scores nothing.
      And what `dialects.base.check` and `Transport.post` raise.
    """
    base.check(requests, dialect)
    score = isinstance(requests[0], ScoreRequest)
    call = dialect.score(*requests) if score else dialect.sample(*requests)
    # Of several rows one may be what the server trips over: they can be asked for one by one.
    most_same = most_same or (2 if len(requests) > 1 else 0)

    def read(answer: dict | list) -> list[TeacherAnswer]:
        root = opened(answer, requests[0].name)
        if score:
            return dialect.read_scores(root, *requests)
        return [dialect.read_sample(root, *requests)]

    how = {"max_bytes": call.max_bytes, "most_same": most_same}
    return transport.post(call.path, call.body, read, **how)


def missing_error(requests: Sequence[Request]) -> UserError:
    """The error of an offline run whose store lacks the answers to these requests."""
    names = some(list(dict.fromkeys(request.name for request in requests)))
    return UserError(
        f"config.teacher.offline: the store lacks the answers to {len(requests)} requests, of"
        f" {names}. Fill it with python -m gkdjax.tools.cache_teacher and the same config, or set"
        " config.teacher.offline=False"
    )


def _empty_answer(request: Request) -> TeacherAnswer:
    """An answer without information, whose text passes all filters."""
    sampled = isinstance(request, SampleRequest)
    ids = np.asarray(request.stop_ids[:1], np.int32) if sampled else request.target_ids
    logprobs = np.full((len(ids), request.top_k), -np.inf, np.float32)
    zeros, top_ids = np.zeros(len(ids), np.float32), np.zeros(logprobs.shape, np.int32)
    return TeacherAnswer(ids, zeros, top_ids, logprobs, zeros, finished=sampled)


def _batches(requests: _Batch, most_tokens: int = 0) -> list[_Batch]:
    """Requests that are sent together; one with more tokens goes alone."""
    batches, tokens = [], most_tokens
    for key, request in requests.items():
        tokens += len(request.ids)
        if tokens > most_tokens:
            batches.append({})
            tokens = len(request.ids)
        batches[-1][key] = request
    return batches
