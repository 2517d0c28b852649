"""Finds each message in a rendered conversation, and what the template left out.

A template is a program, so a conversation is rendered twice: as it is, and with a placeholder for
each content. The text between the placeholders is the template's own; the two renderings must fit
together to the character, or the row is refused. That holds for templates that trim, that fold the
system message into the first user turn or treat the last turn differently, and it finds a message
that is dropped. Templates that look for `<think>` blocks in contents do not fit so: for them the
tags stay, and the text between the tags has the placeholders.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gkdjax.types import Example, Message

PLACEHOLDER = re.compile(r"gkdjaxcontent(\d+)end")  # no template trims, escapes or splits it
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a message for its thought
_THOUGHT_END = "</think>"
_TAGS = re.compile(r"(</?(?:think|tool_call|tool_response)>)")  # templates look for these


class Spans(NamedTuple):
    """Lists of one entry a message."""

    at: list[tuple[int, int] | None]  # (start, end) of its content in the text; None: it has none
    exact: list[bool]  # the content stands there unchanged, up to white space at its ends
    lost: list[bool]  # the template left its thought out


class Misfit(Exception):
    """The two renderings do not fit together."""

    def __init__(self, dropped: int | None = None):
        super().__init__()
        self.dropped = dropped  # the message that is missing; None: contents are changed


class _Part(NamedTuple):
    message: int
    text: str
    thought: bool  # a template may leave it out
    number: int  # of its placeholder


def thinks(message: Message) -> bool:
    """Whether an assistant's message has a thought, inline or in a field."""
    if message.role != "assistant":
        return False
    fields = json.loads(message.fields or "{}")
    return _THOUGHT_END in message.content or any(fields.get(name) for name in REASONING)


def is_plain(example: Example) -> bool:
    """Whether a row is text alone: no thought, no tool, no field beside role and content."""
    answer = () if example.answer is None else (example.answer,)
    messages = (*example.prefix, *example.turns, *answer)
    return not example.tools and not any(m.fields or thinks(m) for m in messages)


def find(
    messages: Sequence[Message], text: str, render: Callable[[Sequence[Message]], str]
) -> Spans:
    """Finds each content in `text`, which `render` makes of `messages`; raises Misfit."""
    try:
        return _fit(messages, [[message.content] for message in messages], text, render)
    except Misfit as whole:
        pieces = [_TAGS.split(message.content) for message in messages]
        if all(len(each) == 1 for each in pieces):
            raise
        try:
            return _fit(messages, pieces, text, render)
        except Misfit as parts:
            raise (whole if parts.dropped is None else parts) from None


def _fit(messages, pieces: Sequence[Sequence[str]], text: str, render) -> Spans:
    blank, parts = _with_placeholders(messages, pieces)
    split = PLACEHOLDER.split(render(blank))
    own, numbers = split[0::2], [int(n) for n in split[1::2]]
    shown: list[_Part] = []
    for part in parts:
        if numbers[len(shown) : len(shown) + 1] == [part.number]:
            shown.append(part)
        elif not part.thought:
            raise Misfit(None if part.number in numbers else part.message)
    if len(shown) < len(numbers) or not text.startswith(own[0]):
        raise Misfit
    at: list[tuple[int, int] | None] = [None] * len(messages)
    exact = [len(each) == 1 for each in pieces]
    missing = {part.message for part in {*parts} - {*shown}}
    lost = [i in missing for i in range(len(messages))]
    thinking = {part.message for part in parts if part.thought}
    position = len(own[0])
    for part, before, after in zip(shown, own, own[1:], strict=False):
        i = part.message
        found = (form for form in _forms(part.text) if text.startswith(form + after, position))
        form = next(found, None)
        if form is None:
            raise Misfit
        end = position + len(form)
        at[i] = (position if at[i] is None else at[i][0], end)
        exact[i] &= form in part.text
        position = end + len(after)
        # An empty thought has no placeholder: its end must stand before the next part.
        if _THOUGHT_END in pieces[i] and messages[i].role == "assistant" and i not in thinking:
            thinking.add(i)
            lost[i] = _THOUGHT_END not in before
    if position != len(text):
        raise Misfit
    return Spans(at, exact, lost)


def _with_placeholders(messages, pieces) -> tuple[list[Message], list[_Part]]:
    """The messages with a placeholder for each piece that is text; and those pieces.

    Equal texts share one placeholder, because a template may compare them. Thoughts do not share
    it: one may be left out although the same text stands as the answer.
    """
    numbers: dict[tuple[str, int | None], int] = {}
    blank, parts = [], []
    for i, message in enumerate(messages):
        spelled = list(pieces[i])
        thought_end = max((n for n, p in enumerate(spelled) if p == _THOUGHT_END), default=-1)
        for n, piece in enumerate(pieces[i]):
            if not piece.strip() or (len(spelled) > 1 and _TAGS.match(piece)):
                continue
            thought = message.role == "assistant" and n < thought_end
            number = numbers.setdefault((piece, i if thought else None), len(numbers))
            spelled[n] = f"gkdjaxcontent{number}end"
            parts.append(_Part(i, piece, thought, number))
        blank.append(message._replace(content="".join(spelled)))
    return blank, parts


def _forms(content: str):
    """How a template may write a content: as it is, trimmed, or as a JSON string."""
    core = content.strip()
    yield from (content, content.rstrip(), content.lstrip(), core)
    begin = content.index(core)
    for first in range(begin + 1):
        for last in range(len(content), begin + len(core) - 1, -1):
            yield content[first:last]
    for ascii_only in (False, True):
        yield json.dumps(content, ensure_ascii=ascii_only)[1:-1]
        yield json.dumps(core, ensure_ascii=ascii_only)[1:-1]
