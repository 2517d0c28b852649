"""Where the messages of a conversation stand in its rendering, and what a template left out.

A template is a program, and where it puts a message's content is not for us to guess. So every
conversation is rendered twice: as it is, and with a placeholder for each content. What stands
between the placeholders is the template's own text; the two renderings must fit together to the
character, or the row is refused. That holds for templates that trim, fold the system message into
the first user turn, or treat the last turn apart, and it finds one that drops a message.

Templates that look into contents (they take `<think>` blocks apart and write them again, or leave
them out) do not fit so. For them the tags stay and what is between them has the placeholders.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gkdjax.data.stop_ids import PLACEHOLDER
from gkdjax.types import Example, Message

REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a message; its thought
_THOUGHT_ENDS = "</think>"
# What templates look for in contents.
_TAGS = re.compile(r"(</?(?:think|tool_call|tool_response)>)")


class Spans(NamedTuple):
    """What `find` has found; spans are (start, end) of characters of the rendering."""

    of: list[tuple[int, int] | None]  # each message's content; None: it has none
    exact: list[bool]  # it stands there as it is, up to white space at its ends
    lost: list[bool]  # the template left its thought out


class Misfit(NamedTuple):
    """Why the rendering cannot be told apart."""

    dropped: int | None  # a message that does not stand in it; None: contents are changed


class _Part(NamedTuple):
    message: int
    text: str
    thought: bool  # of an assistant's message: a template may leave it out
    number: int  # of its placeholder


def thinks(message: Message) -> bool:
    """Whether it has a thought beside what it says: a template may treat it in its own way."""
    if message.role != "assistant":
        return False
    fields = json.loads(message.fields or "{}")
    return _THOUGHT_ENDS in message.content or any(fields.get(name) for name in REASONING)


def is_plain(example: Example) -> bool:
    """Whether a row is text alone: no thought, no tool, no field beside role and content."""
    answer = () if example.answer is None else (example.answer,)
    said = (*example.prefix, *example.turns, *answer)
    return not example.tools and not any(m.fields or thinks(m) for m in said)


def find(
    messages: Sequence[Message], text: str, render: Callable[[Sequence[Message]], str]
) -> Spans | Misfit:
    """Where each content stands in `text`, the rendering of `messages`.

    Args:
      messages: as they are.
      text: what `render` makes of them.
      render: the chat template.
    """
    found = _fit(messages, [[message.content] for message in messages], text, render)
    pieces = [_TAGS.split(message.content) for message in messages]
    if isinstance(found, Misfit) and any(len(each) > 1 for each in pieces):
        apart = _fit(messages, pieces, text, render)
        return found if isinstance(apart, Misfit) and apart.dropped is None else apart
    return found


def _fit(
    messages: Sequence[Message],
    pieces: Sequence[Sequence[str]],
    text: str,
    render: Callable[[Sequence[Message]], str],
) -> Spans | Misfit:
    # Equal texts have one placeholder, as a template may compare them; but thoughts are compared
    # with nothing, and may be left out where the same text stands as the answer.
    numbers: dict[tuple[str, int | None], int] = {}
    blank, parts = [], []
    for i, message in enumerate(messages):
        spelled = list(pieces[i])
        ends = max((n for n, p in enumerate(spelled) if p == _THOUGHT_ENDS), default=-1)
        for n, piece in enumerate(pieces[i]):
            if not piece.strip() or (len(spelled) > 1 and _TAGS.match(piece)):
                continue
            thought = message.role == "assistant" and n < ends
            key = piece, i if thought else None
            number = numbers.setdefault(key, len(numbers))
            spelled[n] = f"gkdjaxcontent{number}end"
            parts.append(_Part(i, piece, thought, number))
        blank.append(message._replace(content="".join(spelled)))
    split = PLACEHOLDER.split(render(blank))
    own, order = split[0::2], [int(n) for n in split[1::2]]
    shown = _in_order(parts, order)
    if isinstance(shown, Misfit):
        return shown
    spans = _spans(text, [part.text for part in shown], own)
    if spans is None:
        return Misfit(None)
    of: list[tuple[int, int] | None] = [None] * len(messages)
    exact = [len(each) == 1 for each in pieces]
    for part, (start, end) in zip(shown, spans, strict=True):
        before = of[part.message]
        of[part.message] = (start if before is None else before[0], end)
        exact[part.message] &= text[start:end] in part.text
    lost = [any(p.message == i for p in {*parts} - {*shown}) for i in range(len(messages))]
    thinking = {part.message for part in parts if part.thought}
    for part, before in zip(shown, own[:-1], strict=True):
        i = part.message  # an empty thought has no placeholder: its end stands before the rest
        if _THOUGHT_ENDS in pieces[i] and messages[i].role == "assistant" and i not in thinking:
            thinking.add(i)
            lost[i] = _THOUGHT_ENDS not in before
    return Spans(of, exact, lost)


def _in_order(parts: Sequence[_Part], order: Sequence[int]) -> list[_Part] | Misfit:
    """The parts whose placeholders came, one for each; thoughts may be missing."""
    shown, left = [], list(order)
    for part in parts:
        if left and left[0] == part.number:
            shown.append(part)
            left.pop(0)
        elif not part.thought:
            return Misfit(None if part.number in order else part.message)
    return Misfit(None) if left else shown


def _spans(text: str, contents: Sequence[str], own: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where each content stands in `text`, up to white space at its ends; None: nowhere."""
    if not text.startswith(own[0]):
        return None
    spans, position = [], len(own[0])
    for content, piece in zip(contents, own[1:], strict=True):
        for shown in _forms(content):
            if text.startswith(shown + piece, position):
                break
        else:
            return None
        spans.append((position, position + len(shown)))
        position += len(shown) + len(piece)
    return spans if position == len(text) else None


def _forms(content: str):
    """How a template may write it: as it is, trimmed, and as JSON writes a string."""
    yield from (content, content.rstrip(), content.lstrip(), content.strip())
    core = content.strip()
    begin = content.index(core)
    end = begin + len(core)
    for first in range(begin + 1):
        for last in range(len(content), end - 1, -1):
            yield content[first:last]
    for ascii_alone in (False, True):
        yield json.dumps(content, ensure_ascii=ascii_alone)[1:-1]
        yield json.dumps(core, ensure_ascii=ascii_alone)[1:-1]
