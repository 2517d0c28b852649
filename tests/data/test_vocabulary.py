"""Tokenizers against each other, and against the rows of an embedding."""

import pathlib

import pytest

from gkdjax.data.chat import load_chat
from gkdjax.data.vocabulary import difference, of_model, tokens_without_row
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
