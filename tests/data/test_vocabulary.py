"""Tokenizers against each other, and against the rows of an embedding."""

import json
import pathlib

import pytest

from gkdjax.data.chat import load_chat
from gkdjax.data.vocabulary import difference, of_model, stopping_with, tokens_without_row
from gkdjax.errors import UserError
from gkdjax.types import Message


def test_vocabularies_are_compared_by_token_and_id(chat_dir, chat_of):
    directory = chat_dir("llama3")
    chat = load_chat(directory)
    assert difference(chat, chat_of("gemma")) is None
    grown = load_chat(directory)
    grown.tokenizer.add_tokens(["gkd"])
    for pair in ((chat, grown), (grown, chat)):
        assert f"'gkd' (id {len(grown.tokenizer) - 1}) is in" in difference(*pair)
    path = pathlib.Path(directory) / "tokenizer.json"
    path.write_text(path.read_text().replace("<|eot_id|>", "<|other|>"))
    (pathlib.Path(directory) / "chat_template.jinja").write_text(
        chat.tokenizer.chat_template.replace("<|eot_id|>", "<|other|>")
    )
    found = difference(chat, load_chat(directory))
    assert "is '<|eot_id|>' in" in found and "and '<|other|>' in" in found


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
