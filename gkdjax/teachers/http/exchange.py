"""One exchange with a server: requests out, their answers in."""

from collections.abc import Sequence

from gkdjax.teachers.http.answers import Answer, Request, ScoreRequest
from gkdjax.teachers.http.dialects.dialect import Dialect
from gkdjax.teachers.http.wire.transport import Transport


def exchange(transport: Transport, dialect: Dialect, requests: Sequence[Request]) -> list[Answer]:
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
