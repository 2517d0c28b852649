"""Checks that tokenizers fit each other, and the embedding whose rows their tokens name."""

import dataclasses

from absl import logging

from gkdjax.data.chat_template import Chat
from gkdjax.data.tokenizer_files import text_difference
from gkdjax.types import Message
from gkdjax.utils.errors import UserError


def shared_ids(student: Chat, teacher: Chat) -> int | None:
    """Returns the first id at which two tokenizers differ; None: they are the same.

    One may have added tokens that the other lacks or names otherwise, as Qwen 3 over Qwen 2.5 has:
    then only the ids below are compared and written. A token at which both stop may have two names.

    Raises:
      UserError: they differ in more than added tokens, or in the end of the teacher's text.
    """
    a, b = ({i: t for t, i in c.tokenizer.get_vocab().items()} for c in (student, teacher))
    stops = {*student.stop_ids} & {*teacher.stop_ids}
    names = f"the teacher's ({teacher.directory})", f"the student's ({student.directory})"
    differing = [i for i in a.keys() | b.keys() if a.get(i) != b.get(i) and i not in stops]
    cut = min(differing, default=None)
    backends = (chat.tokenizer.backend_tokenizer for chat in (teacher, student))
    refused, first_differing = text_difference(*backends, *names), ""
    if cut is not None:
        texts = [f"{of[cut]!r} in" if cut in of else "no token of" for of in (b, a)]
        first_differing = f"id {cut}, {texts[0]} {names[0]}, {texts[1]} {names[1]}"
    if cut is not None and not refused:
        added = all(
            {*chat.tokenizer.added_tokens_decoder} >= {i for i in vocab if i >= cut}
            for chat, vocab in ((student, a), (teacher, b))
        )
        end = teacher.stop_ids[0]
        if end >= cut:
            refused = f"{first_differing}, and the teacher ends its text with {b[end]!r}"
        elif not added:
            refused = first_differing
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
            first_differing,
        )
    return cut


def with_tokenizer_of(other: Chat, chat: Chat) -> Chat:
    """Returns `chat` with the other's tokenizer if it is the same, so that a text is encoded once.

    A larger teacher of the student's family has files of its own that say the same.
    """

    def settings(tokenizer):
        yield from (type(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map)
        yield tokenizer.backend_tokenizer.to_str()

    a, b = other.tokenizer, chat.tokenizer
    same = a is not b and all(x == y for x, y in zip(settings(a), settings(b), strict=True))
    return dataclasses.replace(chat, tokenizer=a) if same else chat


def tokens_without_row(chat: Chat, vocab_size: int) -> list[tuple[int, str]]:
    """Returns (id, token) of the tokens for which an embedding of `vocab_size` has no row.

    Special tokens may lack one if no row of data uses them: Gemma 3's smaller models see no images
    and have the tokenizer of the larger ones.

    Raises:
      UserError: text, the chat template or padding can bring such a token.
    """
    vocab, added = chat.tokenizer.get_vocab(), chat.tokenizer.added_tokens_decoder
    beyond = sorted((i, token) for token, i in vocab.items() if i >= vocab_size)
    if beyond:
        needed = {i for i in vocab.values() if i not in added or not added[i].special}
        needed |= {*chat.stop_ids, chat.pad_id, *chat.prompt_ids([Message("user", "Hello")])}
        if any(i in needed for i, _ in beyond):
            named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:5])
            raise UserError(
                f"{chat.directory}: the embedding has {vocab_size} rows and none for {len(beyond)}"
                f" tokens of the tokenizer, {named}; the two belong to different models"
            )
    return beyond


def of_model(chat: Chat, vocab_size: int) -> Chat:
    """Returns the chat of a model with so many rows, which refuses text that needs another row."""
    if chat.vocab_size == vocab_size:
        return chat  # student and teacher of one directory render each row once
    tokens_without_row(chat, vocab_size)
    return dataclasses.replace(chat, vocab_size=vocab_size)


def stopping_with(student: Chat, teacher: Chat) -> Chat:
    """Returns the student's chat, which also stops wherever the teacher's text ends.

    The student learns to end as the teacher does: its evaluation and its exports stop there too.

    Raises:
      UserError: the teacher ends a turn with a token at which the student does not stop.
    """
    own, other = (f"{chat.end_of_turn} ({chat.stop_ids[0]})" for chat in (student, teacher))
    end = teacher.stop_ids[0]
    known = {
        i
        for i in student.tokenizer.get_vocab().values()
        if teacher.shared is None or i < teacher.shared
    }
    if end not in student.stop_ids:
        remedy = (
            f", or, for the student to end as the teacher does, add {end} to eos_token_id in the"
            " student's generation_config.json"
        )
        raise UserError(
            f"the chat template of the teacher ({teacher.directory}) ends a turn with {other}, and"
            f" the student ({student.directory}), whose template ends it with {own}, does not stop"
            " there, so it would learn never to stop. Give both directories the same"
            " chat_template.jinja, the one that the teacher was trained with"
            + (remedy if end in known else "")
        )
    if end != student.stop_ids[0]:
        logging.warning(
            "the teacher ends a turn with %s, the student's chat template with %s: the student"
            " learns to end with the teacher's, at which it stops as well",
            *(other, own),
        )
    more = [i for i in teacher.stop_ids if i not in student.stop_ids and i in known]
    return dataclasses.replace(student, stop_ids=(*student.stop_ids, *more)) if more else student
