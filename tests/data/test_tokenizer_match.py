"""Tokenizers against each other, and against the rows of an embedding."""

import dataclasses
import json
import logging
import pathlib

import pytest

from gkdjax.data.chat_template import load_chat
from gkdjax.data.tokenizer_match import (
    of_model,
    shared_ids,
    stopping_with,
    tokens_without_row,
    with_tokenizer_of,
)
from gkdjax.types import Message
from gkdjax.utils.errors import UserError


def test_one_tokenizer_may_have_added_tokens_that_the_other_lacks(chat_dir, chat_of, caplog):
    chat, grown = (load_chat(chat_dir("llama3")) for _ in range(2))
    assert shared_ids(chat, chat_of("gemma")) is None
    first = grown.tokenizer.add_tokens(["<think>", "</think>"]) and len(chat.tokenizer)
    with caplog.at_level(logging.WARNING, "absl"):
        assert [shared_ids(chat, grown), shared_ids(grown, chat)] == [first] * 2
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"the tokenizers part at id {first}, '<think>' in the teacher's",
        f"the tokenizers part at id {first}, no token of the teacher's",
    ]


@pytest.fixture
def changed(chat_dir):
    """changed({text: other text}): the chat of "llama3" whose files have that text instead."""

    def make(changes: dict[str, str]):
        directory = pathlib.Path(chat_dir("llama3"))
        for path in directory.iterdir():
            text = path.read_text()
            for old, new in changes.items():
                text = text.replace(old, new)
            path.write_text(text)
        return load_chat(directory)

    return make


def test_a_token_that_ends_text_for_both_may_have_two_names(changed, chat_of):
    """As R1-Distill's over Qwen 2.5: behind it the added tokens are others."""
    assert shared_ids(chat_of("llama3"), changed({"<|eot_id|>": "<|over|>"})) is None


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"| trim": "| upper | lower"}, False),
        ({'"<pad>"': '"<fill>"'}, False),
        ({'"behavior": "Isolated"': '"behavior": "MergedWithNext"'}, False),
    ],
)
def test_two_directories_with_one_tokenizer_encode_a_text_once(changed, changes, same):
    chat, other = changed({}), changed(changes)
    found = with_tokenizer_of(chat, other)
    assert (found.tokenizer is chat.tokenizer, found.encoder is chat.encoder) == (same, same)
    assert found.directory == other.directory and found.stop_ids == other.stop_ids
    assert same or found is other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"<|end_header_id|>": "<|head|>", "<|eot_id|>": "<|over|>"},
            r"id \d+, '<\|head\|>' in .* ends its text with '<\|over",
        ),
        (
            {'"vocab": {': '"vocab": {"zq": 401,'},
            "id 401, 'zq' in the teacher's .*, no token of the",
        ),
        (
            {'"normalizer": null': '"normalizer": {"type": "Lowercase"}'},
            "goes on with .* by the teacher's .* by the student's",
        ),
    ],
)
def test_tokenizers_of_other_words_or_ways_of_cutting_are_refused(
    changed, chat_of, changes, message
):
    with pytest.raises(UserError, match=message):
        shared_ids(chat_of("llama3"), changed(changes))


def test_a_special_token_may_lack_a_row_if_no_text_uses_it(chat_dir):
    chat = load_chat(chat_dir("gemma"))
    rows = len(chat.tokenizer)
    assert tokens_without_row(chat, rows) == []
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokens_without_row(chat, rows) == [(rows, "<image>")]
    fitted = of_model(chat, rows)
    fitted.prompt_ids([Message("user", "an image")])
    with pytest.raises(UserError, match=rf"row 3: the token '<image>' \(id {rows}\) has no row"):
        fitted.prompt_ids([Message("user", "an <image>")], "row 3")
    of_model(chat, rows + 1).prompt_ids([Message("user", "an <image>")])


@pytest.mark.parametrize("missing", ["a word", "the end of a turn"])
def test_a_token_that_text_or_the_template_needs_must_have_a_row(chat_dir, missing):
    chat = load_chat(chat_dir("gemma"))
    rows = len(chat.tokenizer) if missing == "a word" else chat.stop_ids[0]
    chat.tokenizer.add_tokens(["gkd"])
    with pytest.raises(UserError, match=rf"has {rows} rows and none for .* different models"):
        of_model(chat, rows)


@pytest.fixture
def stopping(chat_dir):
    """stopping(template, "<a>", ...): a chat whose generation_config.json lists these tokens."""

    def make(template: str, *tokens: str):
        directory = chat_dir(template)
        ids = load_chat(directory).tokenizer.convert_tokens_to_ids(tokens)
        path = pathlib.Path(directory) / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": ids}))
        return load_chat(directory)

    return make


def test_a_teacher_must_end_turns_where_the_student_stops(stopping, caplog):
    student, teacher = stopping("gemma", "<eos>"), stopping("llama3", "<eos>")
    with pytest.raises(UserError) as caught:
        stopping_with(student, teacher)
    message = str(caught.value)
    for chat in (student, teacher):
        assert chat.directory in message and f"{chat.end_of_turn} ({chat.stop_ids[0]})" in message
    assert f"add {teacher.stop_ids[0]} to eos_token_id" in message
    with pytest.raises(UserError, match=r"the teacher was trained with$"):  # no token of ours
        stopping_with(student, dataclasses.replace(teacher, shared=teacher.stop_ids[0]))
    # As the message advises: the student stops at the teacher's end as well.
    student = stopping("gemma", "<eos>", "<|eot_id|>")
    assert stopping_with(student, teacher) is student and "learns to end with" in caplog.text


def test_the_student_stops_wherever_the_teachers_text_ends(stopping):
    student, teacher = stopping("llama3", "<eos>"), stopping("llama3", "<eos>", "<|im_end|>")
    more = student.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stopping_with(student, teacher).stop_ids == (*student.stop_ids, more)
    assert stopping_with(teacher, student) is teacher
