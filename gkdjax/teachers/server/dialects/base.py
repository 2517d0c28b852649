"""What a dialect is: how one kind of server is asked, and how its answers are read."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from gkdjax.teachers.server.answers import Request, SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.dialects.logprobs import LogprobsReader
from gkdjax.teachers.server.json_fields import JsonField
from gkdjax.utils.errors import UserError

_KIB = 1024  # bytes; an entry of a few dozen characters is far below


@dataclasses.dataclass(frozen=True)
class Call:
    """A request as it is sent: POST `body`, as JSON, to `path` below the server's address."""

    path: str
    body: dict[str, Any]
    tokens: int  # that the answer is about
    top_k: int  # entries for each of them

    @property
    def max_bytes(self) -> int:
        """No answer to this is longer."""
        return _KIB * (_KIB + self.tokens * (self.top_k + 2))


@dataclasses.dataclass(frozen=True)
class Dialect(LogprobsReader, abc.ABC):
    """Builds requests for scores and samples and reads the answers; does no I/O."""

    model: str  # the server's name for it
    vocab_size: int  # see `LogprobsReader`
    tokenizer: Any = None  # the teacher's, for dialects in which tokens come as text
    rows_per_request: ClassVar[bool] = False  # one score request may hold several rows
    by_messages: ClassVar[bool] = False  # sample requests hold messages, not ids; none scores

    @abc.abstractmethod
    def score(self, *requests: ScoreRequest) -> Call:
        """A call for these rows; NotImplementedError if the server scores nothing."""

    @abc.abstractmethod
    def read_scores(self, root: JsonField, *requests: ScoreRequest) -> list[TeacherAnswer]:
        """An answer for each row."""

    @abc.abstractmethod
    def sample(self, request: SampleRequest) -> Call:
        """A call for one response; UserError if the server cannot sample like that."""

    @abc.abstractmethod
    def read_sample(self, root: JsonField, request: SampleRequest) -> TeacherAnswer:
        """The response; lost if it is empty, or a token of it has no id here."""


def check(requests: Sequence[Request], dialect: Dialect) -> None:
    """Raises ValueError or UserError unless the dialect can send the requests together."""
    if not requests or (len(requests) > 1 and not dialect.rows_per_request):
        raise ValueError(f"{len(requests)} rows do not go into one request")
    for request in requests:
        ids, name = np.asarray(request.ids), request.name
        if not len(ids) or request.top_k < 1:
            raise ValueError(f"{name}: {len(ids)} ids and top_k={request.top_k}, both >= 1")
        outside = ids[(ids < 0) | (ids >= dialect.vocab_size)]
        if len(outside):  # some servers do not survive such an id
            raise UserError(
                f"{name}: token id {outside[0]} is not among the {dialect.vocab_size} that student"
                " and teacher have in common; give the teacher a tokenizer of the same vocabulary"
            )
        if isinstance(request, ScoreRequest):
            at = np.asarray(request.at)
            inside = len(at) > 0 and at[0] >= 0 and at[-1] + 1 < len(ids)
            if not inside or (np.diff(at) <= 0).any():
                raise ValueError(
                    f"{name}: the predicting positions must rise, from 0 to {len(ids) - 2} at most,"
                    f" got {at.tolist()}"
                )


def is_lost(finish_reason: JsonField) -> bool:
    """Whether the sampled tokens are no response; another seed may bring one."""
    if finish_reason.text() in ("abort", "error"):
        raise finish_reason.wrong(f"is {finish_reason.value!r}: the server gave up on the request")
    return finish_reason.value in ("content_filter", "tool_calls", "function_call")


def check_read(read: JsonField | None, sent: int) -> None:
    """Raises WrongAnswer if the server states another number of prompt tokens than were sent."""
    if read is not None and read.whole() != sent:
        raise read.wrong(
            f"is {read.value}, and {sent} token ids were sent: the server has to read them as they"
            " are, without a token before or after"
        )
