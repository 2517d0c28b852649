"""Questions to one server and its answers, as JSON over HTTP, until they come or it is hopeless."""

import dataclasses
import json
import socket
import ssl
import sys
import threading
import time
import urllib.parse

import requests
import urllib3
from absl import logging

from gkdjax.teachers.server.transport import retries, session, strict_json
from gkdjax.teachers.server.transport.retries import Failed
from gkdjax.utils.errors import GkdjaxError, TeacherRefused, TeacherUnreachable, WrongAnswer

_GET_BYTES = 2**24  # the list of a hosted server's models is long
_ERROR_BYTES = 2**16  # of an error's body; more is not read
# Also ValueError: of a chunk with a negative size.
_BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
_AGAIN = (408, 409, 429)  # beside those from 500 on
_MOST_ENDED = 2  # times that a server goes away while it is asked one thing
_NEVER = (501, 505)  # of those: what the server does not have it will not have later
_HINTS = {
    401: "; see config.teacher.api_key_env",
    403: "; see config.teacher.api_key_env",
    404: "; see config.teacher.api_base and config.teacher.api_model",
}


class RepeatedServerError(TeacherUnreachable):
    """The same 5xx answer again and again: it may be the request that the server trips over.

    Only of requests whose caller said how often is enough.
    """


class ServerEnded(TeacherUnreachable):
    """The server went away while it was asked this, and again when it was back; or stayed away.

    It may be the request that it does not survive, or another that was under way beside it.

    Attributes:
      is_back: it went away as often as it may, so it comes back; else it stayed away to the end.
    """

    is_back = False


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long a server is waited for.

    Attributes:
      timeout_s: of one attempt with all that belongs to it; connecting has at most 10 s of it.
      deadline_s: of a request with all its attempts.
      max_retries: attempts after the first.
    """

    timeout_s: float
    deadline_s: float
    max_retries: int


@dataclasses.dataclass(frozen=True)
class Reply:
    """Of whatever status, as far as it was read."""

    status: int
    headers: requests.structures.CaseInsensitiveDict
    body: bytes  # perhaps a little more than was wanted, if there was more

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        return f"<{self.packed}>" if self.packed else self.body.decode(errors="replace")

    @property
    def packed(self) -> str:
        """The content encoding; "" if there is none. What is packed stays so: it may be huge."""
        encoding = (self.headers.get("Content-Encoding") or "").strip()
        return "" if encoding.lower() == "identity" else encoding


class Transport:
    """JSON over HTTP(S) to one server; safe to use from several threads.

    Attributes:
      root: the address without "/v1", to which paths are appended.
      retries: attempts so far that were not the first of their request.
      outages: of the failed ones, those after which another server may answer.
    """

    def __init__(self, api_base: str, api_key_env: str, limits: Limits, *, trust_env: bool):
        """Sends nothing yet.

        Args:
          api_base: http or https address, with or without "/v1" at its end.
          api_key_env: name of the environment variable with the key; "": there is none.
          limits: of time and attempts.
          trust_env: take proxies, certificates and ~/.netrc from the environment.

        Raises:
          UserError: an address or a key that cannot be.
        """
        self.root = session.root_of(api_base)
        self.retries = 0
        self.outages = 0
        self._refusals = 0
        self._limits = limits
        self._key = session.read_key(api_key_env)
        self._session = session.open_session(self._key, trust_env=trust_env)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if (
            self._key
            and self.root.lower().startswith("http:")
            and not session.is_loopback(self.root)
        ):
            logging.warning(
                "the key in %s goes to %s over plain http: everyone in between can read it",
                api_key_env,
                self.root,
            )

    def get(self, path: str, *, once: bool = False) -> dict | list:
        """As `post`, without a body."""
        return self._ask(_Question("GET", path, None, _GET_BYTES), once=once)

    def post(
        self,
        path: str,
        body: dict,
        *,
        max_bytes: int,
        most_same: int = 0,
        once: bool = False,
    ) -> dict | list:
        """Asks until there is an answer, waiting longer each time.

        Asked again: no connection, a broken or late answer, one that is no JSON, and the statuses
        408, 409, 429 and 5xx.

        Args:
          path: as "/v1/completions".
          body: anything JSON can hold.
          max_bytes: of the answer.
          most_same: so many times the same 5xx answer are the end of it; 0: the limits alone are.
          once: a single attempt, of a route that the server need not have.

        Raises:
          TeacherRefused: any other status, which would come again.
          WrongAnswer: too long, no JSON to the end, or none as its standard has it.
          TeacherUnreachable: no answer within the limits, or the transport is closed.
          RepeatedServerError: the same 5xx answer `most_same` times in a row.
          ServerEnded: the server went away twice while it was asked this, or once and for good.
        """
        data = json.dumps(body, allow_nan=False).encode()
        question = _Question("POST", path, data, max_bytes)
        return self._ask(question, most_same=most_same, once=once)

    def close(self) -> None:
        """Closes the connections; whoever still waits to ask again gives up."""
        self._closed.set()
        self._session.close()

    def _ask(self, question: "_Question", *, most_same: int = 0, once: bool = False) -> dict | list:
        deadline = time.monotonic() + self._limits.deadline_s
        result = retries.persist(
            lambda: self._attempt(question, deadline),
            max_retries=0 if once else self._limits.max_retries,
            deadline_s=self._limits.deadline_s,
            most_same=most_same,
            most_ended=_MOST_ENDED,
            closed=self._closed,
            before_sleep=self._count,
        )
        if isinstance(result, retries.GaveUp):
            raise self._given_up(self._where(question), result)
        return result

    def _given_up(self, where: str, last: retries.GaveUp) -> GkdjaxError:
        told = (
            f"{where} got no usable answer in {last.seconds:.1f} s; attempts: {last.attempts}; the"
            f" last one: {last.failed.reason}"
        )
        if last.repeated:
            return RepeatedServerError(told)
        if last.ended:
            error = ServerEnded(f"{told}; so often the server went away meanwhile: {last.ended}")
            error.is_back = last.ended == _MOST_ENDED
            return error
        return last.failed.error(told)

    def _count(self, failed: Failed, seconds: float) -> None:
        with self._lock:
            self.retries += 1
            self.outages += failed.server_error is not None or not failed.answered
        logging.log_every_n_seconds(
            logging.WARNING, "%s: %s; trying again in %.1f s", 60, self.root, failed.reason, seconds
        )

    def _attempt(self, question: "_Question", deadline: float) -> dict | list | Failed:
        if self._closed.is_set():
            return Failed("not made, the transport is closed")
        seconds = min(self._limits.timeout_s, max(deadline - time.monotonic(), 1e-3))
        outer = sys.exception()
        try:
            outcome = self._exchange(question, seconds)
        except _BROKEN as error:
            outcome = self._broken(question, _innermost(error, outer), seconds)
        # Not raised above, where it would have those as context that hold the request's headers.
        if isinstance(outcome, TeacherRefused):
            raise outcome
        if isinstance(outcome, Reply):
            outcome = self._judged(question, outcome)
        if isinstance(outcome, Failed):
            return dataclasses.replace(outcome, refusals=self._refusals)
        return outcome

    def _exchange(self, question: "_Question", seconds: float) -> Reply:
        with self._session.request(
            question.method,
            self.root + question.path,
            data=question.data,
            headers={"Content-Type": "application/json"} if question.data else None,
            timeout=session.attempt_timeout(seconds),
            stream=True,
        ) as response:
            most = question.max_bytes if response.status_code < 300 else _ERROR_BYTES
            body = read_body(response.raw, most)
            return Reply(response.status_code, response.headers, body)

    def _broken(
        self, question: "_Question", error: BaseException, seconds: float
    ) -> Failed | TeacherRefused:
        """Of an attempt without a whole answer."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return TeacherRefused(
                f"{self._where(question)}: the server's certificate does not hold:"
                f" {self._quoted(error.verify_message, 300)}"
            )
        if isinstance(error, TimeoutError):
            return Failed(f"no whole answer within {seconds:.3g} s")
        away = isinstance(error, ConnectionRefusedError | socket.gaierror)
        with self._lock:
            self._refusals += away
        return Failed(self._quoted(f"{type(error).__name__}: {error}", 300), away=away)

    def _judged(self, question: "_Question", reply: Reply) -> dict | list | Failed:
        if reply.is_success:
            return self._parsed(question, reply)
        where = self._where(question)
        if reply.status in _AGAIN or (reply.status >= 500 and reply.status not in _NEVER):
            return Failed(
                f"status {reply.status}: {self._quoted(reply.text, 300)}",
                answered=True,
                least_wait_s=retries.retry_after(reply.headers.get("Retry-After")),
                server_error=(reply.status, reply.body) if reply.status >= 500 else None,
            )
        if 300 <= reply.status < 400:
            target = redirected_to(self.root + question.path, reply.headers.get("Location"))
            raise TeacherRefused(
                f"{where} is redirected to {self._quoted(target, 300)}, and redirects are not"
                " followed; if that is the server, change config.teacher.api_base"
            )
        raise TeacherRefused(
            f"{where} was refused with status {reply.status}:"
            f" {self._quoted(message_of(reply.text), 500)}{_HINTS.get(reply.status) or ''}"
        )

    def _parsed(self, question: "_Question", reply: Reply) -> dict | list | Failed:
        def wrong(what: str) -> WrongAnswer:
            return WrongAnswer(f"{self._where(question)}: the answer {self._quoted(what, 200)}")

        if reply.packed:
            raise wrong(f"has the Content-Encoding {reply.packed}, which was not asked for")
        if len(reply.body) > question.max_bytes:
            raise wrong(f"has more than {question.max_bytes} bytes")
        try:
            return strict_json.parse(reply.body, wrong)
        except strict_json.NotJson:
            if question.data is None:  # it is no server of this API: another time it is none either
                raise wrong(f"is no JSON: {reply.text}") from None
            return Failed(f"no JSON: {self._quoted(reply.text, 200)}", WrongAnswer)

    def _where(self, question: "_Question") -> str:
        return f"{self.root}: {question.method} {question.path}"

    def _quoted(self, text: str, most: int) -> str:
        """One line of at most so many printable characters, without the key or parts of it."""
        if self._key:
            text = without_key(text, self._key)
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= most else text[:most] + "..."


@dataclasses.dataclass(frozen=True)
class _Question:
    method: str
    path: str
    data: bytes | None
    max_bytes: int  # of the answer


def _innermost(error: BaseException, outer: BaseException | None) -> BaseException:
    """What went wrong at first: the later ones quote addresses of objects.

    `outer` is what the caller was handling already; it is the context of all of them.
    """
    while (inner := error.__cause__ or error.__context__) not in (None, outer):
        error = inner
    return error


def read_body(raw: urllib3.HTTPResponse, most: int) -> bytes:
    """The body as it was sent, or a little more than `most` bytes of it."""
    parts, size = [], 0
    for part in raw.stream(2**16, decode_content=False):
        parts.append(part)
        size += len(part)
        if size > most:
            break
    return b"".join(parts)


def without_key(text: str, key: str) -> str:
    """Servers like to quote a wrong key, or its head and tail."""
    for n in range(len(key), min(8, len(key)) - 1, -1):
        text = text.replace(key[:n], "***").replace(key[-n:], "***")
    return text


def redirected_to(url: str, location: str | None) -> str:
    """Where a redirect points to, without what could be a secret."""
    try:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(url, location or ""))
    except ValueError:
        return "what is no address"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def message_of(text: str) -> str:
    """Of an error's body: the sentence for people, or all of it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found)
