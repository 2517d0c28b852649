"""Turns messages into token ids and target flags, through the tokenizer's own chat template.

The targets of an assistant's message are what the template writes after its own generation prompt,
up to the end of turn, be it text, a thought or a tool call: a model has to write just that.
`template` finds the messages in the rendering, and what it leaves out of them.
"""

import copy
import dataclasses
import datetime
import functools
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import transformers
from absl import logging

from gkdjax.data.encoding import Encoded, Encoder, encoder_of
from gkdjax.data.row_schema import TOOL_ROLES
from gkdjax.data.template import PLACEHOLDER, SYSTEM_ADVICE, Misfit, Template, find, thinks
from gkdjax.data.tokenizer_files import load_tokenizer
from gkdjax.types import Message
from gkdjax.utils import files
from gkdjax.utils.errors import UserError

# Llama 3's template writes today's date; this fixed one is its own fallback.
_FIXED_KWARGS = {"date_string": "26 Jul 2024"}
_SWITCH = "enable_thinking"  # the variable of templates that can leave thoughts out
_THINK = "<think>"
_BEGINS_BLANK = re.compile(r"\s*<think>\s")

Spans = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class PatternTarget:
    """A pattern to be searched for in the text that the template writes of a message."""

    pattern: str
    whole: bool  # the whole message is a target where it is found; False: only the matches

    def resolve(self, text: str) -> bool | Spans:
        if self.whole:
            return re.search(self.pattern, text) is not None
        return tuple(m.span() for m in re.finditer(self.pattern, text) if m.end() > m.start())


# What is learnt of a message: nothing; its content and end of turn (an assistant's: all that
# follows the generation prompt); spans (start, end) of characters of its content; or a pattern.
Target = bool | Spans | PatternTarget


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: one tokenizer, one chat
class Chat:
    """A tokenizer with its chat template; made by `load_chat`."""

    directory: str
    tokenizer: transformers.PreTrainedTokenizerBase
    pad_id: int
    stop_ids: tuple[int, ...]  # any of them ends a response; the template's end of turn is first
    end_of_turn: str  # text of the special token after an assistant's content
    template_kwargs: dict
    vocab_size: int | None = None  # rows of the model's embedding; None: no model yet
    shared: int | None = None  # a teacher's: the student has the ids below it; None: all
    clock: datetime.datetime | None = None  # the time that the template sees; None: the real one

    def prompt_ids(
        self, messages: Sequence[Message], name: str = "a prompt", tools: str = ""
    ) -> np.ndarray:
        """Returns what a model reads before it answers: int32 [T], see `render`."""
        none, how = (False,) * len(messages), {"generation_prompt": True, "tools": tools}
        return self.render(tuple(messages), none, name, **how)[0]

    def render(
        self,
        messages: tuple[Message, ...],
        targets: tuple[Target, ...],
        name: str,
        *,
        generation_prompt: bool = False,
        tools: str = "",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Renders a conversation: the ids of `apply_chat_template`, and which are targets.

        "<start_of_turn>model\\nYes.<end_of_turn>\\n" has the flags 0 0 0 1 1 1 0: Yes . <end>.
        With spans, every token that holds a character of them is a target, the end of turn is not.
        A template may leave out the `<think>` block of every answer, as it does in a history; the
        last answer, if it is a target, then follows the generation prompt unchanged.

        Args:
          messages, targets: as many of both, at least one.
          name: of the row; errors begin with it.
          generation_prompt: append the header of the assistant's next message.
          tools: JSON list of the template's tools; "": none.

        Returns:
          ids int32 [T] and flags bool [T], both read-only.

        Raises:
          UserError: the template refuses the roles, drops or rewrites a message, does not write a
            tool, a call or a thought, or does not continue its generation prompt with a target.
        """
        try:
            return self._rendered(messages, targets, generation_prompt, tools)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error.__cause__

    # Rows come back every epoch and with each of their completions, and without a prefix both
    # views are one. The cache keeps its chats alive: a process has few.
    @functools.lru_cache(maxsize=16384)  # noqa: B019
    def _rendered(
        self,
        messages: tuple[Message, ...],
        targets: tuple[Target, ...],
        generation_prompt: bool,
        tools: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        rendering = self._conversation(messages, generation_prompt, tools).unflagged()
        for i, target in enumerate(targets):
            if target and messages[i].role != "assistant":
                rendering.flag_content(i, target)
            elif target:
                prompt = self.template.text(messages[:i], tools, True)
                if rendering.drops_thought(i, target, prompt):
                    before = self._rendered(messages[:-1], targets[:-1], True, tools)
                    rendering.write_unchanged(target, prompt, *before)
                else:
                    rendering.flag_answer(i, target, len(prompt))
        rendering.ids.flags.writeable = rendering.flags.flags.writeable = False
        return rendering.ids, rendering.flags

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def _conversation(
        self, messages: tuple[Message, ...], generation_prompt: bool, tools: str
    ) -> "_Rendering":
        return _Rendering(self, messages, generation_prompt, tools)

    @functools.cached_property
    def template(self) -> Template:
        return Template(self.directory, self.tokenizer, self.template_kwargs, self.clock)

    @functools.cached_property
    def earlier_answers(self) -> bool:
        """Whether an answer before the last one can be a target.

        Some templates, like Qwen 3's, write the last answer differently: an earlier one then does
        not follow its generation prompt, or is not what a model would have to write there.
        """
        talk = (Message("user", "Why?"), Message("assistant", "So.")) * 2
        first, learnt = (False, True, False, False), []
        for end, prompt in ((3, True), (4, False), (2, False)):
            try:
                how = {"generation_prompt": prompt}
                ids, flags = self.render(talk[:end], first[:end], "a probe", **how)
            except UserError:
                return end == 2  # no answer can be learnt at an end
            learnt.append(ids[flags])
        return np.array_equal(*learnt[1:])

    def tokenize(self, text: str) -> Encoded:
        """Returns ids int32 [T] and the characters of each token, int64 [T, 2]."""
        return self.encoder(text)

    @functools.cached_property
    def encoder(self) -> Encoder:
        return encoder_of(self.tokenizer, self.template.source)

    @functools.cached_property
    def stop_texts(self) -> list[str]:
        """The texts of the stop tokens."""
        return self.tokenizer.convert_ids_to_tokens(self.stop_ids)

    @functools.cached_property
    def added_stops(self) -> list[str]:
        """Those of them that are found in any text."""
        added = self.tokenizer.added_tokens_decoder
        return [added[stop].content for stop in self.stop_ids if stop in added]

    def stop_tokens(self) -> str:
        """Lists the stop tokens for people: "<end_of_turn> (106), <eos> (1)"."""
        tokens = self.tokenizer.convert_ids_to_tokens(self.stop_ids)
        return ", ".join(f"{t} ({i})" for t, i in zip(tokens, self.stop_ids, strict=True))

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Decodes ids, by default without special tokens; white space stays as it is."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )


def load_chat(
    directory: str | pathlib.Path,
    template_kwargs: dict | None = None,
    clock: datetime.datetime | None = None,
) -> Chat:
    """Reads the tokenizer, its chat template and the stop tokens of a Hugging Face directory.

    `template_kwargs` are for the template, like {"enable_thinking": False}.

    Raises:
      UserError: no such directory, no fast tokenizer in it, no chat template, or one that ends no
        turn with a special token; generation_config.json is damaged.
    """
    tokenizer, root = load_tokenizer(directory), pathlib.Path(directory)
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
    kwargs = _FIXED_KWARGS | (template_kwargs or {})
    end = _end_of_turn_id(Template(str(directory), tokenizer, kwargs, clock))
    declared = _declared_stops(root / "generation_config.json", len(tokenizer))
    stops = [i for i in (end, *declared, tokenizer.eos_token_id) if i is not None]
    # Padding is always masked, so any id will do for a tokenizer without a pad token.
    pad_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    end_of_turn = tokenizer.convert_ids_to_tokens(end)
    unique = tuple(dict.fromkeys(stops))
    return Chat(str(directory), tokenizer, pad_id, unique, end_of_turn, kwargs, clock=clock)


def _end_of_turn_id(template: Template) -> int:
    """The special token that a rendered conversation has right after the assistant's content."""
    tokenizer = template.tokenizer
    probe = (Message("user", "gkdjaxcontent0end"), Message("assistant", "gkdjaxcontent1end"))
    try:
        text = template.text(probe)
    except UserError as error:
        raise UserError(f"a question: {error}") from error.__cause__
    after = PLACEHOLDER.split(text)[-1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    tokens = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    if after == text or not tokens or tokens[0] not in special:
        raise UserError(
            f"{template.directory}: the chat template must write an assistant's message as it is"
            " and end it with a special token, or nothing would tell the model to stop; it makes"
            f" the end {text[-40:]!r}. Take an instruction-tuned model, or give the directory's"
            " chat_template.jinja an end-of-turn token and tokenizer.json that token as special"
        )
    return tokens[0]


def _declared_stops(path: pathlib.Path, num_tokens: int) -> list[int | None]:
    stops = files.read_object(path).get("eos_token_id") if path.exists() else None
    stops = stops if isinstance(stops, list) else [stops]
    for stop in stops:
        if stop is not None and (type(stop) is not int or not 0 <= stop < num_tokens):
            raise UserError(
                f"{path}: eos_token_id {stop!r} is no id of the tokenizer, which has {num_tokens}"
                " tokens"
            )
    return stops


class _Rendering:
    """One conversation: its text and tokens, and where its messages stand in them."""

    def __init__(self, chat: Chat, messages, generation_prompt: bool, tools: str):
        self.chat, self.messages = chat, messages
        self.generation_prompt = generation_prompt
        how = tools, generation_prompt
        self.text = chat.template.text(messages, *how)
        try:
            self.spans = find(messages, self.text, lambda m: chat.template.between(m, *how))
        except Misfit as misfit:
            raise self._misfit(misfit.dropped) from None
        if tools or any(message.fields for message in messages):
            for i in chat.template.lost_thoughts(messages, self.text, *how):
                self.spans.lost[i] = True
        self._tokenize()

    def unflagged(self) -> "_Rendering":
        """Returns the same without targets."""
        other = copy.copy(self)
        other.flags = np.zeros(len(self.ids), bool)
        return other

    def _tokenize(self) -> None:
        self.ids, self._offsets = self.chat.tokenize(self.text)
        self.flags = np.zeros(len(self.ids), bool)
        # A lookup beyond the embedding would silently give its last row.
        rows = self.chat.vocab_size
        if rows is not None and self.ids.max(initial=0) >= rows:
            found = int(self.ids[self.ids >= rows][0])
            token = self.chat.tokenizer.convert_ids_to_tokens(found)
            raise UserError(
                f"the token {token!r} (id {found}) has no row in the embedding of"
                f" {self.chat.directory}, which has {rows}; remove it from the text"
            )

    def _refusal(self, what: str) -> UserError:
        return UserError(f"the chat template of {self.chat.directory} {what}")

    def _misfit(self, dropped: int | None) -> UserError:
        if dropped is None:
            return self._refusal(
                "rewrites, repeats or reorders what the messages say, so it cannot be told which"
                " tokens are theirs"
            )
        role, _, fields, _ = self.messages[dropped]
        advice = SYSTEM_ADVICE if role == "system" else ""
        if role == "assistant" and "tool_calls" in fields:
            advice = "; it writes the calls alone: remove the text beside them"
        if role in TOOL_ROLES[1:]:
            advice = f"; rename the role {TOOL_ROLES[0]!r} if it is the result of a tool"
        return self._refusal(f"drops message {dropped} ({role}) without a word{advice}")

    def _check_stops(self, i: int, target: Target) -> None:
        """Refuses a stop token in what is to be learnt of a message."""
        message = self.messages[i]
        content = [message.content]
        if isinstance(target, tuple):
            content = [message.content[a:b] for a, b in target]
        for stop in self.chat.added_stops:
            if any(stop in text for text in (*content, message.fields)):
                raise UserError(
                    f"message {i} has {stop!r} in what is to be learnt, at which the model stops:"
                    " what comes after it would never be written; remove it from the text (the"
                    " template ends a turn by itself)"
                )

    def drops_thought(self, i: int, target: Target, prompt: str) -> bool:
        """Whether the last answer is written without its thought, so not as a model writes it.

        Raises:
          UserError: message i is not the last, does not follow the generation prompt, or brings an
            empty thought for which the user did not ask.
        """
        self._check_stops(i, target)
        message, at, template = self.messages[i], self.spans.at[i], self.chat.template
        follows = self.text.startswith(prompt) and self._begins_with(self.chat.encoder.ids(prompt))
        if follows and not self.spans.lost[i]:
            rest = self.text[len(prompt) : at and at[0]].lstrip()
            added = not thinks(message) and (rest if at else rest.startswith(_THINK))
            # Only the user can say whether an answer without a thought teaches not to think.
            if not added or _SWITCH not in template.source or _SWITCH in template.kwargs:
                return False
            raise UserError(
                f"message {i} has no thought, and the chat template of"
                f" {self.chat.directory} writes an empty one before it, which would be learnt;"
                f" data.template_kwargs={{'{_SWITCH}': False}} puts it into the prompt, and"
                f" {{'{_SWITCH}': True}} learns it"
            )
        last = i + 1 == len(self.messages) and not self.generation_prompt
        inline = "</think>" in message.content and "tool_calls" not in message.fields
        begun = prompt.rstrip()
        opened = begun.endswith(_THINK) or self.spans.lost[i]
        if last and inline and opened and not begun.endswith("</think>"):
            return True
        if follows:
            where = "" if last else " where others follow it"
            raise self._refusal(
                f"leaves the thought of message {i} out{where}, so that it cannot be learnt there"
            )
        raise self._does_not_follow(message, prompt)

    def _begins_with(self, prompt_ids: np.ndarray) -> bool:
        return np.array_equal(self.ids[: len(prompt_ids)], prompt_ids)

    def _does_not_follow(self, message: Message, prompt: str) -> UserError:
        template, opened = self.chat.template, prompt.rstrip().endswith(_THINK)
        advice = ""
        if message.content[:1].isspace():
            advice = "; white space at the start of the message can do that"
        if _SWITCH in template.source and not thinks(message):
            advice += (
                "; an answer that has no thought of its own wants data.template_kwargs={'"
                f"{_SWITCH}': False}}"
            )
        elif opened and not thinks(message):
            advice += (
                "; it opens a thought, and the answer has none: begin it with <think>...</think>"
            )
        elif opened and _BEGINS_BLANK.match(message.content):
            advice += (
                "; the white space after its <think> goes into one token with the prompt's: remove"
                " it, as <think></think> where the thought is empty"
            )
        elif thinks(message) and _SWITCH in template.kwargs:
            advice += f"; it has a thought: leave {_SWITCH!r} out of data.template_kwargs"
        return self._refusal(
            f"does not continue its own generation prompt {prompt[-40:]!r} with the assistant's"
            f" message, so training would not match inference{advice}"
        )

    def flag_answer(self, i: int, target: Target, begin: int) -> None:
        """Flags what follows the generation prompt, of `begin` characters, up to the end of turn"""
        message, at, chat = self.messages[i], self.spans.at[i], self.chat
        stop = at[1] if at else begin
        next_start = next((s[0] for s in self.spans.at[i + 1 :] if s), len(self.text))
        rest = self.text[stop:next_start]
        ends = ((rest.index(token), token) for token in chat.stop_texts if token in rest)
        space, token = min(ends, default=(0, None))
        exact = at and self.spans.exact[i]
        if exact and "tool_calls" not in message.fields:
            token = token if token == chat.end_of_turn and not rest[:space].strip() else None
        if token is None:
            raise self._refusal(f"does not end an assistant's message with {chat.end_of_turn} here")
        tokens = self._tokens_of(begin, stop + space + len(token))
        if exact and not message.fields:
            self._flag(target, tokens, *at, message.content)
        else:
            self._flag(target, tokens, begin, stop + space)

    def flag_content(self, i: int, target: Target) -> None:
        """Flags the content of another role's message, and its end of turn if it has one."""
        self._check_stops(i, target)
        start, stop = self.spans.at[i] or (0, 0)
        if not self.spans.exact[i]:
            role = self.messages[i].role
            raise self._refusal(f"rewrites message {i} ({role}), which is to be learnt")
        rest, end_of_turn = self.text[stop:].lstrip(), self.chat.end_of_turn
        ends = rest.startswith(end_of_turn)
        end = len(self.text) - len(rest) + len(end_of_turn) if ends else stop
        tokens = self._tokens_of(start, end)
        self._flag(target, tokens, start, stop, self.messages[i].content)

    def write_unchanged(self, target: Target, prompt: str, prompt_ids, prompt_flags) -> None:
        """Writes the last answer unchanged after the generation prompt."""
        content = self.messages[-1].content
        if prompt.rstrip().endswith(_THINK):  # the prompt has begun the answer already
            space = prompt[len(prompt.rstrip()) :]
            content = content.lstrip().removeprefix(_THINK).removeprefix(space)
        self.text = prompt + content + self.chat.end_of_turn
        self._tokenize()
        if not self._begins_with(prompt_ids):
            raise self._does_not_follow(self.messages[-1], prompt)
        logging.log_first_n(
            logging.INFO,
            "the chat template of %s leaves the thoughts of answers out; the last answer of a row"
            " follows the generation prompt as it is",
            *(1, self.chat.directory),
        )
        self.flags[: len(prompt_ids)] = prompt_flags
        tokens = self._tokens_of(len(prompt), len(self.text))
        self._flag(target, tokens, len(prompt), len(prompt + content))

    def _flag(self, target: Target, tokens: slice, start: int, stop: int, content=None) -> None:
        """Flags the targets among the tokens of a message.

        Spans refer to `content`, which may stand trimmed at text[start:stop]; None: to this text.
        """
        text = self.text[start:stop]
        content = text if content is None else content
        if isinstance(target, PatternTarget):
            target = target.resolve(content)
        if isinstance(target, bool):
            self.flags[tokens] |= target
            return
        shift = start - content.index(text)
        first, last = self._offsets[tokens].T
        for a, b in target:
            a, b = max(shift + a, start), min(shift + b, stop)
            self.flags[tokens] |= (last > a) & (first < b)

    def _tokens_of(self, start: int, end: int) -> slice:
        """The tokens of text[start:end]."""
        text, offsets = self.text, self._offsets
        overlapping = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
        if overlapping.size == 0:
            return slice(0)
        first, last = int(overlapping[0]), int(overlapping[-1])
        # White space that merges with the header's own is a token like another; letters are not.
        if (text[offsets[first, 0] : start] + text[end : offsets[last, 1]]).strip():
            raise UserError(
                f"a token holds both the end of a target message and what stands"
                f" beside it: {text[offsets[first, 0] : start + 20]!r} ..."
                f" {text[end - 20 : offsets[last, 1]]!r}"
            )
        return slice(first, last + 1)
