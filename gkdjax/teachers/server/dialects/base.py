"""What a dialect is: how a kind of server is asked, and how its answers read.

A dialect does no I/O. It builds the bodies of requests and reads answers that are parsed JSON, and
whatever is wrong with an answer is a `WrongAnswer`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from gkdjax.teachers.server.answers import Request, SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.transport.client import Transport
from gkdjax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Call:
    """A request as it is sent: POST `body`, as JSON, to `path` below the server's address."""

    path: str
    body: dict[str, Any]
    max_bytes: int  # of the answer; a longer one is no answer to this


class Dialect(Protocol):
    """How a kind of server is asked for scores and samples.

    A class of dialects is called with `(model, vocab_size, tokenizer)`.

    Attributes:
      model: the name by which the server knows the model.
      vocab_size: the ids that student and teacher have in common are below it.
      rows_per_request: whether one score request may hold several rows.
      by_messages: a sample request says the messages of the prompt, not its ids; and there is no
        score request.
    """

    @property
    def model(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def rows_per_request(self) -> bool: ...

    @property
    def by_messages(self) -> bool: ...

    def score(self, requests: Sequence[ScoreRequest]) -> Call:
        """One request for all these rows.

        Raises:
          ValueError: several rows where one is the most; ids or positions of a row are not what
            `ScoreRequest` says, or an id is outside the vocabulary.
          NotImplementedError: the server scores nothing.
        """
        ...

    def read_scores(self, answer: Any, requests: Sequence[ScoreRequest]) -> list[TeacherAnswer]:
        """One answer a row, in the order of `requests`.

        Raises:
          WrongAnswer: it cannot be the answer to these requests; the row and field are named.
        """
        ...

    def sample(self, request: SampleRequest) -> Call:
        """A request for one response.

        Raises:
          ValueError: as `score`; the server cannot draw like that.
        """
        ...

    def read_sample(self, answer: Any, request: SampleRequest) -> TeacherAnswer:
        """The response; lost if it is empty, or holds a token that is no id of ours.

        Raises:
          WrongAnswer: as `read_scores`.
        """
        ...


_KIB = 1024  # bytes; an entry of a few dozen characters is far below
_MIB = 1024 * _KIB


def call(path: str, body: dict[str, Any], *, tokens: int, top_k: int) -> Call:
    """A `Call` whose answer has about `tokens` rows of K entries."""
    return Call(path, body, _MIB + tokens * (top_k + 2) * _KIB)


def check_scores(requests: Sequence[ScoreRequest], dialect: Dialect) -> None:
    """Raises ValueError unless the dialect can send the requests as one."""
    if not requests or (len(requests) > 1 and not dialect.rows_per_request):
        raise ValueError(f"{len(requests)} rows do not go into one request")
    for request in requests:
        _check_ids(request, dialect.vocab_size)
        at, length = np.asarray(request.at), len(request.ids)
        inside = len(at) > 0 and at[0] >= 0 and at[-1] + 1 < length
        if not inside or (np.diff(at) <= 0).any():
            raise ValueError(
                f"{request.name}: the predicting positions must rise, from 0 to {length - 2} at"
                f" most, got {at.tolist()}"
            )


def check_sample(request: SampleRequest, dialect: Dialect) -> None:
    """Raises ValueError unless the dialect can send the request."""
    _check_ids(request, dialect.vocab_size)


def _check_ids(request: ScoreRequest | SampleRequest, vocab_size: int) -> None:
    ids = np.asarray(request.ids)
    if not len(ids) or request.top_k < 1:
        raise ValueError(f"{request.name}: {len(ids)} ids and top_k={request.top_k}, both >= 1")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):  # some servers do not survive such an id
        raise UserError(
            f"{request.name}: token id {outside[0]} is not among the {vocab_size} that student and"
            " teacher have in common; give the teacher a tokenizer of the same vocabulary"
        )


def exchange(
    transport: Transport, dialect: Dialect, requests: Sequence[Request]
) -> list[TeacherAnswer]:
    """The answers, in the order of the requests.

    Args:
      transport: to the server.
      dialect: that it speaks.
      requests: one; or several to score, if the dialect takes them together.

    Raises:
      NotImplementedError: the dialect scores nothing.
      And what `Transport.post` and the dialect's readers raise.
    """
    scored = isinstance(requests[0], ScoreRequest)
    call = dialect.score(requests) if scored else dialect.sample(requests[0])
    # Of several rows one may be what the server trips over: they can be asked for one by one.
    most_same = 2 if len(requests) > 1 else 0
    said = transport.post(call.path, call.body, max_bytes=call.max_bytes, most_same=most_same)
    if scored:
        return dialect.read_scores(said, requests)
    return [dialect.read_sample(said, requests[0])]
