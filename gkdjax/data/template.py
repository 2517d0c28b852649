"""Renders messages and tools through a chat template, and checks that it writes all of them."""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Sequence

import transformers

from gkdjax.data.message_spans import REASONING
from gkdjax.types import Message
from gkdjax.utils.errors import UserError, one_line

SYSTEM_ADVICE = (
    "; if it has no system role, put that text into a user turn of context.prefix_messages, "
    "or take a model whose template has the role"
)
# Hides the function of this name that transformers gives templates, which tells the time of the
# rendering; values can only be plain data there, so the macro looks each directive up. No line
# break belongs to the template: jinja removes the one after a block.
_CLOCK = (
    "{% macro strftime_now(format) %}"
    "{% set at = namespace(text=format | replace('%%', '\\x00')) %}"
    "{% for directive, value in gkdjax_clock.items() %}"
    "{% set at.text = at.text | replace(directive, value) %}{% endfor %}"
    "{{ at.text | replace('\\x00', '%') }}{% endmacro %}\n"
)
_DIRECTIVES = [f"%{f}{c}" for f in ("", *"-_0^") for c in "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ"]
_RARE_DIRECTIVE = re.compile(r"%[-_0^#]*[0-9]*[EO]?[a-zA-Z]")  # "%f", "%10d"


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """A tokenizer's chat template, with what it is given beside messages and tools."""

    directory: str
    tokenizer: transformers.PreTrainedTokenizerBase
    kwargs: dict
    clock: datetime.datetime | None  # what `strftime_now` returns; None: the time of the rendering

    @property
    def source(self) -> str:
        return self.tokenizer.get_chat_template()

    def text(
        self, messages: Sequence[Message], name: str, tools: str = "", generation_prompt=False
    ) -> str:
        """Renders as `apply_chat_template` does; `name` begins the UserError of a refusal."""
        given = [message.for_template() for message in messages]
        return self._render(given, json.loads(tools or "[]"), name, generation_prompt)

    def lost_thoughts(
        self, messages: Sequence[Message], text: str, name: str, tools: str, generation_prompt: bool
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
            self._check_arguments(calls, i, text, name)
            if calls:
                message["tool_calls"] = _mark(calls, f"call{i}n", f"message {i}'s call of", marks)
            for field in filter(message.get, REASONING):
                thoughts.setdefault(i, field)
                message[field] = f"gkdjaxthought{i}end"
        marked_tools = _mark(json.loads(tools or "[]"), "tool", "the tool", marks)
        if not marks and not thoughts:
            return []
        shown = self._render(marked, marked_tools, name, generation_prompt)
        for mark, what in marks.items():
            if mark not in shown:
                raise UserError(
                    f"{name}: the chat template of {self.directory} does not write {what}; take a"
                    " model whose template has tools, or leave them out of the row"
                )
        lost = [i for i in thoughts if f"gkdjaxthought{i}end" not in shown]
        if lost and not self._writes_thoughts:
            raise UserError(
                f"{name}: the chat template of {self.directory} does not read"
                f" {thoughts[lost[0]]!r} of message {lost[0]}; write it into the content, as"
                " <think>...</think>, or leave it out"
            )
        return lost

    @functools.cached_property
    def _writes_thoughts(self) -> bool:
        """Whether it writes the thought that an answer has in a field."""
        answer = {"role": "assistant", "content": "So.", REASONING[0]: "gkdjaxthought"}
        question = {"role": "user", "content": "Why?"}
        return "gkdjaxthought" in self._render([question, answer], [], "a probe", False)

    def _check_arguments(self, calls: Sequence, i: int, text: str, name: str) -> None:
        """Refuses arguments that are JSON text already and that the template encodes again."""
        for call in calls:
            arguments = _function(call).get("arguments")
            if not isinstance(arguments, str) or '"' not in arguments or arguments in text:
                continue
            if json.dumps(arguments, ensure_ascii=False) in text:
                raise UserError(
                    f"{name}: the arguments of message {i}'s tool call are a string, which the chat"
                    f" template of {self.directory} encodes again; give them as an object:"
                    f" {arguments[:60]}"
                )

    def _render(self, messages: list[dict], tools: list, name: str, generation_prompt: bool) -> str:
        try:
            source = self.tokenizer.get_chat_template(None, tools or None)
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.kwargs,
                **fixed_clock(source, self.clock),
            )
        except Exception as error:  # a template is a program
            roles = [message["role"] for message in messages]
            raise UserError(
                f"{name}: the chat template of {self.directory} refuses the roles "
                f"{', '.join(roles)}: {one_line(error)}{SYSTEM_ADVICE if 'system' in roles else ''}"
            ) from error


def fixed_clock(source: str, clock: datetime.datetime | None) -> dict:
    """Returns arguments of `apply_chat_template` under which a template sees this local time.

    A run that continues on another day then reads the same text.
    """
    if clock is None or "strftime_now" not in source:
        return {}
    directives = dict.fromkeys([*_DIRECTIVES, *_RARE_DIRECTIVE.findall(source)])
    values = {directive: clock.strftime(directive) for directive in directives}
    return {"chat_template": _CLOCK + source, "gkdjax_clock": values}


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
