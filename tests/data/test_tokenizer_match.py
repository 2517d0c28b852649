"""Tokenizers against each other, and against the rows of an embedding."""

import dataclasses
import json
import logging
import pathlib

import pytest

from gkdjax.data.chat_template import load_chat
from gkdjax.data.tokenizer_match import of_model, shared_ids, stopping_with, tokens_without_row
from gkdjax.types import Message
from gkdjax.utils.errors import UserError


def test_one_tokenizer_may_have_added_tokens_that_the_other_lacks(chat_dir, chat_of, caplog):
    chat, grown = (load_chat(chat_dir("llama3")) for _ in range(2))
    assert shared_ids(chat, chat_of("gemma")) is None
    first = grown.tokenizer.add_tokens(["<think>", "</think>"]) and len(chat.tokenizer)
    with caplog.at_level(logging.WARNING, "absl"):
        assert [shared_ids(chat, grown), shared_ids(grown, chat)] == [first] * 2
    said = [record.getMessage().split(" (")[0] for record in caplog.records]
    assert said == [
        f"the tokenizers part at id {first}, '<think>' in the teacher's",
        f"the tokenizers part at id {first}, no token of the teacher's",
    ]


def renamed(chat_dir, changes: dict[str, str]):
    """The chat of "llama3", with other names for some of its special tokens."""
    directory = pathlib.Path(chat_dir("llama3"))
    for path in directory.iterdir():
        text = path.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text)
    return load_chat(directory)


def test_a_token_that_ends_text_for_both_may_have_two_names(chat_dir, chat_of):
    """As R1-Distill's over Qwen 2.5: behind it the added tokens are others."""
    chat = chat_of("llama3")
    end = chat.stop_ids[0]
    assert shared_ids(chat, renamed(chat_dir, {"<|eot_id|>": "<|over|>"})) is None
    other = {"<|end_header_id|>": "<|head|>", "<|eot_id|>": "<|over|>"}
    with pytest.raises(UserError, match=r"id \d+, '<\|head\|>' in .* ends its text with '<\|over"):
        shared_ids(chat, renamed(chat_dir, other))
    assert chat.tokenizer.convert_tokens_to_ids("<|end_header_id|>") < end


def test_tokenizers_of_other_words_or_ways_of_cutting_are_refused(chat_dir, chat_of):
    chat, other = chat_of("llama3"), pathlib.Path(chat_dir("llama3"))
    path = other / "tokenizer.json"
    state = json.loads(path.read_text())
    vocab, last = state["model"]["vocab"], len(state["model"]["vocab"])
    path.write_text(json.dumps(state | {"model": state["model"] | {"vocab": vocab | {"zq": last}}}))
    with pytest.raises(
        UserError, match=rf"id {last}, 'zq' in the teacher's .*, no token of the stu"
    ):
        shared_ids(chat, load_chat(other))
    path.write_text(json.dumps(state | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(UserError, match=r"goes on with .* by the teacher's .* by the student's"):
        shared_ids(chat, load_chat(other))


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
    rows = len(chat.tokenizer)
    if missing == "a word":
        chat.tokenizer.add_tokens(["gkd"])
    else:
        rows = chat.stop_ids[0]
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
    told = str(caught.value)
    for chat in (student, teacher):
        assert chat.directory in told and f"{chat.end_of_turn} ({chat.stop_ids[0]})" in told
    assert f"add {teacher.stop_ids[0]} to eos_token_id" in told
    with pytest.raises(UserError, match=r"the teacher was trained with$"):  # no token of ours
        stopping_with(student, dataclasses.replace(teacher, shared=teacher.stop_ids[0]))
    # As the message advises: the student stops at the teacher's end as well.
    student = stopping("gemma", "<eos>", "<|eot_id|>")
    assert stopping_with(student, teacher) is student and "learns to end with" in caplog.text
    same = stopping("llama3", "<eos>")
    assert stopping_with(same, teacher) is same


def test_the_student_stops_wherever_the_teachers_text_ends(stopping):
    student, teacher = stopping("llama3", "<eos>"), stopping("llama3", "<eos>", "<|im_end|>")
    assert set(teacher.stop_ids) - set(student.stop_ids) == {
        student.tokenizer.convert_tokens_to_ids("<|im_end|>")
    }
    found = stopping_with(student, teacher)
    assert set(found.stop_ids) == set(teacher.stop_ids)
    assert found.stop_ids[: len(student.stop_ids)] == student.stop_ids
    assert stopping_with(teacher, student) is teacher
