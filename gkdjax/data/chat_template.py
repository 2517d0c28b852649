"""Messages -> token ids and target flags, through the tokenizer's own chat template.

What is learnt of an assistant's message is what the template writes after its own generation
prompt, up to the end of turn: what a model has to write in that place, be it text, a thought or the
call of a tool. `message_spans` finds the messages in the rendering, and `template` whether it has
all that they say.
"""

import dataclasses
import datetime
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import transformers
from absl import logging

from gkdjax.data import message_spans
from gkdjax.data.message_spans import Misfit, thinks
from gkdjax.data.row_schema import TOOL_ROLES
from gkdjax.data.stop_ids import stop_ids
from gkdjax.data.template import SYSTEM_ADVICE, Template
from gkdjax.data.tokenizer_files import load_tokenizer
from gkdjax.types import Message
from gkdjax.utils.errors import UserError

# Llama 3's template writes the day of the rendering, so that a run would go on with other text the
# next day; this is the date that it falls back to itself.
_FIXED = {"date_string": "26 Jul 2024"}
_SWITCH = "enable_thinking"  # as templates call it that may think
_OPENS = "<think>"
_BEGINS_BLANK = re.compile(r"\s*<think>\s")


class Sought(NamedTuple):
    """A pattern to be found in what the template writes of an assistant's message."""

    pattern: str
    whole: bool  # then all of the message is a target; or only what the pattern matches


# Of one message: False: nothing is a target; True: content and end of turn, of an assistant's all
# that follows the generation prompt; or spans (start, end) of characters of its content.
Target = bool | tuple[tuple[int, int], ...] | Sought


@dataclasses.dataclass(frozen=True, eq=False)  # one tokenizer is one chat
class Chat:
    """A tokenizer with its chat template; made by `load_chat`."""

    directory: str
    tokenizer: transformers.PreTrainedTokenizerBase
    pad_id: int
    stop_ids: tuple[int, ...]  # any of them ends a response; the template's end of turn is first
    end_of_turn: str  # the special token after an assistant's content, as text
    template_kwargs: dict  # what the template is given beside the messages
    vocab_size: int | None = None  # rows of the model's embedding; None: of no model yet
    shared: int | None = None  # of a teacher: the student has the ids below it; None: all
    clock: datetime.datetime | None = None  # the time that the template sees; None: that it is

    def prompt_ids(
        self, messages: Sequence[Message], name: str = "a prompt", tools: str = ""
    ) -> np.ndarray:
        """What the model reads before it answers: int32 [T], with the assistant's header.

        Raises:
          UserError: as `render`; `name` says whose prompt it is.
        """
        nothing = (False,) * len(messages)
        return self.render(messages, nothing, name, generation_prompt=True, tools=tools)[0]

    def render(
        self,
        messages: Sequence[Message],
        targets: Sequence[Target],
        name: str,
        *,
        generation_prompt: bool = False,
        tools: str = "",
    ) -> tuple[np.ndarray, np.ndarray]:
        """A conversation's ids, equal to `apply_chat_template`'s, and which of them are targets.

        Of a target message its content and its end-of-turn token are targets, never its header.
        "<start_of_turn>model\\nYes.<end_of_turn>\\n" has the flags 0 0 0 1 1 1 0: Yes . <end>.
        Of an assistant's so is all else that follows the generation prompt: thoughts, tool calls.
        Of spans every token that holds a character of them is a target, and no end of turn.

        A template may leave the `<think>` block of every answer out, as if it were history. The
        last answer, if it is learnt, then follows the generation prompt as it is.

        Args:
          messages: at least one.
          targets: one a message.
          name: of the row; errors start with it.
          generation_prompt: append the header of the assistant's next message.
          tools: JSON list of what the template is given as tools; "": none.

        Returns:
          ids int32 [T] and flags bool [T], both read-only.

        Raises:
          UserError: the template refuses the roles, drops or rewrites a message, or does not write
            a tool, a call or a thought; or an assistant target does not follow from the prompt that
            a model would be given for it.
        """
        said = _Said(tuple(messages), generation_prompt, tools)
        return _rendered(self, said, tuple(targets), name)

    @functools.cached_property
    def template(self) -> Template:
        """With what it is given beside the messages."""
        return Template(self.directory, self.tokenizer, self.template_kwargs, self.clock)

    @functools.cached_property
    def earlier_answers(self) -> bool:
        """Whether an answer that is not the last one can be a target.

        Not under a template that treats the last answer apart, as Qwen 3's does: what it writes of
        an earlier one does not follow from the prompt that a model would be given for it, or is not
        what it would have to write there.
        """
        talk = (Message("user", "Why?"), Message("assistant", "So.")) * 2
        first = (False, True, False, False)
        try:
            ids, flags = self.render(talk, first, "a probe")
            self.render(talk[:3], first[:3], "a probe", generation_prompt=True)
        except UserError:
            return False
        try:
            last_ids, last_flags = self.render(talk[:2], first[:2], "a probe")
        except UserError:  # then no answer at an end is learnt
            return True
        return np.array_equal(ids[flags], last_ids[last_flags])

    def character_spans(self, text: str) -> np.ndarray:
        """The characters that each token of `text` stands for: int64 [n, 2]."""
        return _tokenize(self, text)[1]

    def stop_tokens(self) -> str:
        """For people: "<end_of_turn> (106), <eos> (1)", any of which ends a response."""
        tokens = self.tokenizer.convert_ids_to_tokens(self.stop_ids)
        return ", ".join(f"{t} ({i})" for t, i in zip(tokens, self.stop_ids, strict=True))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; white space stays as it is."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def load_chat(
    directory: str | pathlib.Path,
    template_kwargs: dict | None = None,
    clock: datetime.datetime | None = None,
) -> Chat:
    """Reads the tokenizer, its chat template and the stop tokens of a Hugging Face directory.

    Args:
      directory: of the model.
      template_kwargs: for the template, as {"enable_thinking": False}.
      clock: what `strftime_now` tells the template; None: the time of each rendering.

    Raises:
      UserError: no such directory, no fast tokenizer in it, no chat template, or a template that
        ends no turn with a special token.
    """
    tokenizer = load_tokenizer(directory)
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(map(repr, tokenizer.chat_template))
        raise UserError(
            f"{directory}: the tokenizer has the chat templates {names} and none named 'default';"
            " write the one that is meant to chat_template.jinja in the directory"
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"{directory}: the tokenizer has no chat template; take an instruction-tuned model, "
            "or put its chat_template.jinja into the directory"
        )
    template_kwargs = _FIXED | (template_kwargs or {})
    ends = stop_ids(str(directory), tokenizer, template_kwargs)
    # Padding is masked wherever it is read, so a tokenizer without a pad token can lend any id.
    pad_id = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    end_of_turn = tokenizer.convert_ids_to_tokens(ends[0])
    made = Chat(str(directory), tokenizer, pad_id, ends, end_of_turn, template_kwargs)
    return dataclasses.replace(made, clock=clock)


class _Said(NamedTuple):
    """What is rendered."""

    messages: tuple[Message, ...]
    generation_prompt: bool
    tools: str

    def before(self, i: int) -> "_Said":
        """What a model is given that is to write message i."""
        return self._replace(messages=self.messages[:i], generation_prompt=True)


class _Turn(NamedTuple):
    """What is learnt of a message, in a rendering."""

    first: int  # token
    after: int  # token after the end of turn
    begin: int  # character of the first token
    end: int  # character before the end of turn
    content: tuple[int, int] | None  # characters of its content, if it is there as it is


# Rows come back every epoch, and with each of their completions: 0.3 ms for a view, or nothing.
@functools.lru_cache(maxsize=16384)
def _rendered(
    chat: Chat, said: _Said, targets: tuple[Target, ...], name: str
) -> tuple[np.ndarray, np.ndarray]:
    text = _text(chat, said, name)
    spans = _spans(chat, said, text, name)
    ids, offsets = _tokenize(chat, text)
    _check_rows(chat, ids, name)
    flags = np.zeros(len(ids), bool)
    for i, target in enumerate(targets):
        if not target:
            continue
        _refuse_stops(chat, said.messages[i], i, target, name)
        if said.messages[i].role != "assistant":
            turn = _of_others(chat, said, i, text, offsets, spans, name)
        else:
            prompt = _text(chat, said.before(i), name)
            if _is_history(chat, said, i, prompt, text, ids, spans, name):
                return _as_it_is(chat, said, targets, prompt, name)
            turn = _written(chat, said, i, len(prompt), text, offsets, spans, name)
        _flag(flags, offsets, text, target, said.messages[i].content, turn)
    ids.flags.writeable = flags.flags.writeable = False
    return ids, flags


def _refuse_stops(chat: Chat, message: Message, i: int, target: Target, name: str) -> None:
    """Raises UserError for a message to be learnt that has a stop token within what it says."""
    content = [message.content]
    if isinstance(target, tuple) and not isinstance(target, Sought):
        content = [message.content[a:b] for a, b in target]
    for stop in chat.stop_ids:
        token = chat.tokenizer.added_tokens_decoder.get(stop)
        if token is not None and any(token.content in text for text in (*content, message.fields)):
            raise UserError(
                f"{name}: message {i} has {token.content!r} in what is to be learnt, at which the"
                " model stops: what comes after it would never be written; remove it from the text"
                " (the template ends a turn by itself)"
            )


def _text(chat: Chat, said: _Said, name: str) -> str:
    how = {"generation_prompt": said.generation_prompt}
    return chat.template.text(said.messages, name, said.tools, **how)


def _spans(chat: Chat, said: _Said, text: str, name: str) -> message_spans.Spans:
    """Where the messages stand, and which of them the template writes without their thought."""
    how = {"generation_prompt": said.generation_prompt}
    found = message_spans.find(
        said.messages, text, lambda blank: chat.template.text(blank, name, said.tools, **how)
    )
    if isinstance(found, Misfit) and found.dropped is not None:
        role, _, fields, _ = said.messages[found.dropped]
        advice = SYSTEM_ADVICE if role == "system" else ""
        if role == "assistant" and "tool_calls" in fields:
            advice = "; it writes the calls alone: remove the text beside them"
        if role in TOOL_ROLES[1:]:
            advice = f"; rename the role {TOOL_ROLES[0]!r} if it is the result of a tool"
        raise UserError(
            f"{name}: the chat template of {chat.directory} drops message {found.dropped} "
            f"({role}) without a word{advice}"
        )
    if isinstance(found, Misfit):
        raise UserError(
            f"{name}: the chat template of {chat.directory} rewrites, repeats or reorders what "
            "the messages say, so it cannot be told which tokens are theirs"
        )
    if not said.tools and not any(message.fields for message in said.messages):
        return found
    for i in chat.template.leaves_out(said.messages, name, said.tools, **how):
        found.lost[i] = True
    return found


def _is_history(
    chat: Chat,
    said: _Said,
    i: int,
    prompt: str,
    text: str,
    ids: np.ndarray,
    spans: message_spans.Spans,
    name: str,
) -> bool:
    """Whether the last answer is written without its thought, and not as a model has to write it.

    Raises:
      UserError: it is not the last, or does not follow from the generation prompt.
    """
    message = said.messages[i]
    prompt_ids, _ = _tokenize(chat, prompt)
    follows = text.startswith(prompt) and np.array_equal(ids[: len(prompt_ids)], prompt_ids)
    if follows and not spans.lost[i]:
        rest = text[len(prompt) : spans.of[i] and spans.of[i][0]].lstrip()
        added = not thinks(message) and (rest if spans.of[i] else rest.startswith(_OPENS))
        # Whether an answer without a thought teaches not to think is for the user to say.
        if not added or _SWITCH not in chat.template.source or _SWITCH in chat.template_kwargs:
            return False
        raise UserError(
            f"{name}: message {i} has no thought, and the chat template of {chat.directory} writes"
            f" an empty one before it, which would be learnt; data.template_kwargs={{'{_SWITCH}':"
            f" False}} puts it into the prompt, and {{'{_SWITCH}': True}} learns it"
        )
    last = i + 1 == len(said.messages) and not said.generation_prompt
    inline = "</think>" in message.content and "tool_calls" not in message.fields
    begun = prompt.rstrip()
    closed = begun.endswith("</think>")
    if last and inline and not closed and (begun.endswith(_OPENS) or spans.lost[i]):
        return True
    if follows:
        where = "" if last else " where others follow it"
        raise UserError(
            f"{name}: the chat template of {chat.directory} leaves the thought of message {i}"
            f" out{where}, so that it cannot be learnt there"
        )
    raise _does_not_follow(chat, message, prompt, name)


def _does_not_follow(chat: Chat, message: Message, prompt: str, name: str) -> UserError:
    advice = ""
    if message.content[:1].isspace():
        advice += "; white space at the start of the message can do that"
    if _SWITCH in chat.template.source and not thinks(message):
        advice += (
            "; an answer that has no thought of its own wants data.template_kwargs={'"
            f"{_SWITCH}': False}}"
        )
    elif prompt.rstrip().endswith(_OPENS) and not thinks(message):
        advice += "; it opens a thought, and the answer has none: begin it with <think>...</think>"
    elif prompt.rstrip().endswith(_OPENS) and _BEGINS_BLANK.match(message.content):
        advice += (
            "; the white space after its <think> goes into one token with the prompt's: remove it,"
            " as <think></think> where the thought is empty"
        )
    elif thinks(message) and _SWITCH in chat.template_kwargs:
        advice += f"; it has a thought: leave {_SWITCH!r} out of data.template_kwargs"
    return UserError(
        f"{name}: the chat template of {chat.directory} does not continue its own generation "
        f"prompt {prompt[-40:]!r} with the assistant's message, so training would not match "
        f"inference{advice}"
    )


def _written(
    chat: Chat,
    said: _Said,
    i: int,
    begin: int,
    text: str,
    offsets: np.ndarray,
    spans: message_spans.Spans,
    name: str,
) -> _Turn:
    """What follows the generation prompt, of `begin` characters, up to the end of turn."""
    message, span = said.messages[i], spans.of[i]
    stop = begin if span is None else span[1]
    rest = text[stop : next((s[0] for s in spans.of[i + 1 :] if s is not None), len(text))]
    if span is not None and spans.exact[i] and "tool_calls" not in message.fields:
        space = len(rest) - len(rest.lstrip())
        found = [(space, chat.end_of_turn)] if rest.startswith(chat.end_of_turn, space) else []
    else:
        tokens = chat.tokenizer.convert_ids_to_tokens(chat.stop_ids)
        found = [(rest.index(token), token) for token in tokens if token in rest]
    if not found:
        raise UserError(
            f"{name}: the chat template of {chat.directory} does not end an assistant's message "
            f"with {chat.end_of_turn} here"
        )
    at, token = min(found)
    first, after = _tokens_of(text, offsets, begin, stop + at + len(token), name)
    alone = spans.exact[i] and not message.fields
    return _Turn(first, after, begin, stop + at, span if alone else None)


def _of_others(
    chat: Chat,
    said: _Said,
    i: int,
    text: str,
    offsets: np.ndarray,
    spans: message_spans.Spans,
    name: str,
) -> _Turn:
    """The content of somebody else's message, and its end of turn if it has one."""
    start, stop = spans.of[i] or (0, 0)
    if not spans.exact[i]:
        raise UserError(
            f"{name}: the chat template of {chat.directory} rewrites message {i} "
            f"({said.messages[i].role}), which is to be learnt"
        )
    space = len(text[stop:]) - len(text[stop:].lstrip())
    ends = text.startswith(chat.end_of_turn, stop + space)
    end = stop + space + len(chat.end_of_turn) if ends else stop
    return _Turn(*_tokens_of(text, offsets, start, end, name), start, stop, (start, stop))


def _as_it_is(
    chat: Chat, said: _Said, targets: tuple[Target, ...], prompt: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The generation prompt, and what a model has to write after it to say the last message."""
    message = said.messages[-1]
    prompt_ids, prompt_flags = _rendered(chat, said.before(-1), targets[:-1], name)
    content = message.content
    if prompt.rstrip().endswith(_OPENS):  # what it has begun with already
        space = prompt[len(prompt.rstrip()) :]
        content = content.lstrip().removeprefix(_OPENS).removeprefix(space)
    text = prompt + content + chat.end_of_turn
    ids, offsets = _tokenize(chat, text)
    if not np.array_equal(ids[: len(prompt_ids)], prompt_ids):
        raise _does_not_follow(chat, message, prompt, name)
    _check_rows(chat, ids, name)
    logging.log_first_n(
        logging.INFO,
        "%s: the chat template of %s leaves the thoughts of answers out; the last answer of a row"
        " follows the generation prompt as it is",
        *(1, name, chat.directory),
    )
    flags = np.concatenate([prompt_flags, np.zeros(len(ids) - len(prompt_ids), bool)])
    begin, end = len(prompt), len(text) - len(chat.end_of_turn)
    turn = _Turn(len(prompt_ids), len(ids), begin, end, None)
    _flag(flags, offsets, text, targets[-1], message.content, turn)
    ids.flags.writeable = flags.flags.writeable = False
    return ids, flags


def matches(pattern: str, text: str) -> tuple[tuple[int, int], ...]:
    """(start, end) of each match that is not empty."""
    return tuple(m.span() for m in re.finditer(pattern, text) if m.end() > m.start())


def _flag(
    flags: np.ndarray, offsets: np.ndarray, text: str, target: Target, content: str, turn: _Turn
) -> None:
    """Flags what is a target of a message that stands in `turn`."""
    start, stop = turn.content or (turn.begin, turn.end)
    if turn.content is None:
        content = text[start:stop]
    if isinstance(target, Sought):
        found = re.search(target.pattern, content) is not None
        target = found if target.whole else matches(target.pattern, content)
    if isinstance(target, bool):
        flags[turn.first : turn.after] |= target
        return
    begun = start - content.index(text[start:stop])  # before white space that is trimmed
    first, last = offsets[turn.first : turn.after].T
    for a, b in target:
        a, b = max(begun + a, start), min(begun + b, stop)
        flags[turn.first : turn.after] |= (last > a) & (first < b)


def _check_rows(chat: Chat, ids: np.ndarray, name: str) -> None:
    """A lookup beyond the embedding would give its last row, in silence."""
    beyond = ids[ids >= chat.vocab_size] if chat.vocab_size is not None else ids[:0]
    if beyond.size:
        token = chat.tokenizer.convert_ids_to_tokens(int(beyond[0]))
        raise UserError(
            f"{name}: the token {token!r} (id {beyond[0]}) has no row in the embedding of"
            f" {chat.directory}, which has {chat.vocab_size}; remove it from the text"
        )


def _tokens_of(text: str, offsets: np.ndarray, start: int, end: int, name: str) -> tuple[int, int]:
    """Numbers of the first token of text[start:end] and of the first one after it."""
    overlapping = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
    if overlapping.size == 0:
        return 0, 0
    first, last = int(overlapping[0]), int(overlapping[-1])
    # A line break that merges with the header's own is a token like another; letters are not.
    if (text[offsets[first, 0] : start] + text[end : offsets[last, 1]]).strip():
        raise UserError(
            f"{name}: a token holds both the end of a target message and what stands beside it: "
            f"{text[offsets[first, 0] : start + 20]!r} ... {text[end - 20 : offsets[last, 1]]!r}"
        )
    return first, last + 1


def _tokenize(chat: Chat, text: str) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [T] and the characters [T, 2] that each token stands for."""
    # The template writes the special tokens itself, bos included.
    encoded = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.asarray(encoded["input_ids"], np.int32), offsets
