"""What a server says of one token, and how that becomes a `TeacherAnswer`, in any form.

A key is what a server writes for a token: an id, bytes, or a string; "token_id:17" is an id.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from gkdjax.teachers.server.answers import (
    Position,
    SampleRequest,
    TeacherAnswer,
    collect,
    lost_sample,
)
from gkdjax.teachers.server.dialects.json_fields import JsonField
from gkdjax.utils.errors import WrongAnswer

Key = int | bytes | str

_MOST_HIDDEN = 0.1  # probability of tokens that an answer leaves out because of their text
_UNKNOWN = -1  # in place of an id
_NUMBERED = re.compile("token_id:(0|[1-9][0-9]{0,8})")


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Of one token."""

    where: str  # in the answer
    key: Key
    logprob: float
    top: Sequence[tuple[Key, float]]
    by_key: bool = False  # `top` was an object: of two tokens with one key it has one

    def collapsed(self, top_k: int, vocab_size: int) -> int:
        """How many of the best K tokens are gone because others have the same text."""
        by_text = self.by_key and any(id_in(key) is None for key, _ in self.top)
        return max(0, min(top_k, vocab_size) - len(self.top)) if by_text else 0

    def hidden(self, top_k: int, vocab_size: int) -> str:
        """What is wrong if those may have a probability that matters; "" if they do not."""
        gone = self.collapsed(top_k, vocab_size)
        rest = 1.0 - sum(math.exp(min(logprob, 0.0)) for _, logprob in self.top)
        if not gone or rest <= _MOST_HIDDEN:
            return ""
        return (
            f"{self.where} has {len(self.top)} texts for {top_k} tokens, so several have one text,"
            f" and up to {rest:.2f} of the probability is theirs"
        )


def id_in(key: Key) -> int | None:
    """The id that a key states, as an id or in words."""
    if isinstance(key, int):
        return key
    found = _NUMBERED.fullmatch(key) if isinstance(key, str) else None
    return int(found[1]) if found else None


def position(
    said: TokenLogprobs, target_id: int | None, id_of: Callable[[Key], int | None], gone: int = 0
) -> Position:
    """With the keys as ids.

    Two entries whose text is that of one id are none of ours: a server may write a part of a
    character as what it completes.

    Args:
      said: of one token.
      target_id: the token, if it is known which.
      id_of: the id of a key, None if it names none.
      gone: entries that are missing, see `TokenLogprobs.collapsed`.

    Raises:
      WrongAnswer: an id that is stated as such has two logprobs.
    """
    found: dict[int | None, list[float]] = collections.defaultdict(list)
    for key, logprob in said.top:
        # Text that several ids share still is the target's if both its text and logprob are.
        of_target = key == said.key and logprob == said.logprob
        i = target_id if of_target else id_of(key)
        found[i].append(logprob)
        if len(found[i]) > 1 and id_in(key) is not None:
            raise WrongAnswer(f"{said.where} lists id {i} twice among the most probable tokens")
    best = {i: each[0] for i, each in found.items() if i is not None and len(each) == 1}
    target = _UNKNOWN if target_id is None else target_id
    return Position(target, said.logprob, best, len(said.top) - len(best) + gone)


def check_counts(
    said: Sequence[TokenLogprobs], top_k: int, vocab_size: int, *, by_id: bool
) -> None:
    """Every token must come with the best K, or with one more, the token itself.

    Args:
      said: of the tokens.
      top_k: K.
      vocab_size: a server has no more where it has no more tokens.
      by_id: the keys must be ids, and all must have enough; else, of several tokens, one has to:
        two entries may share a text (`TokenLogprobs.collapsed`), and some servers leave one out now
        and then.

    Raises:
      WrongAnswer: there are too few, so the server has a limit of its own, or too many; or keys
        are not ids.
    """
    few = min(top_k, vocab_size)
    for one in said:
        if len(one.top) > top_k + 1 or (by_id and len(one.top) < few):
            raise WrongAnswer(
                f"{one.where} lists {len(one.top)} most probable tokens, and {top_k} were asked for"
            )
        if by_id and not all(id_in(key) is not None for key, _ in one.top):
            raise WrongAnswer(f"{one.where} names tokens by their text, and ids were asked for")
    most = max((len(one.top) for one in said), default=0)
    if most < few and len(said) >= _SEVERAL:
        raise WrongAnswer(
            f"{said[0].where} and all others list {most} most probable tokens or fewer, and"
            f" {top_k} were asked for: set teacher.top_k={most}"
        )


_SEVERAL = 4


def response(
    said: Sequence[TokenLogprobs],
    ids: Sequence[int | None],
    request: SampleRequest,
    *,
    vocab_size: int,
    id_of: Callable[[Key], int | None],
) -> TeacherAnswer:
    """The answer to a sample request.

    What follows a stop id is no part of the response: not every server is told where to stop.
    A server that stops and does not say at which id leaves a response that is not finished, so it
    has no end-of-turn target.

    Args:
      said: of the tokens drawn.
      ids: of them; None: no id of ours.
      request: what was asked.
      vocab_size: an id that is not below it is none of ours.
      id_of: the id of a key, None if it names none.
    """
    most = request.sampling.max_new_tokens
    if len(said) > most:
        raise WrongAnswer(f"{request.name}: {len(said)} tokens were drawn, and {most} asked for")
    stops = [j for j, i in enumerate(ids) if i in request.stop_ids]
    length = stops[0] + 1 if stops else len(ids)
    positions = [
        position(one, i, id_of, one.collapsed(request.top_k, vocab_size))
        for one, i in zip(said[:length], ids[:length], strict=True)
    ]
    unmapped = sum(each.unmapped for each in positions)
    for one, each in zip(said, positions, strict=False):
        if not 0 <= each.target_id < vocab_size:
            what = f"{one.where} is of {one.key!r}, which names no id here"
            return lost_sample(request.top_k, unmapped, what)
        if hidden := one.hidden(request.top_k, vocab_size):
            return lost_sample(request.top_k, unmapped, hidden)
    if not positions:
        return lost_sample(request.top_k, 0)
    return collect(
        positions,
        top_k=request.top_k,
        vocab_size=vocab_size,
        name=request.name,
        finished=bool(stops),
    )


_LOST = ("content_filter", "tool_calls", "function_call")  # another seed may bring text
_BROKEN = ("abort", "error")


def is_lost(finish_reason: JsonField) -> bool:
    """Whether what was drawn is no response.

    Raises:
      WrongAnswer: the server has not done what it was asked for.
    """
    if finish_reason.text() in _BROKEN:
        raise finish_reason.wrong(f"is {finish_reason.value!r}: the server gave up on the request")
    return finish_reason.value in _LOST


def check_not_cut(finish_reason: JsonField, written: int, request: SampleRequest) -> None:
    """Checks that who stops at a length stops at the one that was asked for.

    Args:
      finish_reason: why the server stopped.
      written: tokens that it drew.
      request: what was asked.

    Raises:
      WrongAnswer: it has a limit of its own, and says nothing of it.
    """
    most = request.sampling.max_new_tokens
    if finish_reason.text() == "length" and written < most:
        raise finish_reason.wrong(
            f'is "length" after {written} tokens, and {most} were asked for after a prompt of'
            f" {len(request.ids)}: the server cuts answers at a limit of its own, its context's or"
            f" another. Serve the model with a longer context (vLLM: --max-model-len), or set"
            f" rollout.max_new_tokens (and eval.max_new_tokens) to {max(written, 1)} or less"
        )


def check_read(read: JsonField | None, wanted: int) -> None:
    """Checks the count of prompt tokens, where the server states one.

    Raises:
      WrongAnswer: the server has not read what was sent.
    """
    if read is not None and read.whole() != wanted:
        raise read.wrong(
            f"is {read.value}, and {wanted} token ids were sent: the server has to read them as"
            " they are, without a token before or after"
        )


def check_written(written: JsonField | None, shown: int) -> None:
    """Checks the count of tokens drawn, where the server states one; a stop id may be hidden.

    Raises:
      WrongAnswer: what it shows depends on text that it does not.
    """
    if written is not None and written.whole() > shown + 1:
        raise written.wrong(
            f"is {written.value}, and the answer shows {shown} tokens: a teacher must not think in"
            " secret; switch that off"
        )
