"""Renders messages through a chat template, and finds what it writes of each, or leaves out.

A template is a program, so a conversation is rendered twice: as it is, and with a placeholder for
each content. The text between the placeholders is the template's own; the two renderings must fit
together to the character, or the row is refused. That holds for templates that trim, that fold the
system message into the first user turn or treat the last turn differently, and it finds a message
that is dropped. Templates that look for `<think>` blocks in contents do not fit so: for them the
tags stay, and the text between the tags has the placeholders.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import transformers

from gkdjax.types import Example, Message
from gkdjax.utils.errors import UserError, one_line

PLACEHOLDER = re.compile(r"gkdjaxcontent(\d+)end")  # no template trims, escapes or splits it
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a message for its thought
_THOUGHT_END = "</think>"
_TAGS = re.compile(r"(</?(?:think|tool_call|tool_response)>)")  # templates look for these
SYSTEM_ADVICE = (
    "; if it has no system role, put that text into a user turn of context.prefix_messages, "
    "or take a model whose template has the role"
)
# Hides the function of this name that transformers gives templates, which tells the time of the
# rendering, so the macro looks each directive up. No line break belongs to the template: jinja
# removes the one after a block.
_CLOCK = (
    "{%% macro strftime_now(format) %%}"
    "{%% set at = namespace(text=format | replace('%%%%', '\\x00')) %%}"
    "{%% for directive, value in %s if directive in format %%}"
    "{%% set at.text = at.text | replace(directive, value) %%}{%% endfor %%}"
    "{{ at.text | replace('\\x00', '%%') }}{%% endmacro %%}\n"
)
_DIRECTIVES = [f"%{f}{c}" for f in ("", *"-_0^") for c in "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ"]
_RARE_DIRECTIVE = re.compile(r"%[-_0^#]*[0-9]*[EO]?[a-zA-Z]")  # "%f", "%10d"


class Template:
    """A tokenizer's chat template, with what it is given beside messages and tools.

    `clock` is the time that `strftime_now` tells; None: the time of the rendering.
    """

    def __init__(
        self,
        directory: str,
        tokenizer: transformers.PreTrainedTokenizerBase,
        kwargs: dict,
        clock: datetime.datetime | None,
    ):
        self.directory, self.tokenizer, self.kwargs = directory, tokenizer, kwargs
        self.source, self._clock = tokenizer.get_chat_template(), clock
        self.text, self.between = self._text, self._between
        if clock is not None or "strftime_now" not in str(tokenizer.chat_template):
            # Prompts come again in both views; what is around contents, in rows of the same roles.
            self.text = functools.lru_cache(maxsize=128)(self.text)
            self.between = functools.lru_cache(maxsize=128)(self.between)

    def _text(
        self, messages: tuple[Message, ...], tools: str = "", generation_prompt: bool = False
    ) -> str:
        """Renders as `apply_chat_template` does."""
        given = [message.for_template() for message in messages]
        return self._render(given, json.loads(tools or "[]"), generation_prompt)

    def _between(
        self, blank: tuple[Message, ...], tools: str, generation_prompt: bool
    ) -> tuple[list[str], list[int]]:
        """Returns what the template writes around placeholders, and their numbers, in order."""
        split = PLACEHOLDER.split(self._text(blank, tools, generation_prompt))
        return split[0::2], [int(n) for n in split[1::2]]

    def lost_thoughts(
        self, messages: Sequence[Message], text: str, tools: str, generation_prompt: bool
    ) -> list[int]:
        """Returns the messages that have a thought in a field which their rendering `text` lacks.

        Raises:
          UserError: the template does not write a tool, a call or the thoughts of any message, or
            it encodes the arguments of a call twice.
        """
        marked = [message.for_template() for message in messages]
        marks: dict[str, str] = {}  # a name that stands nowhere else -> what it replaces
        thoughts: dict[int, str] = {}  # message -> field
        for i, message in enumerate(marked):
            calls = message.get("tool_calls") or []
            self._check_arguments(calls, i, text)
            if calls:
                message["tool_calls"] = _mark(calls, f"call{i}n", f"message {i}'s call of", marks)
            for field in filter(message.get, REASONING):
                thoughts.setdefault(i, field)
                message[field] = f"gkdjaxthought{i}end"
        marked_tools = _mark(json.loads(tools or "[]"), "tool", "the tool", marks)
        if not marks and not thoughts:
            return []
        shown = self._render(marked, marked_tools, generation_prompt)
        for mark, what in marks.items():
            if mark not in shown:
                raise UserError(
                    f"the chat template of {self.directory} does not write {what}; take a"
                    " model whose template has tools, or leave them out of the row"
                )
        lost = [i for i in thoughts if f"gkdjaxthought{i}end" not in shown]
        if lost and not self._writes_thoughts:
            raise UserError(
                f"the chat template of {self.directory} does not read"
                f" {thoughts[lost[0]]!r} of message {lost[0]}; write it into the content, as"
                " <think>...</think>, or leave it out"
            )
        return lost

    @functools.cached_property
    def _writes_thoughts(self) -> bool:
        """Whether it writes the thought that an answer has in a field."""
        answer = {"role": "assistant", "content": "So.", REASONING[0]: "gkdjaxthought"}
        question = {"role": "user", "content": "Why?"}
        return "gkdjaxthought" in self._render([question, answer], [], False)

    def _check_arguments(self, calls: Sequence, i: int, text: str) -> None:
        """Refuses arguments that are JSON text already and that the template encodes again."""
        for call in calls:
            arguments = _function(call).get("arguments")
            if not isinstance(arguments, str) or '"' not in arguments or arguments in text:
                continue
            if json.dumps(arguments, ensure_ascii=False) in text:
                raise UserError(
                    f"the arguments of message {i}'s tool call are a string, which the chat"
                    f" template of {self.directory} encodes again; give them as an object:"
                    f" {arguments[:60]}"
                )

    def _render(self, messages: list[dict], tools: list, generation_prompt: bool) -> str:
        try:
            source = self.tokenizer.get_chat_template(None, tools or None)
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.kwargs,
                **fixed_clock(source, self._clock),
            )
        except Exception as error:  # a template is a program
            roles = [message["role"] for message in messages]
            raise UserError(
                f"the chat template of {self.directory} refuses the roles "
                f"{', '.join(roles)}: {one_line(error)}{SYSTEM_ADVICE if 'system' in roles else ''}"
            ) from error


@functools.lru_cache(maxsize=8)
def fixed_clock(source: str, clock: datetime.datetime | None) -> dict:
    """Returns arguments of `apply_chat_template` under which a template sees this local time.

    A run that continues on another day then reads the same text.
    """
    if clock is None or "strftime_now" not in source:
        return {}
    directives = dict.fromkeys([*_DIRECTIVES, *_RARE_DIRECTIVE.findall(source)])
    values = [[directive, clock.strftime(directive)] for directive in directives]
    return {"chat_template": _CLOCK % json.dumps(values, ensure_ascii=False) + source}


def _function(call) -> dict:
    """The part of a tool or a call that has the name; either form may nest it in "function"."""
    inner = call.get("function") if isinstance(call, dict) else None
    return inner if isinstance(inner, dict) else call if isinstance(call, dict) else {}


def _mark(functions: list, kind: str, what: str, marks: dict[str, str]) -> list:
    """Tools or calls under unique names, which are added to `marks`."""
    renamed = []
    for n, each in enumerate(functions):
        inner = _function(each)
        if isinstance(inner.get("name"), str):
            mark = f"gkdjax{kind}{n}end"
            marks[mark] = f"{what} {inner['name']!r}"
            other = inner | {"name": mark}
            each = other if inner is each else each | {"function": other}
        renamed.append(each)
    return renamed


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
    if _THOUGHT_END in message.content or not message.fields:
        return _THOUGHT_END in message.content
    fields = json.loads(message.fields)
    return any(fields.get(name) for name in REASONING)


def is_plain(example: Example) -> bool:
    """Whether a row is text alone: no thought, no tool, no field beside role and content."""
    answer = () if example.answer is None else (example.answer,)
    messages = (*example.prefix, *example.turns, *answer)
    return not example.tools and not any(m.fields or thinks(m) for m in messages)


def find(messages: Sequence[Message], text: str, between: Callable) -> Spans:
    """Finds each content in the rendering `text`; `between` is as `Template.between`.

    Raises:
      Misfit: the template does more to the contents than to write them.
    """
    try:
        return _fit(messages, [[message.content] for message in messages], text, between)
    except Misfit as whole:
        pieces = [_TAGS.split(message.content) for message in messages]
        if all(len(each) == 1 for each in pieces):
            raise
        try:
            return _fit(messages, pieces, text, between)
        except Misfit as parts:
            raise (whole if parts.dropped is None else parts) from None


def _fit(messages, pieces: Sequence[Sequence[str]], text: str, between: Callable) -> Spans:
    blank, parts = _with_placeholders(messages, pieces)
    own, numbers = between(blank)
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


def _with_placeholders(messages, pieces) -> tuple[tuple[Message, ...], list[_Part]]:
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
    return tuple(blank), parts


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
