"""Whether tokenizers fit each other, and the embedding whose rows their tokens name."""

import dataclasses

from absl import logging

from gkdjax.data.chat import Chat
from gkdjax.errors import UserError
from gkdjax.types import Message


def difference(a: Chat, b: Chat) -> str | None:
    """None if both tokenizers give the same ids to the same tokens, else the first difference."""
    tokens_a, tokens_b = ({i: t for t, i in c.tokenizer.get_vocab().items()} for c in (a, b))
    if tokens_a == tokens_b:
        return None
    shared = tokens_a.keys() & tokens_b.keys()
    differing = sorted(i for i in shared if tokens_a[i] != tokens_b[i])
    if differing:
        i = differing[0]
        return f"id {i} is {tokens_a[i]!r} in {a.directory} and {tokens_b[i]!r} in {b.directory}"
    i = min(tokens_a.keys() ^ tokens_b.keys())
    has, lacks = (a, b) if i in tokens_a else (b, a)
    token = (tokens_a | tokens_b)[i]
    return f"{token!r} (id {i}) is in {has.directory} and not in {lacks.directory}"


def tokens_without_row(chat: Chat, vocab_size: int) -> list[tuple[int, str]]:
    """(id, token) of the tokenizer's tokens for which an embedding of `vocab_size` has no row.

    Special ones may lack it, though no row of data may then use them: Gemma 3's smaller models,
    which see no images, have the tokenizer of the larger ones.

    Raises:
      UserError: text, the chat template or padding can bring one of them.
    """
    ids = chat.tokenizer.get_vocab()
    beyond = sorted((i, token) for token, i in ids.items() if i >= vocab_size)
    if beyond and any(i in _needed(chat) for i, _ in beyond):
        named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:5])
        raise UserError(
            f"{chat.directory}: the embedding has {vocab_size} rows and none for {len(beyond)}"
            f" tokens of the tokenizer, {named}; the two belong to different models"
        )
    return beyond


def of_model(chat: Chat, vocab_size: int) -> Chat:
    """`chat` for a model of so many rows; it refuses text with a token that has none.

    Raises:
      UserError: as `tokens_without_row`.
    """
    tokens_without_row(chat, vocab_size)
    return dataclasses.replace(chat, vocab_size=vocab_size)


def stopping_with(student: Chat, teacher: Chat) -> Chat:
    """The student's chat, which stops wherever the teacher's text ends.

    The student learns to end as the teacher does: its evaluation and its exports stop there too.

    Args:
      student: its chat.
      teacher: the chat of a teacher with the same ids for the same tokens.

    Raises:
      UserError: the teacher ends a turn with a token that the student does not stop at.
    """
    ends = student.stop_ids[0], teacher.stop_ids[0]
    (own, id_own), (other, id_other) = (
        (chat.end_of_turn, i) for chat, i in zip((student, teacher), ends, strict=True)
    )
    if id_other not in student.stop_ids:
        raise UserError(
            f"the chat template of the teacher ({teacher.directory}) ends a turn with {other}"
            f" ({id_other}), and the student ({student.directory}), whose template ends it with"
            f" {own} ({id_own}), does not stop there, so it would learn never to stop. Give both"
            " directories the same chat_template.jinja, the one that the teacher was trained with,"
            f" or, for the student to end as the teacher does, add {id_other} to eos_token_id in"
            " the student's generation_config.json"
        )
    if id_own != id_other:
        logging.warning(
            "the teacher ends a turn with %s (%d), the student's chat template with %s (%d): the"
            " student learns to end with the teacher's, at which it stops as well",
            *(other, id_other, own, id_own),
        )
    known = {*student.tokenizer.get_vocab().values()}
    more = [i for i in teacher.stop_ids if i not in student.stop_ids and i in known]
    return dataclasses.replace(student, stop_ids=(*student.stop_ids, *more)) if more else student


def _needed(chat: Chat) -> set[int]:
    """Ids that text, the chat template or padding can bring."""
    added = chat.tokenizer.added_tokens_decoder
    text = {
        i for i in chat.tokenizer.get_vocab().values() if i not in added or not added[i].special
    }
    return text | {*chat.stop_ids, chat.pad_id, *chat.prompt_ids([Message("user", "Hello")])}
