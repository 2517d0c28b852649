"""Whether tokenizers fit each other, and the embedding whose rows their tokens name."""

import dataclasses

from absl import logging

from gkdjax.data.chat_template import Chat
from gkdjax.data.tokenizer_files import text_difference
from gkdjax.types import Message
from gkdjax.utils.errors import UserError


def shared_ids(student: Chat, teacher: Chat) -> int | None:
    """The first id at which two tokenizers part; None: nowhere.

    One may have added tokens that the other lacks, or has under another name, as Qwen 3 over
    Qwen 2.5 and R1-Distill over it have: then only the ids below are compared, and only they are
    written. What both stop at is one token, whatever its name. All else has to be the same: the
    ids of plain text, the token at which the teacher's text ends.

    Raises:
      UserError: that is not so; with the first token or the first text that differs.
    """
    a, b = ({i: t for t, i in c.tokenizer.get_vocab().items()} for c in (student, teacher))
    stops = {*student.stop_ids} & {*teacher.stop_ids}
    names = f"the teacher's ({teacher.directory})", f"the student's ({student.directory})"
    differing = [i for i in a.keys() | b.keys() if a.get(i) != b.get(i) and i not in stops]
    cut = min(differing, default=None)
    backends = (chat.tokenizer.backend_tokenizer for chat in (teacher, student))
    refused = text_difference(*backends, *names)
    if cut is not None and not refused:
        ends = teacher.stop_ids[0] >= cut
        added = all(
            {*c.tokenizer.added_tokens_decoder} >= {i for i in of if i >= cut}
            for c, of in ((student, a), (teacher, b))
        )
        if ends or not added:
            refused = _named(cut, b, a, *names)
            if ends:
                refused += f", and the teacher ends its text with {b[teacher.stop_ids[0]]!r}"
    if refused:
        raise UserError(
            f"the teacher's tokenizer is not the student's: {refused}. Distillation compares"
            " probabilities id by id, so both must be one, but for added tokens behind all others"
        )
    if cut is not None:
        logging.warning(
            "the tokenizers part at %s. Ids from there on are left out: nobody writes them, the"
            " student's probabilities are those of the others, and what the teacher gives them"
            " counts as outside its best (with teacher.top_k=None they are left out there, too)",
            _named(cut, b, a, *names),
        )
    return cut


def _named(i: int, a: dict[int, str], b: dict[int, str], of_a: str, of_b: str) -> str:
    said = [f"{of[i]!r} in" if i in of else "no token of" for of in (a, b)]
    return f"id {i}, {said[0]} {of_a}, {said[1]} {of_b}"


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
    known = {*student.tokenizer.get_vocab().values()}
    known = {i for i in known if teacher.shared is None or i < teacher.shared}
    if id_other not in student.stop_ids:
        as_the_teacher = (
            f", or, for the student to end as the teacher does, add {id_other} to eos_token_id in"
            " the student's generation_config.json"
        )
        raise UserError(
            f"the chat template of the teacher ({teacher.directory}) ends a turn with {other}"
            f" ({id_other}), and the student ({student.directory}), whose template ends it with"
            f" {own} ({id_own}), does not stop there, so it would learn never to stop. Give both"
            " directories the same chat_template.jinja, the one that the teacher was trained with"
            + (as_the_teacher if id_other in known else "")
        )
    if id_own != id_other:
        logging.warning(
            "the teacher ends a turn with %s (%d), the student's chat template with %s (%d): the"
            " student learns to end with the teacher's, at which it stops as well",
            *(other, id_other, own, id_own),
        )
    more = [i for i in teacher.stop_ids if i not in student.stop_ids and i in known]
    return dataclasses.replace(student, stop_ids=(*student.stop_ids, *more)) if more else student


def _needed(chat: Chat) -> set[int]:
    """Ids that text, the chat template or padding can bring."""
    added = chat.tokenizer.added_tokens_decoder
    text = {
        i for i in chat.tokenizer.get_vocab().values() if i not in added or not added[i].special
    }
    return text | {*chat.stop_ids, chat.pad_id, *chat.prompt_ids([Message("user", "Hello")])}
