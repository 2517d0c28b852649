"""Ids and target flags, by properties over generated conversations and several templates."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax.data.chat_template import load_chat
from gkdjax.types import Message
from gkdjax.utils.errors import UserError

# Words of the headers, pieces of special tokens, white space, text outside ASCII.
_PIECES = (
    "user",
    "model",
    "assistant",
    "<end",
    "of_turn>",
    "\n",
    "\n\n",
    "  ",
    ".",
    "a",
    "é",
    "🙂",
)
_content = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=6).map("".join)
_content = _content.filter(lambda text: text.strip())
_trimmed = _content.map(str.strip)


@st.composite
def conversations(draw, content=_content):
    """[system] (user assistant)+; the assistant's words have no white space in front."""
    messages = [Message("system", draw(content))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(content)), Message("assistant", draw(content).lstrip())]
    return messages


def _apply(chat, messages, **kwargs):
    rows = [m.for_template() for m in messages]
    return chat.tokenizer.apply_chat_template(rows, tokenize=True, **kwargs)["input_ids"]


def _raw(chat, ids):
    """The text of ids, special tokens included."""
    return chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _answers(chat, messages):
    """Which messages are answers that can all be targets at once."""
    first = 0 if chat.earlier_answers else len(messages) - 1
    return [m.role == "assistant" and i >= first for i, m in enumerate(messages)]


def _runs(flags):
    """(start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return edges.reshape(-1, 2)


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_ids_are_apply_chat_templates(chat, messages):
    ids, flags = chat.render(messages, [False] * len(messages), "row")
    assert ids.tolist() == _apply(chat, messages)
    assert ids.dtype == np.int32 and flags.dtype == bool and not flags.any()
    expected = _apply(chat, messages[:-1], add_generation_prompt=True)
    assert chat.prompt_ids(messages[:-1]).tolist() == expected


@settings(max_examples=80, deadline=None)
@given(messages=conversations())
def test_targets_are_content_and_end_of_turn_of_the_assistant_only(chat, messages):
    is_target = _answers(chat, messages)
    ids, flags = chat.render(messages, is_target, "row")
    runs = _runs(flags)
    answers = [m.content for m, target in zip(messages, is_target, strict=True) if target]
    assert len(runs) == len(answers)
    for (start, end), answer in zip(runs, answers, strict=True):
        text = _raw(chat, ids[start:end])
        assert text.endswith(chat.end_of_turn)
        body = text.removesuffix(chat.end_of_turn)
        assert body.strip() == answer.strip()
        # Beyond the content there is at most the blank that Llama 2's template puts around it.
        assert body in (answer, answer.strip(), f" {answer.strip()} ")


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_what_is_supervised_follows_the_generation_prompt(chat, messages):
    """Training starts where inference does, at every answer of a conversation."""
    is_target = _answers(chat, messages)
    ids, flags = chat.render(messages, is_target, "row")
    answers = np.flatnonzero(is_target)
    for (start, _), i in zip(_runs(flags), answers, strict=True):
        np.testing.assert_array_equal(ids[:start], chat.prompt_ids(messages[:i]))


@settings(max_examples=60, deadline=None)
@given(messages=conversations(_trimmed), data=st.data())
def test_any_message_can_be_a_target(chat, messages, data):
    """One message alone: the flagged tokens say it, and are in one run."""
    places = range(len(messages))
    if not chat.earlier_answers:
        places = [i for i in places if messages[i].role != "assistant" or i == places[-1]]
    i = data.draw(st.sampled_from(places))
    ids, flags = chat.render(messages, [j == i for j in range(len(messages))], "row")
    assert len(_runs(flags)) == 1
    text = _raw(chat, ids[flags]).removesuffix(chat.end_of_turn)
    assert text.strip() == messages[i].content


@settings(max_examples=80, deadline=None)
@given(messages=conversations(), data=st.data())
def test_spans_of_a_message_are_the_tokens_that_hold_any_of_their_characters(chat, messages, data):
    """Counted in the content as it is, also where the template trims it."""
    i = data.draw(st.sampled_from([n for n, yes in enumerate(_answers(chat, messages)) if yes]))
    content = messages[i].content
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start + 1, len(content)))
    targets = [((start, end),) if j == i else False for j in range(len(messages))]
    ids, flags = chat.render(messages, targets, "row")
    _, whole = chat.render(messages, [j == i for j in range(len(messages))], "row")
    assert not (flags & ~whole).any()
    wanted = content[start:end]
    if not wanted.strip():
        return  # it may have been trimmed, and stand beside the template's own white space
    ((first, last),) = _runs(flags)
    inside = ids[first:last]
    assert wanted.strip() in chat.decode(inside) and chat.stop_ids[0] not in inside
    for fewer in (inside[1:], inside[:-1]):  # not one token more than it takes
        assert wanted.strip() not in chat.decode(fewer) or wanted.strip() != wanted
    assert flags.sum() == last - first


def test_spans_are_shifted_and_clipped_where_the_template_trims(chat_of):
    chat = chat_of("gemma")
    asked = [Message("user", "?"), Message("assistant", "  yes no.\n")]
    ids, flags = chat.render(asked, [False, ((0, 3), (8, 10))], "row")
    assert [_raw(chat, ids[a:b]) for a, b in _runs(flags)] == ["yes", "."]
    ids, flags = chat.render(asked, [False, ((0, 2),)], "row")
    assert not flags.any()


def test_a_chat_knows_whether_earlier_answers_can_be_targets(chat_of):
    for template in ("gemma", "chatml", "llama2", "llama3", "closes", "marks", "may think"):
        assert chat_of(template).earlier_answers is True, template
    for template in ("last apart", "only last ends"):
        assert chat_of(template).earlier_answers is False, template


def test_a_worked_example(chat_of):
    chat = chat_of("gemma")
    messages = [Message("system", "S"), Message("user", "user"), Message("assistant", "Yes.")]
    ids, flags = chat.render(messages, [False, False, True], "row")
    before = "<bos><start_of_turn>user\nS\n\nuser<end_of_turn>\n<start_of_turn>model\n"
    assert _raw(chat, ids) == before + "Yes.<end_of_turn>\n"
    assert _raw(chat, ids[flags]) == "Yes.<end_of_turn>"
    assert _raw(chat, ids[: np.flatnonzero(flags)[0]]) == before
    ids, flags = chat.render(messages, [True, True, False], "row")
    assert [_raw(chat, ids[a:b]) for a, b in _runs(flags)] == ["S", "user<end_of_turn>"]


def test_decode_skips_special_tokens_and_keeps_white_space(chat_of):
    chat = chat_of("chatml")
    ids, flags = chat.render(
        [Message("user", "x"), Message("assistant", "a .\n 🙂 ")], [False, True], "row"
    )
    assert chat.decode(ids[flags]) == "a .\n 🙂 "


def test_stop_ids_are_the_end_of_turn_and_all_that_the_model_declares(chat_dir):
    directory = chat_dir("gemma")
    token = load_chat(directory).tokenizer.convert_tokens_to_ids
    assert load_chat(directory).stop_ids == (token("<end_of_turn>"), token("<eos>"))
    config = pathlib.Path(directory) / "generation_config.json"
    for stops in (token("<|eot_id|>"), [token("<|eot_id|>"), token("<eos>")]):
        config.write_text(json.dumps({"eos_token_id": stops}))
        ids = [token(t) for t in ("<end_of_turn>", "<|eot_id|>", "<eos>")]
        assert load_chat(directory).stop_ids == tuple(ids)
    config.write_text("{}")
    assert load_chat(directory).stop_ids == (token("<end_of_turn>"), token("<eos>"))
    config.write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json does not parse"):
        load_chat(directory)
    config.write_text("[]")
    with pytest.raises(UserError, match=r"generation_config.json must hold a JSON object$"):
        load_chat(directory)
    for stops in ("text", [[1]], -1, [1, 99999], True):
        config.write_text(json.dumps({"eos_token_id": stops}))
        with pytest.raises(UserError, match=r"generation_config.json: eos_token_id .* is no id"):
            load_chat(directory)


def test_pad_id_is_the_tokenizers_or_any_where_it_has_none(chat_dir):
    directory = chat_dir("chatml")
    chat = load_chat(directory)
    assert chat.pad_id == chat.tokenizer.convert_tokens_to_ids("<pad>")
    chat.tokenizer.pad_token = None
    chat.tokenizer.save_pretrained(directory)
    assert load_chat(directory).pad_id in load_chat(directory).stop_ids


_ASKED = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho")]
_MORE = [*_ASKED[1:], *_ASKED[1:]]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("refuses system", _ASKED, r"rows:3.*System role not supported.*user turn"),
        ("drops system", _ASKED, r"rows:3.*drops message 0 \(system\).*user turn"),
        ("gemma", [_ASKED[2]], r"rows:3.*refuses the roles assistant: .*alternate$"),
        ("replaces", _ASKED, r"rows:3.*rewrites"),
        ("twice", _ASKED, r"rows:3.*repeats"),
        ("only last ends", _MORE, r"rows:3.*does not end an assistant's message with <\|eot_id\|>"),
        ("chatml", [_ASKED[1], Message("assistant", "\n\n  The")], r"rows:3.*white space at the"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(chat_of, template, messages, expected):
    is_target = [m.role == "assistant" for m in messages]
    with pytest.raises(UserError, match=expected):
        chat_of(template).render(messages, is_target, "rows:3")


def test_a_template_that_thinks_can_be_told_not_to(chat_dir):
    with pytest.raises(UserError, match=r"data\.template_kwargs=\{'enable_thinking': False\}"):
        load_chat(chat_dir("may think")).render(_ASKED, (False, False, True), "rows:3")
    chat = load_chat(chat_dir("may think"), {"enable_thinking": False})
    ids, flags = chat.render(_ASKED, (False, False, True), "rows:3")
    prompt = chat.prompt_ids(_ASKED[:2])
    np.testing.assert_array_equal(ids[: len(prompt)], prompt)
    assert chat.tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    assert chat.tokenizer.decode(ids[flags]) == "Ho<|im_end|>"


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(chat_dir):
    chat = load_chat(chat_dir("dated"))
    assert "26 Jul 2024" in chat.tokenizer.decode(chat.prompt_ids(_ASKED[1:2]))
    chat = load_chat(chat_dir("dated"), {"date_string": "1 May 2025"})
    assert "1 May 2025" in chat.tokenizer.decode(chat.prompt_ids(_ASKED[1:2]))


@pytest.mark.parametrize("template", ["refuses system", "drops system"])
def test_a_prompt_is_checked_too(chat_of, template):
    with pytest.raises(UserError, match="rows:3: "):
        chat_of(template).prompt_ids(_ASKED[:2], "rows:3")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("empty", "has no chat template"),
        ("no end", "end it with a special token.* Take an instruction-tuned model"),
        ("shouts", "must write an assistant's message as it is"),
        ("broken", "fails on a question: no"),
    ],
)
def test_a_template_that_is_no_use_is_refused_at_once(chat_dir, template, expected):
    with pytest.raises(UserError, match=expected):
        load_chat(chat_dir(template))


def test_several_templates_without_a_default_are_refused_and_a_file_says_which(chat_dir, chat_of):
    directory = pathlib.Path(chat_dir("chatml"))
    text = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    path = directory / "tokenizer_config.json"
    told = {"chat_template": [{"name": "rag", "template": text}]}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    with pytest.raises(UserError, match="chat templates 'rag' and none named 'default'; write the"):
        load_chat(str(directory))
    (directory / "chat_template.jinja").write_text(text)
    asked = [Message("user", "hi")]
    expected = chat_of("chatml").prompt_ids(asked).tolist()
    assert load_chat(str(directory)).prompt_ids(asked).tolist() == expected


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such model directory"):
        load_chat(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_chat(str(tmp_path))
