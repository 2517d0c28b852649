"""JSON over HTTP to one server: a request is repeated until it succeeds or cannot succeed.

Asked again until the limits, with longer and longer waits: no connection, a broken or late
response, no JSON, statuses 408, 409, 429 and 5xx, also where the body of a 200 states them.
Asked again at once, and three times in all: an answer that cannot be right, whatever is wrong. One
more request costs less than a run, and a number may be damaged on its way. Final at once: all other
statuses; and to the caller what several answers show together, as a wrong tokenizer does.
"""

import dataclasses
import email.utils
import json
import re
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import requests
import tenacity
import urllib3
from absl import logging

from gkdjax.teachers.server import json_fields
from gkdjax.teachers.server.transport import session
from gkdjax.utils.errors import TeacherRefused, TeacherUnreachable, WrongAnswer

_GET_BYTES = 2**24  # a hosted server lists many models
_ERROR_BYTES = 2**16  # that are read of the body of an error
_LONGEST_WAIT_S = 60.0  # between two attempts, unless a Retry-After asks for more
_BACKOFF = tenacity.wait_random_exponential(multiplier=1.0, min=0.25, max=_LONGEST_WAIT_S)
_LAST_SHARE = 0.1  # of the deadline: time for a last attempt that no Retry-After takes away
_MOST_WRONG = 3  # answers to one request
_MOST_OUTAGES = 2  # of the server during one request
_RETRIED = (408, 409, 429)  # and those from 500 on, except:
_NOT_RETRIED = (501, 505)
# ValueError: a chunk with a negative size.
_BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
# Times and numbers of requests, by which two responses to the same fault differ.
_VARIABLE = re.compile(rb"\w*\d\w*|\b[a-fA-F]{4,}\b")
_KEY_HINT = "; see config.teacher.api_key_env"
_ROUTE_HINT = "; see config.teacher.api_base and config.teacher.api_model"
_HINTS = {401: _KEY_HINT, 403: _KEY_HINT, 404: _ROUTE_HINT}


def _as_it_is(answer: dict | list) -> dict | list:
    return answer


class RepeatedServerError(TeacherUnreachable):
    """The same 5xx response came again and again: the request itself may be the reason."""


class ServerCrashed(TeacherUnreachable):
    """The server went away during a request: because of it, or of another one at the same time."""

    came_back = False  # and then went away again


class Limits(NamedTuple):
    """How long a server is waited for."""

    timeout_s: float  # of one attempt in total; connecting has at most 10 s of it
    deadline_s: float  # of a request with all its attempts
    max_retries: int


class _Request(NamedTuple):
    method: str
    path: str
    data: bytes | None
    max_bytes: int  # of the response
    read: Callable[[dict | list], Any]


class _Response(NamedTuple):
    status: int
    headers: requests.structures.CaseInsensitiveDict
    body: bytes  # in full, or a little more than was wanted of it

    @property
    def encoding(self) -> str:
        """The content encoding, "" for none; nothing is unpacked, as it may be huge."""
        encoding = (self.headers.get("Content-Encoding") or "").strip()
        return "" if encoding.lower() == "identity" else encoding

    @property
    def text(self) -> str:
        return f"<{self.encoding}>" if self.encoding else self.body.decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class _Failure:
    """An attempt that may succeed another time."""

    reason: str
    has_response: bool = False
    retry_after_s: float = 0.0
    wrong: bool = False  # there is an answer, and it cannot be right
    server_error: tuple[int, bytes] | None = None  # status and body of 5xx, without `_VARIABLE`
    is_down: bool = False  # nobody listens at the address


@dataclasses.dataclass
class _Failures:
    """What the failed attempts of one request show together."""

    most_same: int  # see `Transport.post`
    same: int = 0  # equal 5xx responses, counted back from the last attempt
    outages: int = 0  # times that the server went away after another failure
    wrong: int = 0  # answers that cannot be right
    times: int = 0  # all of them
    _last: _Failure = _Failure("", is_down=True)
    _times_down: int = 0

    def add(self, failure: _Failure, times_down: int) -> None:
        """Counts an attempt; `times_down` is the number of those that found nobody, of any request.

        Another request may have seen that the server went away meanwhile.
        """
        is_same = failure.server_error == self._last.server_error
        self.same = 0 if failure.server_error is None else 1 + self.same * is_same
        self.outages += not self._last.is_down and times_down > self._times_down
        self.wrong += failure.wrong
        self.times += 1
        self._last, self._times_down = failure, times_down

    @property
    def is_repeated(self) -> bool:
        return 0 < self.most_same <= self.same


class Transport:
    """JSON over HTTP(S) to one server; safe to use from several threads."""

    def __init__(self, api_base: str, api_key_env: str, limits: Limits, *, trust_env: bool):
        """Sends nothing yet.

        Args:
          api_base: http or https address, with or without "/v1" at its end.
          api_key_env: name of the environment variable with the key; "" for no key.
          limits: of time and attempts.
          trust_env: take proxies, certificates and ~/.netrc from the environment.

        Raises:
          UserError: the address or the key is malformed.
        """
        self.root = session.root_of(api_base)  # paths are appended to it
        self.retries = 0  # attempts that were not the first of their request
        self.outages = 0  # failures after which another server may answer
        self._times_down = 0
        self._limits = limits
        self._key = session.read_key(api_key_env)
        self._session = session.open_session(self._key, trust_env=trust_env)
        self._lock, self._closed = threading.Lock(), threading.Event()
        is_plain = self.root.lower().startswith("http:") and not session.is_loopback(self.root)
        if self._key and is_plain:
            logging.warning(
                "the key in %s goes to %s over plain http: everyone in between can read it",
                *(api_key_env, self.root),
            )

    def get(self, path: str, *, once: bool = False) -> dict | list:
        """Like `post`, without a body; no JSON is a wrong answer, of no server of this API."""
        return self._ask(_Request("GET", path, None, _GET_BYTES, _as_it_is), once=once)

    def post(
        self,
        path: str,
        body: dict,
        read: Callable[[dict | list], Any] = _as_it_is,
        *,
        max_bytes: int,
        most_same: int = 0,
        once: bool = False,
    ) -> Any:
        """Asks until there is an answer -> what `read` makes of its JSON.

        Args:
          path, body: such as "/v1/completions", and its JSON object.
          read: raises WrongAnswer for an answer that cannot be right.
          max_bytes: of the response.
          most_same: give up when the same 5xx response came so often in a row; 0: never.
          once: make a single attempt, for a route that the server need not have.

        Raises:
          TeacherRefused: any other status, a redirect, or an unknown certificate.
          WrongAnswer: the answers were too long, no standard JSON, or refused by `read`.
          TeacherUnreachable: no answer within the limits, or closed; `RepeatedServerError` after
            `most_same`, `ServerCrashed` if the server went away twice, or once and for good.
        """
        data = json.dumps(body, allow_nan=False).encode()
        request = _Request("POST", path, data, max_bytes, read)
        return self._ask(request, most_same=most_same, once=once)

    def close(self) -> None:
        """Closes the connections; no request is repeated any longer.

        A first attempt is still made: an answer that was paid for may need one more to be kept.
        """
        self._closed.set()
        self._session.close()

    def _ask(self, request: _Request, *, most_same: int = 0, once: bool = False) -> Any:
        failures, limits = _Failures(most_same), self._limits
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda outcome: isinstance(outcome, _Failure)),
            after=lambda state: failures.add(state.outcome.result(), self._times_down),
            wait=lambda state: _wait_s(state, limits.deadline_s),
            stop=tenacity.stop_any(
                lambda state: failures.is_repeated or failures.outages >= _MOST_OUTAGES,
                lambda state: failures.wrong >= _MOST_WRONG,
                tenacity.stop_after_attempt(1 if once else 1 + limits.max_retries),
                tenacity.stop_before_delay(limits.deadline_s),
                tenacity.stop_when_event_set(self._closed),
            ),
            before_sleep=self._count_retry,
            sleep=lambda seconds: pause(self._closed, seconds),
            retry_error_callback=lambda state: self._give_up(request, failures, state),
        )
        return retrying(self._attempt, request, failures, time.monotonic() + limits.deadline_s)

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        failure = state.outcome.result()
        with self._lock:
            self.retries += 1
            self.outages += failure.server_error is not None or not failure.has_response
        text = f"{self.root}: {failure.reason}; trying again in {state.upcoming_sleep:.1f} s"
        is_long = state.upcoming_sleep > _LONGEST_WAIT_S
        logging.log_every_n_seconds(logging.WARNING, "%s", 0 if is_long else 60, text)

    def _give_up(
        self, request: _Request, failures: _Failures, state: tenacity.RetryCallState
    ) -> NoReturn:
        last = state.outcome.result()
        message = (
            f"{self._where(request)} got no usable answer in {state.seconds_since_start:.1f} s;"
            f" attempts: {state.attempt_number}; the last one: {last.reason}"
        )
        if failures.is_repeated:
            raise RepeatedServerError(message)
        if failures.outages:
            error = ServerCrashed(f"{message}; times that the server went away: {failures.outages}")
            error.came_back = failures.outages == _MOST_OUTAGES
            raise error
        raise (WrongAnswer if last.wrong else TeacherUnreachable)(message)

    def _attempt(self, request: _Request, failures: _Failures, deadline: float) -> Any:
        if failures.times and self._closed.is_set():
            return _Failure("not made, the transport is closed")
        seconds = min(self._limits.timeout_s, max(deadline - time.monotonic(), 1e-3))
        outer_error = sys.exception()  # the context of all errors below
        try:
            outcome = self._send(request, seconds)
        except _BROKEN as error:
            outcome = error
            # The messages of later errors hold addresses of objects.
            while (inner := outcome.__cause__ or outcome.__context__) not in (
                None,
                outer_error,
            ):
                outcome = inner
        # Errors are raised outside of the handler: the library's hold the request's headers, with
        # the key, and must not become the context of ours.
        if isinstance(outcome, _Response):
            try:
                return self._read(request, outcome)
            except WrongAnswer as error:
                reason = self._quoted(str(error), 2000)
            return _Failure(reason, has_response=True, wrong=True)
        return self._explain(request, outcome, seconds)

    def _send(self, request: _Request, seconds: float) -> _Response:
        with self._session.request(
            request.method,
            self.root + request.path,
            data=request.data,
            headers={"Content-Type": "application/json"} if request.data else None,
            timeout=session.attempt_timeout(seconds),
            stream=True,
        ) as response:
            most = request.max_bytes if response.status_code < 300 else _ERROR_BYTES
            body = bytearray()
            for part in response.raw.stream(2**16, decode_content=False):
                body += part
                if len(body) > most:
                    break
            return _Response(response.status_code, response.headers, bytes(body))

    def _explain(self, request: _Request, error: BaseException, seconds: float) -> _Failure:
        """Why there is no whole response."""
        if isinstance(error, ssl.SSLCertVerificationError):
            raise TeacherRefused(
                f"{self._where(request)}: the server's certificate does not hold:"
                f" {self._quoted(error.verify_message, 300)}"
            )
        if isinstance(error, TimeoutError):
            return _Failure(f"no whole answer within {seconds:.3g} s")
        is_down = isinstance(error, ConnectionRefusedError | socket.gaierror)
        with self._lock:
            self._times_down += is_down
        return _Failure(self._quoted(f"{type(error).__name__}: {error}", 300), is_down=is_down)

    def _read(self, request: _Request, response: _Response) -> Any:
        if 200 <= response.status < 300:
            return self._parse(request, response)
        return self._fail(request, response, response.status)

    def _fail(self, request: _Request, response: _Response, status: int) -> _Failure:
        """Takes a response for one of this status, which its body may state."""
        where = self._where(request)
        if status in _RETRIED or (status >= 500 and status not in _NOT_RETRIED):
            body, later = _VARIABLE.sub(b"", response.body), response.headers.get("Retry-After")
            asked = "" if later is None else f", Retry-After {self._quoted(later, 100)}"
            return _Failure(
                f"status {response.status}{asked}: {self._quoted(response.text, 300)}",
                has_response=True,
                retry_after_s=retry_after(later),
                server_error=(status, body) if status >= 500 else None,
            )
        if 300 <= status < 400:
            target = _redirect_target(self.root + request.path, response.headers.get("Location"))
            raise TeacherRefused(
                f"{where} is redirected to {self._quoted(target, 300)}, and redirects are not"
                " followed; if that is the server, change config.teacher.api_base"
            )
        message = self._quoted(_error_message(response.text), 500)
        hint = _HINTS.get(status) or ""
        raise TeacherRefused(f"{where} was refused with status {status}: {message}{hint}")

    def _parse(self, request: _Request, response: _Response) -> Any:
        def wrong(what: str) -> WrongAnswer:
            return WrongAnswer(f"the answer {what}")

        if response.encoding:
            raise wrong(f"has the Content-Encoding {response.encoding}, which was not asked for")
        if len(response.body) > request.max_bytes:
            raise wrong(f"has more than {request.max_bytes} bytes")
        try:
            answer = json_fields.parse(response.body, wrong)
        except json_fields.NotJson:
            reason = f"no JSON: {self._quoted(response.text, 200)}"
            return _Failure(reason, wrong=request.data is None)
        if status := json_fields.error_status(answer):
            return self._fail(request, response, status)
        return request.read(answer)

    def _where(self, request: _Request) -> str:
        return f"{self.root}: {request.method} {request.path}"

    def _quoted(self, text: str, most: int) -> str:
        """The text in one line of at most so many printable characters, without the key.

        Servers like to quote a wrong key, or its first or last characters.
        """
        if key := self._key:
            for n in range(len(key), min(8, len(key)) - 1, -1):
                text = text.replace(key[:n], "***").replace(key[-n:], "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= most else text[:most] + "..."


def pause(closed: threading.Event, seconds: float) -> None:
    """Waits between two attempts; all waiting is done here."""
    closed.wait(seconds)


def retry_after(header: str | None) -> float:
    """Seconds to wait by a Retry-After header, a number or a date; 0 if it is neither."""
    if re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?\s*", header or ""):
        seconds = float(header)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, IndexError, OverflowError):
            return 0.0
    return max(seconds, 0.0)


def _wait_s(state: tenacity.RetryCallState, deadline_s: float) -> float:
    """Seconds until the next attempt."""
    last = state.outcome.result()
    if last.wrong:
        return 0.0
    left = (1.0 - _LAST_SHARE) * deadline_s - state.seconds_since_start
    return max(_BACKOFF(state), min(last.retry_after_s, left))


def _redirect_target(url: str, location: str | None) -> str:
    """Where a redirect leads, without parts that may be secret."""
    try:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(url, location or ""))
    except ValueError:
        return "a malformed address"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _error_message(text: str) -> str:
    """The message in the body of an error, or all of it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found)
