"""When a failed attempt is made again, and how long is waited before."""

import dataclasses
import email.utils
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from gkdjax.utils.errors import GkdjaxError, TeacherUnreachable

Answer = TypeVar("Answer")

# The number of a request, the time: what tells an answer from the same one a moment later.
_OF_ITS_OWN = re.compile(rb"\w*\d\w*|\b[a-fA-F]{4,}\b")
_LONGEST_S = 60.0  # between two attempts; a server's Retry-After may be hours
_BACKOFF = tenacity.wait_random_exponential(multiplier=1.0, min=0.25, max=_LONGEST_S)


@dataclasses.dataclass(frozen=True)
class Failed:
    """What an attempt returns that may go better another time."""

    reason: str
    error: type[GkdjaxError] = TeacherUnreachable  # if no other attempt is made
    answered: bool = False  # there was a whole answer
    least_wait_s: float = 0.0  # the server's Retry-After
    server_error: tuple[int, bytes] | None = None  # a 5xx status and its body
    away: bool = False  # nobody listens at the address
    refusals: int = 0  # so often nobody listened until now, whoever asked


@dataclasses.dataclass(frozen=True)
class GaveUp:
    """After the last failure."""

    failed: Failed
    attempts: int
    seconds: float
    repeated: bool  # it came as often as was to be the end of it, and is a 5xx answer
    ended: int  # so often the server went away while this was asked


def persist(
    attempt: Callable[[], Answer | Failed],
    *,
    max_retries: int,
    deadline_s: float,
    most_same: int,
    most_ended: int,
    closed: threading.Event,
    before_sleep: Callable[[Failed, float], None],
) -> Answer | GaveUp:
    """Calls `attempt` until it returns something else than a `Failed`, or hope is lost.

    Failures are returned and not raised, so that no error drags a chain of others behind it:
    those of the HTTP library hold the request with its headers.

    Args:
      attempt: what it raises is raised.
      max_retries: attempts after the first.
      deadline_s: no attempt begins later than that after the first.
      most_same: give up as soon as so many 5xx answers in a row are the same; 0: do not count.
      most_ended: give up as soon as the server has gone away so often while this was asked; 0: do
        not count.
      closed: ends the waiting.
      before_sleep: called with the failure and the seconds until the next attempt.
    """
    same, ended = _Same(), _Ended()

    def gave_up(state: tenacity.RetryCallState) -> GaveUp:
        repeated = 0 < most_same <= same.in_a_row
        seconds = state.seconds_since_start
        failed = state.outcome.result()
        return GaveUp(failed, state.attempt_number, seconds, repeated, ended.times)

    return tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda result: isinstance(result, Failed)),
        wait=_wait,
        stop=tenacity.stop_any(
            lambda state: 0 < most_same <= same.count(state),
            lambda state: 0 < most_ended <= ended.count(state),
            tenacity.stop_after_attempt(max_retries + 1),
            tenacity.stop_before_delay(deadline_s),
            tenacity.stop_when_event_set(closed),
        ),
        sleep=lambda seconds: pause(closed, seconds),
        before_sleep=lambda state: before_sleep(state.outcome.result(), state.upcoming_sleep),
        retry_error_callback=gave_up,
    )(attempt)


def pause(closed: threading.Event, seconds: float) -> None:
    """All waiting between attempts is done here."""
    closed.wait(seconds)


def retry_after(header: str | None) -> float:
    """Seconds from a Retry-After header: a number of them, or a date; 0 if it is neither."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?\s*", header):
        seconds = float(header)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, IndexError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_S)


def _wait(state: tenacity.RetryCallState) -> float:
    return max(_BACKOFF(state), state.outcome.result().least_wait_s)


class _Same:
    """Of the failures of one request: how often the last 5xx answer came in a row.

    Words with a digit in them do not count: the number of a request, or the time.
    """

    def __init__(self):
        self.in_a_row = 0
        self._last = None

    def count(self, state: tenacity.RetryCallState) -> int:
        last, self._last = self._last, state.outcome.result().server_error
        if self._last is not None:
            status, body = self._last
            self._last = status, _OF_ITS_OWN.sub(b"", body)
        if self._last is None:
            self.in_a_row = 0
        else:
            self.in_a_row = self.in_a_row + 1 if self._last == last else 1
        return self.in_a_row


class _Ended:
    """Of the failures of one request: how often the server was there, failed, and then was not.

    Whoever saw that it was not there: it may be back before this request is made again.
    """

    def __init__(self):
        self.times = 0
        self._last: Failed | None = None

    def count(self, state: tenacity.RetryCallState) -> int:
        last, self._last = self._last, state.outcome.result()
        if last is not None and not last.away:
            self.times += self._last.refusals > last.refusals
        return self.times
