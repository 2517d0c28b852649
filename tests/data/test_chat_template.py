"""Ids and target flags: properties over generated conversations, and templates with tools."""

import datetime
import json
import pathlib

import chat_templates as templates
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from gkdjax.data.chat_template import load_chat
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.template import fixed_clock
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
_content = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=6).map("".join).filter(str.strip)


@st.composite
def conversations(draw):
    """[system] (user assistant)+; the assistant's words have no white space in front."""
    messages = [Message("system", draw(_content))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(_content)), Message("assistant", draw(_content).lstrip())]
    return messages


def _apply(chat, messages, tools="", **kwargs):
    """What transformers makes of them."""
    return chat.tokenizer.apply_chat_template(
        [m.for_template() for m in messages],
        tools=json.loads(tools) if tools else None,
        **(chat.template_kwargs | kwargs),
    )


def _render(chat, messages, targets, name="row", **how):
    return chat.render(tuple(messages), tuple(targets), name, **how)


def _runs(chat, ids, flags):
    """(start, text) of each run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]))).reshape(-1, 2)
    return [(a, chat.decode(ids[a:b], special=True)) for a, b in edges]


def _learnt(chat, messages, targets, tools="", as_applied=True):
    """The text of each run of targets; the ids are transformers' own."""
    ids, flags = _render(chat, messages, targets, tools=tools)
    if as_applied:
        assert ids.tolist() == _apply(chat, messages, tools)["input_ids"]
    return [text for _, text in _runs(chat, ids, flags)]


@settings(max_examples=80, deadline=None)
@given(messages=conversations())
def test_answers_are_learnt_after_the_prompt_that_a_model_would_be_given(chat, messages):
    """Contents and ends of turn and nothing else, in ids that are apply_chat_template's."""
    first = 0 if chat.earlier_answers else len(messages) - 1
    targets = [m.role == "assistant" and i >= first for i, m in enumerate(messages)]
    ids, flags = _render(chat, messages, targets)
    assert ids.tolist() == _apply(chat, messages)["input_ids"]
    assert (ids.dtype, flags.dtype) == (np.int32, bool)
    runs = _runs(chat, ids, flags)
    answers = np.flatnonzero(targets)
    assert len(runs) == len(answers)
    for (start, text), i in zip(runs, answers, strict=True):
        prompt, answer = chat.prompt_ids(messages[:i]), messages[i].content
        np.testing.assert_array_equal(ids[:start], prompt)
        expected = _apply(chat, messages[:i], add_generation_prompt=True)["input_ids"]
        assert prompt.tolist() == expected
        assert text.endswith(chat.end_of_turn)
        # Beside the content there is at most the blank that Llama 2's template puts around it.
        body = text.removesuffix(chat.end_of_turn)
        assert body in (answer, answer.strip(), f" {answer.strip()} ")
    assert not _render(chat, messages, [False] * len(messages))[1].any()


@settings(max_examples=100, deadline=None)
@given(messages=conversations(), data=st.data())
def test_any_message_is_a_target_as_a_whole_or_in_spans(chat, messages, data):
    """Spans are counted in the content as it is, also where the template trims it."""
    i = data.draw(st.integers(0, len(messages) - 1))
    if messages[i].role == "assistant" and not chat.earlier_answers:
        i = len(messages) - 1
    trimmed = [m._replace(content=m.content.strip()) for m in messages]
    alone = [j == i for j in range(len(messages))]
    ((_, text),) = _runs(chat, *_render(chat, trimmed, alone))
    assert text.removesuffix(chat.end_of_turn).strip() == trimmed[i].content
    if messages[i].role != "assistant":
        return
    content = messages[i].content
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start + 1, len(content)))
    wanted = content[start:end].strip()
    _, whole = _render(chat, messages, alone)
    ids, flags = _render(chat, messages, [((start, end),) if one else False for one in alone])
    assert not (flags & ~whole).any()
    if not wanted:
        return  # it may have been trimmed, and stand beside the template's own white space
    ((first, _),) = _runs(chat, ids, flags)
    inside = ids[first : first + flags.sum()]
    assert wanted in chat.decode(inside) and chat.stop_ids[0] not in inside
    for fewer in (inside[1:], inside[:-1]):  # not one token more than it takes
        assert wanted not in chat.decode(fewer) or wanted != content[start:end]


_HI = [Message("user", "?"), Message("assistant", "  yes no.\n")]
_ASKED = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho")]
_MORE = [*_ASKED[1:], *_ASKED[1:]]
_TO_USER = [Message("system", "S"), Message("user", "user"), Message("assistant", "Yes.")]


@pytest.mark.parametrize(
    ("messages", "targets", "expected"),
    [
        (_HI, [False, ((0, 3), (8, 10))], ["yes", "."]),  # shifted and clipped by the trimming
        (_HI, [False, ((0, 2),)], []),
        (_TO_USER, [False, False, True], ["Yes.<end_of_turn>"]),
        (_TO_USER, [True, True, False], ["S", "user<end_of_turn>"]),
    ],
)
def test_targets_of_a_template_that_trims_and_has_no_system_turn(
    chat_of, messages, targets, expected
):
    assert _learnt(chat_of("gemma"), messages, targets) == expected


def test_a_chat_knows_whether_earlier_answers_can_be_targets(chat_of):
    for template in ("gemma", "chatml", "llama2", "llama3", "closes", "marks", "may think"):
        assert chat_of(template).earlier_answers is True, template
    for template in ("last apart", "only last ends"):
        assert chat_of(template).earlier_answers is False, template


def test_stop_ids_are_the_end_of_turn_and_all_that_the_model_declares(chat_dir):
    directory = chat_dir("gemma")
    token = load_chat(directory).tokenizer.convert_tokens_to_ids
    end, eot, eos = (token(t) for t in ("<end_of_turn>", "<|eot_id|>", "<eos>"))
    assert load_chat(directory).stop_ids == (end, eos)
    config = pathlib.Path(directory) / "generation_config.json"
    for stops, expected in (
        (eot, (end, eot, eos)),
        ([eot, eos], (end, eot, eos)),
        (None, (end, eos)),
    ):
        config.write_text(json.dumps({"eos_token_id": stops}))
        assert load_chat(directory).stop_ids == expected
    for text, message in (("{", "does not parse"), ("[]", "must hold a JSON object$")):
        config.write_text(text)
        with pytest.raises(UserError, match=f"generation_config.json {message}"):
            load_chat(directory)
    for stops in ("text", [[1]], -1, [1, 99999], True):
        config.write_text(json.dumps({"eos_token_id": stops}))
        with pytest.raises(UserError, match=r"generation_config.json: eos_token_id .* is no id"):
            load_chat(directory)


def test_pad_id_is_the_tokenizers_or_any_where_it_has_none(chat_dir):
    directory = chat_dir("chatml")
    chat = load_chat(directory)
    assert chat.decode([chat.pad_id], special=True) == "<pad>" and chat.decode([chat.pad_id]) == ""
    chat.tokenizer.pad_token = None
    chat.tokenizer.save_pretrained(directory)
    assert load_chat(directory).pad_id in load_chat(directory).stop_ids


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("empty", "has no chat template"),
        ("no end", "end it with a special token.* Take an instruction-tuned model"),
        ("shouts", "must write an assistant's message as it is"),
        ("broken", "a question: .* refuses the roles user, assistant: no"),
    ],
)
def test_a_template_that_is_no_use_is_refused_at_once(chat_dir, template, expected):
    with pytest.raises(UserError, match=expected):
        load_chat(chat_dir(template))


def test_a_directory_without_a_tokenizer_or_a_default_template_is_refused(
    chat_dir, chat_of, tmp_path
):
    with pytest.raises(UserError, match="no such model directory"):
        load_chat(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_chat(str(tmp_path))
    directory = pathlib.Path(chat_dir("chatml"))
    text = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    path = directory / "tokenizer_config.json"
    several = {"chat_template": [{"name": "rag", "template": text}]}
    path.write_text(json.dumps(json.loads(path.read_text()) | several))
    with pytest.raises(UserError, match="chat templates 'rag' and none named 'default'; write the"):
        load_chat(str(directory))
    (directory / "chat_template.jinja").write_text(text)
    expected = chat_of("chatml").prompt_ids(_HI[:1]).tolist()
    assert load_chat(str(directory)).prompt_ids(_HI[:1]).tolist() == expected


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(chat_dir):
    for kwargs, date in (({}, "26 Jul 2024"), ({"date_string": "1 May 2025"}, "1 May 2025")):
        chat = load_chat(chat_dir("dated"), kwargs)
        assert date in chat.tokenizer.decode(chat.prompt_ids(_HI[:1]))


def test_the_clock_is_fixed_at_the_time_that_is_given(chat_dir):
    directory = chat_dir(templates.ALONE)
    then = datetime.datetime(2025, 3, 9, 7, 5)
    fixed, now = (
        chat.decode(chat.prompt_ids(_ASKED[:2]))
        for chat in (load_chat(directory, clock=then), load_chat(directory))
    )
    assert "Today: 09 Mar 2025\n" in fixed
    assert fixed.replace("09 Mar 2025", datetime.datetime.now().strftime("%d %b %Y")) == now


@pytest.mark.parametrize(
    "template",
    [
        "\n\n  {% if strftime_now is defined %}{{ strftime_now('%d %% %-d|%H:%M') }}{% endif %}\nx",
        "{{ strftime_now('%f %#d %10d %Od %^b %^10A %EY%') }}",
        "  {%- set day = strftime_now('%Y-%m-%d').split('-') %}{{ day[2] }} ",
        "{% macro day() %}{{ strftime_now(format='%A') }}{% endmacro %}\n {{ day() }}",
    ],
)
def test_a_fixed_clock_changes_nothing_else(chat_of, template, monkeypatch):
    then = datetime.datetime(2025, 3, 8, 7, 5, 1, 234)

    class Then(datetime.datetime):
        now = classmethod(lambda cls: then)

    apply, messages = chat_of("chatml").tokenizer.apply_chat_template, [_HI[0].for_template()]
    fixed = apply(messages, tokenize=False, **fixed_clock(template, then))
    monkeypatch.setattr(chat_template_utils, "datetime", Then)
    assert fixed == apply(messages, chat_template=template, tokenize=False)


TOOL = {"name": "look", "parameters": {"type": "object", "properties": {}}}
TOOLS = json.dumps([{"type": "function", "function": TOOL}])


def _call(arguments, content=""):
    """The call of the tool, with text beside it."""
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return Message("assistant", content, json.dumps({"tool_calls": [call | {"id": "abcdefghi"}]}))


_RESULT = Message("tool", 'it "is"\n3', json.dumps({"tool_call_id": "abcdefghi"}))
_TALK = (
    *(Message("system", "Be brief."), Message("user", "what is it?")),
    *(_call({"at": "é x"}), _RESULT, Message("assistant", "It is 3."), Message("user", "sure?")),
    *(_call({"at": "y"}), _RESULT, _RESULT, Message("assistant", "Yes.")),
)
_ANSWERS = tuple(m.role == "assistant" for m in _TALK)


@pytest.mark.parametrize("template", [templates.CALLS, templates.MARKED_CALLS, templates.ALONE])
def test_calls_are_learnt_as_the_template_writes_them_and_results_never(chat_of, template):
    chat = chat_of(template)
    said = _learnt(chat, _TALK, _ANSWERS, TOOLS)
    ids, flags = _render(chat, _TALK, _ANSWERS, tools=TOOLS)
    for (start, _), i in zip(_runs(chat, ids, flags), np.flatnonzero(_ANSWERS), strict=True):
        expected = _apply(chat, _TALK[:i], TOOLS, add_generation_prompt=True)["input_ids"]
        assert chat.prompt_ids(_TALK[:i], tools=TOOLS).tolist() == expected == ids[:start].tolist()
    assert len(said) == 4 and all(one.endswith(chat.end_of_turn) for one in said)
    assert '"name": "look"' in said[0] and '{"at": "é x"}' in said[0]
    assert said[1] == f"It is 3.{chat.end_of_turn}" and "tool_response" not in "".join(said)
    if template == templates.MARKED_CALLS:
        whole = _apply(chat, _TALK, TOOLS, return_assistant_tokens_mask=True)
        assert flags.tolist() == list(map(bool, whole["assistant_masks"]))


def test_text_beside_a_call_is_learnt_with_it(chat_of):
    chat, talk = chat_of(templates.CALLS), (_HI[0], _call({}, "I look."))
    whole = 'I look.\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>'
    assert _learnt(chat, talk, (False, True), TOOLS) == [whole]
    for span, expected in (("message", whole), ("match", "look")):
        target = TargetRules(("assistant",), '(?<="name": ")look', span).of_message(talk[1])
        (said,) = _learnt(chat, talk, (False, target), TOOLS)
        assert said.strip(' "') == expected


def test_tools_that_stand_before_the_last_question_only(chat_of):
    """What follows them moves them, so an earlier answer is no continuation of its prompt."""
    chat = chat_of(templates.LATE)
    (said,) = _learnt(chat, _TALK[1:], (False,) * 8 + (True,), TOOLS)
    assert said.strip() == "Yes.<eos>"
    same = (*_TALK[1:5], _TALK[1])  # the same question twice
    assert chat.prompt_ids(same, tools=TOOLS).tolist() == _apply(chat, same, TOOLS)["input_ids"]


_USER = Message("user", "2+2?")
_FIELD = Message("assistant", "4.", '{"reasoning_content":"Easy."}')
_THOUGHT = "<think>\nEasy.\n</think>\n\n4."
_INLINE, _PLAIN = Message("assistant", _THOUGHT), Message("assistant", "4.")
_EMPTY = Message("assistant", "<think>\n\n</think>\n\n4.")
_LOOK = _call({}, "I look.")
_SHORT_ID = _LOOK._replace(fields=_LOOK.fields.replace("abcdefghi", "1"))
_ODD = (_USER, _call({}), Message("observation", "3"))
_ON, _OFF = ({"enable_thinking": on} for on in (True, False))


@pytest.mark.parametrize(
    ("template", "messages", "tools", "expected"),
    [
        ("refuses system", _ASKED, "", "System role not supported.*user turn"),
        ("drops system", _ASKED, "", r"drops message 0 \(system\).*user turn"),
        ("gemma", _ASKED[2:], "", "refuses the roles assistant: .*alternate$"),
        ("replaces", _ASKED, "", "rewrites"),
        ("twice", _ASKED, "", "repeats"),
        ("chatml", (_USER,), TOOLS, "does not write the tool 'look'; take a model"),
        ("chatml", (_USER, _LOOK), "", "does not write message 1's call of 'look'"),
        ("chatml", (_USER, _FIELD), "", "not read 'reasoning_content' of message 1; write it into"),
        (templates.ALONE, (_USER, _LOOK), TOOLS, r"1 \(assistant\) .*; it writes the calls alone"),
        (templates.CALLS, _ODD, TOOLS, r"2 \(observation\) .*; rename the role 'tool' if it is"),
        (templates.CALLS, (_USER, _call('{"at": 1}')), TOOLS, r"1's tool call .*: \{\"at\": 1\}$"),
        (templates.LATE, (_USER, _SHORT_ID), TOOLS, "Tool call IDs should be 9 long"),
    ],
)
def test_what_a_template_leaves_out_is_named(chat_of, template, messages, tools, expected):
    for learnt in (True, False):
        targets = [m.role == "assistant" and learnt for m in messages]
        with pytest.raises(UserError, match=f"^rows:3: .*{expected}"):
            _render(chat_of(template), messages, targets, "rows:3", tools=tools)
    if messages is _ASKED:
        with pytest.raises(UserError, match=r"^rows:3: "):
            chat_of(template).prompt_ids(_ASKED, "rows:3")


_CLOSED = templates.STRIPS_OPENS.replace("<think>\n", "<think>\n\n</think>\n\n")
_STOPS = Message("assistant", "It is <|im_end|> 4."), _call({"at": "a <|im_end|> b"})


@pytest.mark.parametrize(
    ("template", "messages", "kwargs", "expected"),
    [
        ("only last ends", _MORE, {}, r"does not end an assistant's message with <\|eot_id\|>"),
        ("chatml", (_USER, Message("assistant", "\n\n  The")), {}, "white space at the start"),
        ("may think", _ASKED, {}, r"template_kwargs=\{'enable_thinking': False\}"),
        (templates.LATE, _TALK[1:], {}, "does not continue its own generation prompt"),
        (templates.STRIPS_OPENS, (_USER, _EMPTY), {}, "as <think></think> where .* is empty$"),
        (templates.CALLS, (_USER, _STOPS[0]), {}, r"message 1 has '<\|im_end\|>' in what is to be"),
        (templates.CALLS, (_USER, _STOPS[1]), {}, r"message 1 has '<\|im_end\|>' in what is to be"),
        (templates.MAY_THINK, (_USER, _INLINE) * 2, {}, "thought of message 1 out where others"),
        (templates.STRIPS, (_USER, _INLINE) * 2, {}, "thought of message 1 out where others"),
        (_CLOSED, (_USER, _INLINE), {}, "does not continue its own generation prompt"),
        (templates.MAY_THINK, (_USER, _PLAIN), {}, r"kwargs=\{'enable_thinking': False\}"),
        (templates.MAY_THINK, (_USER, _INLINE), _OFF, "has a thought: leave 'enable_thinking' out"),
        (templates.STRIPS_OPENS, (_USER, _PLAIN), {}, r"none: begin it with <think>\.+</think>"),
        (templates.OPENS, (_USER, _PLAIN), {}, r"none: begin it with <think>\.+</think>"),
        (templates.MAY_THINK, (_USER, _LOOK), {}, r"1 has no thought, .*: False\} puts it into"),
    ],
)
def test_what_cannot_be_learnt_is_refused_where_it_is_to_be(
    chat_dir, template, messages, kwargs, expected
):
    chat = load_chat(chat_dir(template), kwargs)
    tools = TOOLS if any(m.fields for m in messages) else ""
    _render(chat, messages, [False] * len(messages), "rows:3", tools=tools)
    with pytest.raises(UserError, match=f"^rows:3: .*{expected}"):
        _render(chat, messages, [m.role == "assistant" for m in messages], "rows:3", tools=tools)


_REST = _THOUGHT.removeprefix("<think>\n")
_ONCE = Message("assistant", "<think>4.</think>4.")  # the answer repeats the thought
_OPENED = Message("assistant", "<think></think>\n\n4.")
_STOP_BESIDE = Message("assistant", "4 <|im_end|>")


@pytest.mark.parametrize(
    ("template", "messages", "kwargs", "target", "expected"),
    [
        (templates.MAY_THINK, (_USER, _INLINE), {}, True, _THOUGHT),
        (templates.MAY_THINK, (_USER, _FIELD), {}, True, _THOUGHT),
        (templates.OPENS, (_USER, _INLINE), {}, True, _REST),
        (templates.OPENS, (_USER, _FIELD), {}, True, _REST),
        (templates.STRIPS_OPENS, (_USER, _INLINE), {}, True, _REST),
        (templates.STRIPS, (_USER, _INLINE), {}, True, _THOUGHT),
        ("chatml", (_USER, _INLINE), {}, True, _THOUGHT),
        ("llama3", (_USER, _INLINE), {}, True, _THOUGHT),
        (templates.STRIPS, (_USER, _EMPTY), {}, True, _EMPTY.content),
        ("chatml", (_USER, _EMPTY), {}, True, _EMPTY.content),
        (templates.STRIPS, (_USER, _ONCE), {}, True, _ONCE.content),
        ("chatml", (_USER, _ONCE), {}, True, _ONCE.content),
        (templates.STRIPS_OPENS, (_USER, _OPENED), {}, True, "</think>\n\n4."),
        (templates.MAY_THINK, (_USER, _INLINE) * 2, {}, True, _THOUGHT),
        (templates.STRIPS, (_USER, _INLINE) * 2, {}, True, _THOUGHT),
        # An empty thought is learnt where the user says so, or the template has no other way.
        (templates.MAY_THINK, (_USER, _PLAIN), _ON, True, _EMPTY.content),
        ("thinks", (_USER, _PLAIN), {}, True, _EMPTY.content),
        ("may think", _ASKED[1:], _OFF, True, "Ho"),
        (templates.CALLS, (_USER, _STOP_BESIDE), {}, ((0, 1),), "4"),
    ],
)
def test_the_last_answer_is_learnt_after_the_generation_prompt(
    chat_dir, template, messages, kwargs, target, expected
):
    chat = load_chat(chat_dir(template), kwargs)
    targets = (*[False] * (len(messages) - 1), target)
    strips = template in (templates.STRIPS_OPENS, templates.STRIPS)
    (said,) = _learnt(chat, messages, targets, as_applied=not strips)
    assert said == expected + (chat.end_of_turn if target is True else "")
    ids, flags = _render(chat, messages, targets)
    assert ids[: flags.argmax()].tolist() == chat.prompt_ids(messages[:-1]).tolist()
    # A history is what the template makes of it, and so is an answer that is not learnt.
    history = (*messages, _USER)
    expected = _apply(chat, history, add_generation_prompt=True)["input_ids"]
    assert chat.prompt_ids(history).tolist() == expected
    assert _learnt(chat, messages, (False,) * len(messages)) == []
    if kwargs is _ON:
        assert not chat.earlier_answers  # it would be learnt without the block there


@pytest.mark.parametrize("template", [templates.MAY_THINK, templates.OPENS, templates.STRIPS])
@pytest.mark.parametrize(
    ("pattern", "span", "begin"),
    [("Easy.|4", "match", "Easy.4"), ("E.sy", "message", "Easy."), ("never", "message", "")],
)
def test_a_pattern_is_searched_for_in_the_thought_as_it_is_written(
    chat_of, template, pattern, span, begin
):
    target = TargetRules(("assistant",), pattern, span).of_message(_INLINE)
    ids, flags = _render(chat_of(template), (_USER, _INLINE), (False, target))
    text = chat_of(template).decode(ids[flags]).replace("\n", "")
    assert begin in text and bool(begin) == bool(text)
    assert span == "message" or text == begin


def test_a_call_without_a_thought_teaches_not_to_think_if_that_is_said(chat_dir):
    chat = load_chat(chat_dir(templates.MAY_THINK), _OFF)
    talk = (_USER, _call({"at": 1}), _RESULT, Message("assistant", "It is 3."))
    for end, begin in ((2, "<tool_call>"), (4, "It is 3.")):
        (said,) = _learnt(chat, talk[:end], (False,) * (end - 1) + (True,), TOOLS)
        assert said.startswith(begin) and said.endswith("<|im_end|>")
