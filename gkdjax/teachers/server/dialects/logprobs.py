"""What a server reports about each token, and how that becomes a `TeacherAnswer`.

A key is what a server writes for a token: an id, bytes, or a string; "token_id:17" is the id 17.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from gkdjax.losses.topk import EPS
from gkdjax.teachers.server import answers
from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.json_fields import JsonField
from gkdjax.utils.errors import WrongAnswer

Key = int | bytes | str

_NUMBERED = re.compile("token_id:(0|[1-9][0-9]{0,8})")
_MOST_HIDDEN = 0.1  # probability of tokens that an answer leaves out because of their text
_SEVERAL = 4  # tokens; fewer may all lack an entry by chance
_LEAST = -9999.0  # nats; what servers write for -inf, which JSON does not have
_MOST_MASS = 1.0 + 1e-3  # of K probabilities; more cannot be rounding
_MOST_BEYOND = 0.01  # probability; the rows of an embedding that no token uses have far less
_ROUNDING = 1e-3  # nats; a logprob is at most 0, but for rounding


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """The logprob of one token, and those of the most probable tokens in its place."""

    where: str  # path in the answer, for errors
    key: Key
    logprob: float
    top: Sequence[tuple[Key, float]]  # the token itself may stand beside the best K
    by_key: bool = False  # `top` was an object, which keeps one of several tokens with one text


def id_in(key: Key) -> int | None:
    """The id that a key states, as a number or in words."""
    if isinstance(key, int):
        return key
    found = _NUMBERED.fullmatch(key) if isinstance(key, str) else None
    return int(found[1]) if found else None


class LogprobsReader:
    """Checks what a server reports about tokens; a base of all dialects.

    Whatever cannot be is a `WrongAnswer` that names the row and the field.
    """

    vocab_size: int  # student and teacher have the ids below it in common
    by_id = True  # tokens come as ids

    def id_of(self, key: Key) -> int | None:
        """The id of what the server writes for a token; None if it names none."""
        return id_in(key)

    def names(self, key: str, i: int) -> bool:
        """Whether the server would write this for this id."""
        return id_in(key) == i

    def scored(self, tokens: Sequence[TokenLogprobs], request: ScoreRequest) -> TeacherAnswer:
        """The answer to a score request, from what is reported about its targets."""
        self._check_counts(tokens, request.top_k)
        for token in tokens:
            if hidden := self._hidden(token, request.top_k):
                raise WrongAnswer(
                    f"{hidden}: use teacher.backend='vllm' or 'sglang' where one of them serves"
                    " it: they name tokens by id; or a smaller teacher.top_k"
                )
        return self.collect(tokens, request.target_ids.tolist(), request)

    def sampled(
        self,
        tokens: Sequence[TokenLogprobs],
        ids: Sequence[int | None],
        request: SampleRequest,
        finish_reason: JsonField,
        stated: JsonField | None,
    ) -> TeacherAnswer:
        """The answer to a sample request, from what is reported about the sampled tokens.

        What follows a stop id does not belong to the response: not every server knows where to
        stop. A response whose stop id is not shown is not finished: it has no end-of-turn target.
        A token has the id None if it has none here; `stated` tokens were written, by the server.
        """
        most, shown = request.sampling.max_new_tokens, len(tokens)
        self._check_counts(tokens, request.top_k)
        if stated is not None and stated.whole() > shown + 1:  # a stop id may be hidden
            raise stated.wrong(
                f"is {stated.value}, and the answer shows {shown} tokens: a teacher must not think"
                " in secret; switch that off"
            )
        written = shown if stated is None or self.by_id else max(shown, stated.value)
        if finish_reason.value == "length" and written < most:
            raise finish_reason.wrong(
                f'is "length" after {written} tokens, and {most} were asked for after a prompt of'
                f" {len(request.ids)}: the server cuts answers at a limit of its own, its context's"
                " or another. Serve the model with a longer context (vLLM: --max-model-len), or set"
                f" rollout.max_new_tokens (and eval.max_new_tokens) to {max(written, 1)} or less"
            )
        if shown > most:
            raise WrongAnswer(f"{request.name}: {shown} tokens were drawn, and {most} asked for")
        stops = [j for j, i in enumerate(ids) if i in request.stop_ids]
        length = stops[0] + 1 if stops else shown
        tokens, ids = tokens[:length], ids[:length]
        for token, i in zip(tokens, ids, strict=True):
            unreadable = self._hidden(token, request.top_k)
            if i is None or not 0 <= i < self.vocab_size:
                unreadable = f"{token.where} is of {token.key!r}, which names no id here"
            if unreadable:
                pairs = zip(tokens, ids, strict=True)
                unmapped = sum(self._best(*pair, request.top_k)[1] for pair in pairs)
                return answers.lost_sample(request.top_k, unmapped, unreadable)
        if not tokens:
            return answers.lost_sample(request.top_k)
        return self.collect(tokens, ids, request, finished=bool(stops))

    def collect(
        self,
        tokens: Sequence[TokenLogprobs],
        ids: Sequence[int],
        request: answers.Request,
        *,
        finished: bool = False,
    ) -> TeacherAnswer:
        """What is reported about the targets `ids`, checked.

        The best K entries are kept. Those without an id below `vocab_size` are dropped and counted:
        a larger embedding has them beside the same tokenizer, with next to no mass.
        """
        n, K, V = len(tokens), request.top_k, self.vocab_size
        top_ids, top_logprobs = np.zeros((n, K), np.int32), np.full((n, K), -np.inf, np.float32)
        tail, unmapped = np.zeros(n, np.float32), 0
        for j, (token, target) in enumerate(zip(tokens, ids, strict=True)):
            where = f"{request.name}, target {j} of {n}"
            if not 0 <= target < V:
                raise WrongAnswer(f"{where}: id {target} is none of ours")
            best, nameless = self._best(token, target, K)
            best = _checked(best, target, token.logprob, K, where)
            ranked = sorted(best.items(), key=lambda entry: (-entry[1], entry[0]))[:K]
            ours = [(i, logprob) for i, logprob in ranked if 0 <= i < V]
            for i, logprob in ranked:
                if not 0 <= i < V and np.exp(logprob) > _MOST_BEYOND:
                    raise WrongAnswer(
                        f"{where}: the teacher gives a probability of {np.exp(logprob):.3f} to id"
                        f" {i}, which is not below {V}: its vocabulary is another one"
                    )
            unmapped += nameless + len(ranked) - len(ours)
            if ours:
                top_ids[j, : len(ours)], top_logprobs[j, : len(ours)] = zip(*ours, strict=True)
            # In float64, and never log(0): what float32 numbers leave may be nothing, or less.
            mass = float(np.sum(np.exp([logprob for _, logprob in ours])))
            tail[j] = np.log(max(1.0 - mass, EPS))
        own = np.asarray([_at_most_0(token.logprob) for token in tokens], np.float32)
        arrays = np.asarray(ids, np.int32), own, top_ids, top_logprobs, tail
        return TeacherAnswer(*arrays, finished=finished, unmapped=unmapped)

    def _check_counts(self, tokens: Sequence[TokenLogprobs], top_k: int) -> None:
        """Each token must come with the best K, or with one entry more, the token itself.

        Where tokens are named by text, one of several tokens must: entries may share a text, and
        some servers leave one out now and then.
        """
        few = min(top_k, self.vocab_size)
        for token in tokens:
            count = len(token.top)
            if count > top_k + 1 or (self.by_id and count < few):
                raise WrongAnswer(
                    f"{token.where} lists {count} most probable tokens, and {top_k} were asked for"
                )
            if self.by_id and any(id_in(key) is None for key, _ in token.top):
                raise WrongAnswer(
                    f"{token.where} names tokens by their text, and ids were asked for"
                )
        most = max((len(token.top) for token in tokens), default=0)
        if most < few and len(tokens) >= _SEVERAL:
            raise WrongAnswer(
                f"{tokens[0].where} and all others list {most} most probable tokens or fewer, and"
                f" {top_k} were asked for: set teacher.top_k={most}"
            )

    def _missing(self, token: TokenLogprobs, top_k: int) -> int:
        """How many of the best K are not there because others have the same text."""
        if self.by_id or not token.by_key or all(id_in(key) is not None for key, _ in token.top):
            return 0
        return max(0, min(top_k, self.vocab_size) - len(token.top))

    def _hidden(self, token: TokenLogprobs, top_k: int) -> str:
        """A sentence about those, where their probability may matter; else ""."""
        if not self._missing(token, top_k):
            return ""
        rest = 1.0 - sum(math.exp(min(logprob, 0.0)) for _, logprob in token.top)
        if rest <= _MOST_HIDDEN:
            return ""
        return (
            f"{token.where} has {len(token.top)} texts for {top_k} tokens, so several have one"
            f" text, and up to {rest:.2f} of the probability is theirs"
        )

    def _best(
        self, token: TokenLogprobs, target_id: int | None, top_k: int
    ) -> tuple[dict[int, float], int]:
        """(id -> logprob of the most probable tokens, the number of those that name no id).

        Two entries with the text of one id name none: a server may write a part of a character as
        the whole that it completes.
        """
        found: dict[int | None, list[float]] = collections.defaultdict(list)
        for key, logprob in token.top:
            # Text that several ids share still is the target's if its logprob is, too.
            is_target = key == token.key and logprob == token.logprob
            i = target_id if is_target else self.id_of(key)
            found[i].append(logprob)
            if len(found[i]) > 1 and id_in(key) is not None:
                raise WrongAnswer(
                    f"{token.where} lists id {i} twice among the most probable tokens"
                )
        best = {i: each[0] for i, each in found.items() if i is not None and len(each) == 1}
        return best, len(token.top) - len(best) + self._missing(token, top_k)


def _at_most_0(logprob: float) -> float:
    return -np.inf if logprob <= _LEAST else min(logprob, 0.0)


def _checked(
    best: dict[int, float], target: int, logprob: float, top_k: int, where: str
) -> dict[int, float]:
    """`best` without what stands for -inf and without rounding above 0."""
    for i, value in ((target, logprob), *best.items()):
        if math.isnan(value) or value == math.inf:
            raise WrongAnswer(f"{where}: the logprob of id {i} is {value}")
        if value > _ROUNDING:
            raise WrongAnswer(f"{where}: the logprob of id {i} is {value}, a probability above 1")
    in_best = best.get(target)
    if in_best is not None and abs(_at_most_0(in_best) - _at_most_0(logprob)) > _ROUNDING:
        raise WrongAnswer(
            f"{where}: id {target} is the target and has the logprob {logprob}, but {in_best} among"
            " the best"
        )
    best = {i: min(value, 0.0) for i, value in best.items() if value > _LEAST}
    mass = float(np.sum(np.exp(list(best.values()))))
    if mass > _MOST_MASS:
        raise WrongAnswer(f"{where}: {len(best)} tokens have a probability of {mass:.4f} together")
    left_out = target not in best and len(best) >= top_k
    if left_out and logprob > min(best.values()) + _ROUNDING:
        raise WrongAnswer(
            f"{where}: id {target} is the target, has the logprob {logprob:.4f}, and is not among"
            f" the best {len(best)}, of which the last has {min(best.values()):.4f}"
        )
    return best
