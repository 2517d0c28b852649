"""A chat template as a function of messages and tools, and whether it writes all that they have."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Sequence

import transformers

from gkdjax.data import clock as clocks
from gkdjax.data.message_spans import REASONING
from gkdjax.types import Message
from gkdjax.utils.errors import UserError, one_line

SYSTEM_ADVICE = (
    "; if it has no system role, put that text into a user turn of context.prefix_messages, "
    "or take a model whose template has the role"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """The chat template of a tokenizer, with all that it is given beside messages and tools."""

    directory: str
    tokenizer: transformers.PreTrainedTokenizerBase
    kwargs: dict
    clock: datetime.datetime | None  # what `strftime_now` tells; None: the time

    @property
    def source(self) -> str:
        """Its text."""
        return self.tokenizer.get_chat_template()

    def text(
        self, messages: Sequence[Message], name: str, tools: str, *, generation_prompt: bool
    ) -> str:
        """What `apply_chat_template` makes of messages.

        Raises:
          UserError: the template refuses them; `name` says whose they are.
        """
        given = [message.for_template() for message in messages]
        listed = json.loads(tools) if tools else None
        return self._text(given, listed, name, generation_prompt)

    def leaves_out(
        self, messages: Sequence[Message], name: str, tools: str, *, generation_prompt: bool
    ) -> frozenset[int]:
        """The numbers of messages that have a thought in a field, which it does not write.

        Raises:
          UserError: it does not write a tool or the call of one, or no thought in any place; or it
            encodes the arguments of a call twice.
        """
        given = [message.for_template() for message in messages]
        listed = json.loads(tools) if tools else []
        marked, wanted = [dict(each) for each in given], {}
        for i, message in enumerate(marked):
            if message.get("tool_calls"):
                message["tool_calls"], names = _renamed(message["tool_calls"], f"call{i}n")
                wanted |= {mark: f"message {i}'s call of {who!r}" for mark, who in names.items()}
        tools_marked, names = _renamed(listed, "tool")
        wanted |= {mark: f"the tool {who!r}" for mark, who in names.items()}
        thoughts = {i: field for i, each in enumerate(given) if (field := _thought(each))}
        for i in thoughts:
            told = {field: f"gkdjaxthought{i}end" for field in REASONING if marked[i].get(field)}
            marked[i] = marked[i] | told
        if not wanted and not thoughts:
            return frozenset()
        shown = self._text(marked, tools_marked or None, name, generation_prompt)
        for mark, what in wanted.items():
            if mark not in shown:
                raise UserError(
                    f"{name}: the chat template of {self.directory} does not write {what}; take a"
                    " model whose template has tools, or leave them out of the row"
                )
        self._check_arguments(given, listed, name, generation_prompt)
        lost = frozenset(i for i in thoughts if f"gkdjaxthought{i}end" not in shown)
        if lost and not self._writes_thoughts:
            i = min(lost)
            raise UserError(
                f"{name}: the chat template of {self.directory} does not read {thoughts[i]!r} of"
                f" message {i}; write it into the content, as <think>...</think>, or leave it out"
            )
        return lost

    @functools.cached_property
    def _writes_thoughts(self) -> bool:
        """Whether it writes the thought of an answer that has it in a field of its own."""
        said = {"role": "assistant", "content": "So.", REASONING[0]: "gkdjaxthought"}
        asked = [{"role": "user", "content": "Why?"}, said]
        return "gkdjaxthought" in self._text(asked, None, "a probe", False)

    def _check_arguments(
        self, given: Sequence[dict], tools: list, name: str, generation_prompt: bool
    ) -> None:
        """Raises UserError where a template encodes arguments that are JSON text already."""
        texts = {
            (i, said)
            for i, message in enumerate(given)
            for call in message.get("tool_calls") or ()
            if isinstance(said := _function(call).get("arguments"), str) and '"' in said
        }
        if not texts:
            return
        whole = self._text(given, tools or None, name, generation_prompt)
        for i, said in sorted(texts):
            if said not in whole and json.dumps(said, ensure_ascii=False) in whole:
                raise UserError(
                    f"{name}: the arguments of message {i}'s tool call are a string, which the chat"
                    f" template of {self.directory} encodes again; give them as an object:"
                    f" {said[:60]}"
                )

    def _text(
        self, given: Sequence[dict], tools: list | None, name: str, generation_prompt: bool
    ) -> str:
        try:
            source = self.tokenizer.get_chat_template(None, tools)
            return self.tokenizer.apply_chat_template(
                given,
                tools=tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.kwargs,
                **clocks.standing(source, self.clock),
            )
        except Exception as error:  # a template is a program
            roles = [message["role"] for message in given]
            raise UserError(
                f"{name}: the chat template of {self.directory} refuses the roles "
                f"{', '.join(roles)}: {one_line(error)}{SYSTEM_ADVICE if 'system' in roles else ''}"
            ) from error


def _thought(message: dict) -> str | None:
    """The field of a message that holds its thought."""
    return next((field for field in REASONING if message.get(field)), None)


def _function(call: dict) -> dict:
    """Of a tool, or of the call of one: what has the name, in either form."""
    inner = call.get("function") if isinstance(call, dict) else None
    return inner if isinstance(inner, dict) else call if isinstance(call, dict) else {}


def _renamed(functions: list, what: str) -> tuple[list, dict[str, str]]:
    """Tools or calls under names that stand nowhere else; and each of those -> the name."""
    renamed, names = [], {}
    for n, each in enumerate(functions):
        found = _function(each)
        if not isinstance(found.get("name"), str):
            renamed.append(each)
            continue
        mark = f"gkdjax{what}{n}end"
        names[mark] = found["name"]
        other = found | {"name": mark}
        renamed.append(other if found is each else each | {"function": other})
    return renamed, names
