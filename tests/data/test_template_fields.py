"""Tools, their calls and results, and thoughts, under templates of several families."""

import datetime
import json

import numpy as np
import pytest
import tool_templates as templates

from gkdjax.data.chat_template import load_chat
from gkdjax.data.loss_mask import TargetRules
from gkdjax.types import Message
from gkdjax.utils.errors import UserError

TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
        }
    ]
)


def _call(arguments, content="", **fields):
    """The call of the tool, with as much beside it."""
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    call |= {"id": "abcdefghi"}
    return Message("assistant", content, json.dumps({"tool_calls": [call], **fields}))


_RESULT = Message("tool", 'it "is"\n3', json.dumps({"tool_call_id": "abcdefghi"}))
_TALK = (
    *(Message("system", "Be brief."), Message("user", "what is it?")),
    *(_call({"at": "é x"}), _RESULT, Message("assistant", "It is 3."), Message("user", "sure?")),
    *(_call({"at": "y"}), _RESULT, _RESULT, Message("assistant", "Yes.")),
)
_ASSISTANT = tuple(m.role == "assistant" for m in _TALK)


def _apply(chat, messages, tools=TOOLS, **kwargs):
    """transformers' own."""
    return chat.tokenizer.apply_chat_template(
        [m.for_template() for m in messages],
        tools=json.loads(tools) if tools else None,
        **(chat.template_kwargs | kwargs),
    )


def _said(chat, ids, flags):
    """The text of each run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]))).reshape(-1, 2)
    return [chat.tokenizer.decode(ids[a:b]) for a, b in edges]


@pytest.mark.parametrize("template", [templates.PLAIN_CALLS, templates.MARKED, templates.ALONE])
def test_calls_are_learnt_as_the_template_writes_them_and_results_never(chat_of, template):
    chat = chat_of(template)
    ids, flags = chat.render(_TALK, _ASSISTANT, "row", tools=TOOLS)
    assert ids.tolist() == _apply(chat, _TALK)["input_ids"]
    for i in np.flatnonzero(_ASSISTANT):
        prompt = chat.prompt_ids(_TALK[:i], tools=TOOLS)
        assert prompt.tolist() == _apply(chat, _TALK[:i], add_generation_prompt=True)["input_ids"]
        assert flags[len(prompt)] and not flags[len(prompt) - 1]
    said = _said(chat, ids, flags)
    assert len(said) == 4 and all(one.endswith(chat.end_of_turn) for one in said)
    assert '"name": "look"' in said[0] and '{"at": "é x"}' in said[0]
    assert said[1] == f"It is 3.{chat.end_of_turn}"
    assert "is" not in said[0].replace("It is", "") and "tool_response" not in "".join(said)
    if template == templates.MARKED:
        whole = _apply(chat, _TALK, return_assistant_tokens_mask=True)
        assert flags.tolist() == list(map(bool, whole["assistant_masks"]))


def test_text_beside_a_call_is_learnt_with_it(chat_of):
    chat = chat_of(templates.PLAIN_CALLS)
    talk = (Message("user", "?"), _call({}, "I look."))
    ids, flags = chat.render(talk, (False, True), "row", tools=TOOLS)
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    assert _said(chat, ids, flags) == [f"I look.\n{call}<|im_end|>"]
    for span, expected in ((True, [f"I look.\n{call}<|im_end|>"]), (False, ["look"])):
        rules = TargetRules(("assistant",), '(?<="name": ")look', "message" if span else "match")
        target = rules.of_message(talk[1])
        ids, flags = chat.render(talk, (False, target), "row", tools=TOOLS)
        (said,) = _said(chat, ids, flags)
        assert said.strip(' "') == expected[0]


def test_tools_that_stand_before_the_last_question_only(chat_of):
    """What follows them moves them, so an earlier answer is no continuation of its prompt."""
    chat = chat_of(templates.LATE)
    last = (False,) * 9 + (True,)
    ids, flags = chat.render(_TALK[1:], last[1:], "row", tools=TOOLS)
    assert ids.tolist() == _apply(chat, _TALK[1:])["input_ids"]
    assert [one.strip() for one in _said(chat, ids, flags)] == ["Yes.<eos>"]
    same = (*_TALK[1:5], _TALK[1])  # the same question twice
    assert chat.prompt_ids(same, tools=TOOLS).tolist() == _apply(chat, same)["input_ids"]
    with pytest.raises(UserError, match=r"row: .* does not continue its own generation prompt"):
        chat.render(_TALK[1:], _ASSISTANT[1:], "row", tools=TOOLS)
    with pytest.raises(UserError, match=r"row: .*Tool call IDs should be 9 long"):
        wrong = _call({})._replace(fields=_call({}).fields.replace("abcdefghi", "1"))
        chat.render((_TALK[1], wrong), (False, True), "row", tools=TOOLS)


_USER = Message("user", "2+2?")
_SHORT = Message("assistant", "4.", '{"reasoning_content":"Easy."}')


@pytest.mark.parametrize(
    ("template", "messages", "tools", "expected"),
    [
        ("chatml", (_USER,), TOOLS, "does not write the tool 'look'; take a model"),
        ("chatml", (_USER, _call({}, "I look.")), "", "does not write message 1's call of 'look'"),
        ("chatml", (_USER, _SHORT), "", "does not read 'reasoning_content' of message 1; write it"),
        (
            templates.ALONE,
            (_USER, _call({}, "I look.")),
            TOOLS,
            r"drops message 1 \(assistant\) without a word; it writes the calls alone: remove",
        ),
        (
            templates.PLAIN_CALLS,
            (_USER, _call({}), Message("observation", "3")),
            TOOLS,
            r"drops message 2 \(observation\) .*; rename the role 'tool' if it is the result",
        ),
        (
            templates.PLAIN_CALLS,
            (_USER, _call('{"at": 1}')),
            TOOLS,
            r"message 1's tool call are a string, which .* encodes again; .*: \{\"at\": 1\}$",
        ),
    ],
)
def test_what_a_template_leaves_out_is_named(chat_of, template, messages, tools, expected):
    for learnt in (True, False):
        targets = [m.role == "assistant" and learnt for m in messages]
        with pytest.raises(UserError, match=f"^rows:3: .*{expected}"):
            chat_of(template).render(messages, targets, "rows:3", tools=tools)


_THOUGHT = "<think>\nEasy.\n</think>\n\n4."
_INLINE = Message("assistant", _THOUGHT)


@pytest.mark.parametrize("answer", [_INLINE, _SHORT], ids=["inline", "field"])
@pytest.mark.parametrize(
    ("template", "written"),
    [
        (templates.MAY_THINK, _THOUGHT),
        (templates.OPENS, _THOUGHT.removeprefix("<think>\n")),
        (templates.STRIPS_OPENS, _THOUGHT.removeprefix("<think>\n")),
        (templates.STRIPS, _THOUGHT),
        ("chatml", _THOUGHT),
        ("llama3", _THOUGHT),
    ],
)
def test_thoughts_are_learnt_after_the_generation_prompt(chat_of, template, written, answer):
    chat = chat_of(template)
    if answer is _SHORT and template not in (templates.MAY_THINK, templates.OPENS):
        with pytest.raises(UserError, match="does not read 'reasoning_content' of message 1"):
            chat.render((_USER, answer), (False, True), "row")
        return
    ids, flags = chat.render((_USER, answer), (False, True), "row")
    assert _said(chat, ids, flags) == [written + chat.end_of_turn]
    prompt = chat.prompt_ids((_USER,))
    np.testing.assert_array_equal(ids[: len(prompt)], prompt)
    assert flags[len(prompt)] and not flags[: len(prompt)].any()
    if template not in (templates.STRIPS_OPENS, templates.STRIPS):
        assert ids.tolist() == _apply(chat, (_USER, answer), "")["input_ids"]
    # A history is what the template makes of it, and so is an answer that is not learnt.
    history = (_USER, answer, Message("user", "3+3?"))
    expected = _apply(chat, history, "", add_generation_prompt=True)["input_ids"]
    assert chat.prompt_ids(history).tolist() == expected
    ids, _ = chat.render((_USER, answer), (False, False), "row")
    assert ids.tolist() == _apply(chat, (_USER, answer), "")["input_ids"]


def test_a_pattern_is_sought_in_the_thought_as_it_is_written(chat_of):
    for template in (templates.MAY_THINK, templates.OPENS, templates.STRIPS, "chatml"):
        chat = chat_of(template)
        rules = TargetRules(("assistant",), "Easy.|4", "match")
        ids, flags = chat.render((_USER, _INLINE), (False, rules.of_message(_INLINE)), "row")
        assert "".join(_said(chat, ids, flags)).replace("\n", "") == "Easy.4", template
        for pattern, found in (("E.sy", True), ("never", False)):
            rules = TargetRules(("assistant",), pattern)
            _, flags = chat.render((_USER, _INLINE), (False, rules.of_message(_INLINE)), "row")
            assert flags.any() == found


def test_an_empty_thought_and_one_that_the_answer_repeats_are_learnt(chat_of):
    for said in ("<think>\n\n</think>\n\n4.", "<think>4.</think>4."):
        for template in (templates.STRIPS, "chatml"):
            chat = chat_of(template)
            talk = (_USER, Message("assistant", said))
            assert _said(chat, *chat.render(talk, (False, True), "row")) == [
                said + chat.end_of_turn
            ]
            chat.prompt_ids((*talk, _USER))  # a history is what the template makes of it
    chat = chat_of(templates.STRIPS_OPENS)
    talk = (_USER, Message("assistant", "<think></think>\n\n4."))
    assert _said(chat, *chat.render(talk, (False, True), "row")) == ["</think>\n\n4.<eos>"]
    with pytest.raises(UserError, match=r"row: .* as <think></think> where the thought is empty$"):
        empty = Message("assistant", "<think>\n\n</think>\n\n4.")
        chat.render((_USER, empty), (False, True), "row")


def test_a_stop_token_within_what_is_learnt_is_refused(chat_of):
    chat = chat_of(templates.PLAIN_CALLS)
    for answer in (Message("assistant", "It is <|im_end|> 4."), _call({"at": "a <|im_end|> b"})):
        with pytest.raises(UserError, match=r"^row: message 1 has '<\|im_end\|>' in what is to be"):
            chat.render((_USER, answer), (False, True), "row", tools=TOOLS)
        chat.render((_USER, answer), (False, False), "row", tools=TOOLS)
    ids, flags = chat.render(
        (_USER, answer._replace(fields="", content="4 <|im_end|>")), (False, ((0, 1),)), "row"
    )
    assert _said(chat, ids, flags) == ["4"]


def test_a_thought_that_others_follow_is_learnt_at_an_end_or_not_at_all(chat_of):
    talk = (_USER, _INLINE, Message("user", "3+3?"), _INLINE)
    for template in (templates.MAY_THINK, templates.STRIPS):
        chat = chat_of(template)
        with pytest.raises(UserError, match="leaves the thought of message 1 out where others"):
            chat.render(talk, (False, True, False, True), "row")
        ids, flags = chat.render(talk, (False, False, False, True), "row")
        assert _said(chat, ids, flags) == [_THOUGHT + chat.end_of_turn]


@pytest.mark.parametrize(
    ("template", "kwargs", "answer", "advice"),
    [
        (
            templates.MAY_THINK,
            {},
            "4.",
            r"data\.template_kwargs=\{'enable_thinking': False\}",
        ),
        (
            templates.MAY_THINK,
            {"enable_thinking": False},
            _THOUGHT,
            r"has a thought: leave 'enable_thinking' out of data\.template_kwargs",
        ),
        (
            templates.STRIPS_OPENS,
            {},
            "4.",
            r"the answer has none: begin it with <think>\.+</think>",
        ),
        (templates.OPENS, {}, "4.", r"the answer has none: begin it with <think>\.+</think>"),
    ],
)
def test_advice_is_true_of_the_template(chat_dir, template, kwargs, answer, advice):
    chat = load_chat(chat_dir(template), kwargs)
    with pytest.raises(UserError, match=f"^rows:3: .*{advice}"):
        chat.render((_USER, Message("assistant", answer)), (False, True), "rows:3")


def test_an_empty_thought_is_learnt_where_the_user_says_so_or_the_template_has_no_other_way(
    chat_dir, chat_of
):
    answer = (_USER, Message("assistant", "4.")), (False, True), "row"
    chat = load_chat(chat_dir(templates.MAY_THINK), {"enable_thinking": True})
    assert _said(chat, *chat.render(*answer)) == ["<think>\n\n</think>\n\n4.<|im_end|>"]
    assert not chat.earlier_answers  # it would be learnt without the block there
    chat = chat_of("thinks")
    assert _said(chat, *chat.render(*answer)) == ["<think>\n\n</think>\n\n4.<|im_end|>"]


def test_the_clock_stands(chat_dir):
    """At the time that it is given, whatever the time; ids are those of a rendering then."""
    then = datetime.datetime(2025, 3, 9, 7, 5)
    directory = chat_dir(templates.ALONE)
    chat, now = load_chat(directory, clock=then), load_chat(directory)
    text = chat.tokenizer.decode(chat.prompt_ids(_TALK[:2]))
    assert "Today: 09 Mar 2025\n" in text
    today = datetime.datetime.now().strftime("%d %b %Y")
    other = chat.tokenizer.decode(now.prompt_ids(_TALK[:2]))
    assert text.replace("09 Mar 2025", today) == other


@pytest.mark.parametrize(
    "template",
    [
        "\n\n  {% if strftime_now is defined %}{{ strftime_now('%d %% %-d|%H:%M') }}{% endif %}\nx",
        "{{ strftime_now('%f %#d %10d %Od %^b %^10A %EY%') }}",
        "  {%- set day = strftime_now('%Y-%m-%d').split('-') %}{{ day[2] }} ",
        "{% macro day() %}{{ strftime_now(format='%A') }}{% endmacro %}\n {{ day() }}",
    ],
)
def test_a_standing_clock_changes_nothing_else(chat_dir, template, monkeypatch):
    from transformers.utils import chat_template_utils

    from gkdjax.data import clock

    then = datetime.datetime(2025, 3, 8, 7, 5, 1, 234)

    class Then(datetime.datetime):
        now = classmethod(lambda cls: then)

    given = [{"role": "user", "content": "x"}]
    tokenizer = load_chat(chat_dir("chatml")).tokenizer
    stood = tokenizer.apply_chat_template(given, tokenize=False, **clock.standing(template, then))
    monkeypatch.setattr(chat_template_utils, "datetime", Then)
    assert stood == tokenizer.apply_chat_template(given, chat_template=template, tokenize=False)


def test_a_call_without_a_thought_teaches_not_to_think_only_if_that_is_said(chat_dir):
    talk = (_USER, _call({"at": 1}), _RESULT, Message("assistant", "It is 3."))
    chat = load_chat(chat_dir(templates.MAY_THINK))
    with pytest.raises(UserError, match=r"row: message 1 has no thought, .*: False\} puts it into"):
        chat.render(talk[:2], (False, True), "row", tools=TOOLS)
    chat = load_chat(chat_dir(templates.MAY_THINK), {"enable_thinking": False})
    for end in (2, 4):
        learnt = (False,) * (end - 1) + (True,)
        ids, flags = chat.render(talk[:end], learnt, "row", tools=TOOLS)
        assert ids.tolist() == _apply(chat, talk[:end])["input_ids"]
        (said,) = _said(chat, ids, flags)
        assert said.startswith(("<tool_call>", "It is 3.")) and said.endswith("<|im_end|>")
