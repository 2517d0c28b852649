"""Messages -> token ids and target flags, through the tokenizer's own chat template.

A template is a program, and where it puts a message's content is not for us to guess. So every
conversation is rendered twice: as it is, and with a placeholder for each content. What stands
between the placeholders is the template's own text; the two renderings must fit together to the
character, or the row is refused. That holds for templates that trim, fold the system message into
the first user turn, or treat the last turn apart, and it finds one that drops a message.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
import transformers

from gkdjax.data.stop_ids import PLACEHOLDER, stop_ids
from gkdjax.errors import UserError
from gkdjax.types import Message

# Llama 3's template writes the day of the rendering, so that a run would go on with other text the
# next day; this is the date that it falls back to itself.
_FIXED = {"date_string": "26 Jul 2024"}
_SYSTEM_ADVICE = (
    "; if it has no system role, put that text into a user turn of context.prefix_messages, "
    "or take a model whose template has the role"
)


# Of one message: False: nothing is a target; True: content and end of turn; or spans (start, end)
# of characters of its content.
Target = bool | tuple[tuple[int, int], ...]


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

    def prompt_ids(self, messages: Sequence[Message], name: str = "a prompt") -> np.ndarray:
        """What the model reads before it answers: int32 [T], with the assistant's header.

        Raises:
          UserError: the template refuses, drops or rewrites a message; `name` says whose.
        """
        return self.render(messages, (False,) * len(messages), name, generation_prompt=True)[0]

    def render(
        self,
        messages: Sequence[Message],
        targets: Sequence[Target],
        name: str,
        *,
        generation_prompt: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """A conversation's ids, equal to `apply_chat_template`'s, and which of them are targets.

        Of a target message its content and its end-of-turn token are targets, never its header.
        "<start_of_turn>model\\nYes.<end_of_turn>\\n" has the flags 0 0 0 1 1 1 0: Yes . <end>.
        Of spans every token that holds a character of them is a target, and no end of turn.

        Args:
          messages: at least one.
          targets: one a message.
          name: of the row; errors start with it.
          generation_prompt: append the header of the assistant's next message.

        Returns:
          ids int32 [T] and flags bool [T], both read-only.

        Raises:
          UserError: the template refuses the roles, drops or rewrites a message; or an assistant
            target does not follow from the prompt that a model would be given for it.
        """
        return _rendered(self, tuple(messages), tuple(targets), name, generation_prompt)

    @functools.cached_property
    def earlier_answers(self) -> bool:
        """Whether an answer that is not the last one can be a target.

        Not under a template that treats the last answer apart, as Qwen 3's does: what it writes of
        an earlier one does not follow from the prompt that a model would be given for it.
        """
        talk = (Message("user", "Why?"), Message("assistant", "So.")) * 2
        first = (False, True, False, False)
        try:
            self.render(talk, first, "a probe")
            self.render(talk[:3], first[:3], "a probe", generation_prompt=True)
        except UserError:
            return False
        return True

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


def load_chat(directory: str | pathlib.Path, template_kwargs: dict | None = None) -> Chat:
    """Reads the tokenizer, its chat template and the stop tokens of a Hugging Face directory.

    Args:
      directory: of the model.
      template_kwargs: for the template, as {"enable_thinking": False}.

    Raises:
      UserError: no such directory, no fast tokenizer in it, no chat template, or a template that
        ends no turn with a special token.
    """
    tokenizer = _load_tokenizer(directory)
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
    return Chat(str(directory), tokenizer, pad_id, ends, end_of_turn, template_kwargs)


def _load_tokenizer(directory: str) -> transformers.PreTrainedTokenizerBase:
    if not pathlib.Path(directory).is_dir():
        raise UserError(f"{directory}: no such model directory")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of transformers, of tokenizers, and KeyError for half a file
        raise UserError(f"{directory}: holds no tokenizer that can be read: {error!r}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: needs a tokenizer.json (a fast tokenizer, with offsets)")
    return tokenizer


# Rows come back every epoch, and with each of their trajectories: 0.3 ms for a view, or nothing.
@functools.lru_cache(maxsize=16384)
def _rendered(
    chat: Chat,
    messages: tuple[Message, ...],
    targets: tuple[Target, ...],
    name: str,
    generation_prompt: bool,
) -> tuple[np.ndarray, np.ndarray]:
    text = _template_text(chat, messages, generation_prompt, name)
    own, spans = _layout(chat, messages, text, generation_prompt, name)
    ids, offsets = _tokenize(chat, text)
    _check_rows(chat, ids, name)
    flags = np.zeros(len(ids), bool)
    for i, target in enumerate(targets):
        if not target:
            continue
        (start, stop), (role, content) = spans[i], messages[i][:2]
        end = _end(chat, role, stop, own[i + 1], name)
        first, after = _tokens_of(text, offsets, start, end, name)
        if role == "assistant":
            prompt = _template_text(chat, messages[:i], True, name)
            first = _first_written(chat, text, ids, prompt, start, name)
        if target is True:
            flags[first:after] = True
            continue
        begun = start - content.index(text[start:stop])  # before white space that is trimmed
        for a, b in target:
            a, b = max(begun + a, start), min(begun + b, stop)
            flags[first:after] |= (offsets[first:after, 1] > a) & (offsets[first:after, 0] < b)
    ids.flags.writeable = flags.flags.writeable = False
    return ids, flags


def _check_rows(chat: Chat, ids: np.ndarray, name: str) -> None:
    """A lookup beyond the embedding would give its last row, in silence."""
    beyond = ids[ids >= chat.vocab_size] if chat.vocab_size is not None else ids[:0]
    if beyond.size:
        token = chat.tokenizer.convert_ids_to_tokens(int(beyond[0]))
        raise UserError(
            f"{name}: the token {token!r} (id {beyond[0]}) has no row in the embedding of"
            f" {chat.directory}, which has {chat.vocab_size}; remove it from the text"
        )


def _template_text(
    chat: Chat, messages: Sequence[Message], generation_prompt: bool, name: str
) -> str:
    try:
        return chat.tokenizer.apply_chat_template(
            [message.for_template() for message in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **chat.template_kwargs,
        )
    except Exception as error:  # a template is a program
        roles = [message.role for message in messages]
        raise UserError(
            f"{name}: the chat template of {chat.directory} refuses the roles "
            f"{', '.join(roles)}: {error}{_SYSTEM_ADVICE if 'system' in roles else ''}"
        ) from error


def _layout(
    chat: Chat, messages: Sequence[Message], text: str, generation_prompt: bool, name: str
) -> tuple[list[str], list[tuple[int, int]]]:
    """The template's own n+1 pieces of `text`, and the n contents' spans between them."""
    blank = [m._replace(content=f"gkdjaxcontent{i}end") for i, m in enumerate(messages)]
    parts = PLACEHOLDER.split(_template_text(chat, blank, generation_prompt, name))
    own, order = parts[0::2], [int(i) for i in parts[1::2]]
    for i, message in enumerate(messages):
        if i not in order:
            raise UserError(
                f"{name}: the chat template of {chat.directory} drops message {i} "
                f"({message.role}) without a word{_SYSTEM_ADVICE}"
            )
    in_order = order == sorted(set(order))
    spans = _spans(text, [m.content for m in messages], own) if in_order else None
    if spans is None:
        raise UserError(
            f"{name}: the chat template of {chat.directory} rewrites, repeats or reorders what "
            "the messages say, so it cannot be told which tokens are theirs"
        )
    return own, spans


def _spans(text: str, contents: Sequence[str], own: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where each content stands in `text`, up to white space at its ends; None: nowhere."""
    if not text.startswith(own[0]):
        return None
    spans, position = [], len(own[0])
    for content, piece in zip(contents, own[1:], strict=True):
        for shown in (content, content.rstrip(), content.lstrip(), content.strip()):
            if text.startswith(shown + piece, position):
                break
        else:
            return None
        spans.append((position, position + len(shown)))
        position += len(shown) + len(piece)
    return spans if position == len(text) else None


def _end(chat: Chat, role: str, content_end: int, piece: str, name: str) -> int:
    """Where a target message ends in the text: after its end-of-turn token, if it has one."""
    space = len(piece) - len(piece.lstrip())
    if piece.startswith(chat.end_of_turn, space):
        return content_end + space + len(chat.end_of_turn)
    if role == "assistant":
        raise UserError(
            f"{name}: the chat template of {chat.directory} does not end an assistant's message "
            f"with {chat.end_of_turn} here"
        )
    return content_end


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


def _first_written(
    chat: Chat, text: str, ids: np.ndarray, prompt: str, start: int, name: str
) -> int:
    """The first token that a model writes after `prompt` to get to the content at `start`."""
    prompt_ids, _ = _tokenize(chat, prompt)
    follows = text.startswith(prompt) and not text[len(prompt) : start].strip()
    if not follows or not np.array_equal(ids[: len(prompt_ids)], prompt_ids):
        raise UserError(
            f"{name}: the chat template of {chat.directory} does not continue its own generation "
            f"prompt {prompt[-40:]!r} with the assistant's message, so training would not match "
            "inference; white space at the start of the message can do that, and a template that"
            " writes thinking: data.template_kwargs={'enable_thinking': False} turns Qwen 3's off"
        )
    return len(prompt_ids)


def _tokenize(chat: Chat, text: str) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [T] and the characters [T, 2] that each token stands for."""
    # The template writes the special tokens itself, bos included.
    encoded = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.asarray(encoded["input_ids"], np.int32), offsets
