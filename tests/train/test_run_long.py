"""Whole runs on rows that are too long, and on parts of messages."""

import json

import factories
import pytest
from small_runs import metrics, small

import gkdjax
from gkdjax.data.chat_template import load_chat
from gkdjax.utils.errors import UserError

_EXAMPLES = [
    {"role": "system", "content": "be brief"},
    *({"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}),
]

# The last answer alone stands after an empty block of thinking, and so does what is answered.
_LAST_APART = factories.CHAT_TEMPLATE.replace(
    "+ m['content']",
    "+ ('<>' if loop.last and role == 'model' else '') + m['content']",
).replace("{{ '<start_of_turn>model\n' }}", "{{ '<start_of_turn>model\n<>' }}")


def _talk(*said: str) -> dict:
    roles = ("user", "assistant") * len(said)
    return {
        "messages": [{"role": role, "content": w} for role, w in zip(roles, said, strict=False)]
    }


def test_a_long_prefix_is_shortened_once_and_told(student, tmp_path, caplog):
    rows = [{"prompt": "ask", "response": "no" + " no" * i} for i in range(4)]
    c = small(student, data__train=rows, data__too_long="truncate-prefix", train__steps=2)
    c.context.prefix_messages = [*_EXAMPLES, {"role": "user", "content": "x" * 30}, _EXAMPLES[2]]
    results = gkdjax.run(c, tmp_path)
    names = [f"data.train:{i}" for i in range(4)]
    assert results["rows"]["train"]["shortened"] == names
    assert results["rows"]["train"]["dropped"] == []
    assert "4 rows longer than data.max_length=64 lost " in caplog.text
    assert results["samples"]["question"] == ["ask"] * 3
    assert all(line["loss"] > 1e-4 for line in metrics(tmp_path))  # something of it is still read


def test_a_prefix_longer_than_all_of_max_length_is_named(student, tmp_path):
    prefix = tmp_path / "p.txt"
    prefix.write_text("x" * 100)
    c = small(student, context__prefix_messages=(), context__system_prompt_file=str(prefix))
    with pytest.raises(UserError, match=r"context\.system_prompt_file = .*p\.txt\) has 102 tokens"):
        gkdjax.run(c, tmp_path / "run")


def test_a_row_longer_than_the_models_context_is_named(tmp_path):
    model = factories.model_dir(tmp_path / "model", max_position_embeddings=32)
    rows = [{"prompt": "ask", "response": "no" * n} for n in (1, 1, 6)]
    c = small(model, data__train=rows)
    with pytest.raises(
        UserError,
        match=r"data\.train:2: .*the teacher .*base.* 42 tokens.* reads 32 at most .*\. Set",
    ):
        gkdjax.run(c, tmp_path / "run")
    c.data.train = rows[:2]
    c.anchor.data = [{"prompt": "other " * 6}]
    with pytest.raises(
        UserError, match=r"anchor\.data:0: .* with the response .* reads 32 at most .*\. Set"
    ):
        gkdjax.run(c, tmp_path / "anchor")


def test_a_role_that_nobody_has_is_named_with_the_file(student, tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps(_talk("a", "b")) + "\n")
    c = small(student, data__train=str(source), context__target_roles=("assistant", "critic"))
    with pytest.raises(
        UserError, match=r"'critic', .*x\.jsonl .*assistant \(in 1.*user \(in 1 row"
    ):
        gkdjax.run(c, tmp_path / "run")


def test_parts_of_data_are_learnt_and_rows_without_any_dropped(student, tmp_path):
    rows = [_talk("ask", "no", "ask", "yes it is"), _talk("ask", "no")]
    c = small(student, data__train=rows * 2, train__steps=2)
    c.context.target_content_pattern, c.context.target_span = "yes", "match"
    c.eval.prompts = [{"prompt": "tell"}]  # what is written to it never says yes
    results = gkdjax.run(c, tmp_path)
    assert results["rows"]["train"]["unmatched"] == ["data.train:1", "data.train:3"]
    assert [line["targets"] for line in metrics(tmp_path)] == [4 * 3] * 2
    assert results["base"]["forward_kl"] > 1e-4 > results["prompted_teacher"]["forward_kl"]


def test_every_answer_is_learnt_where_the_template_treats_the_last_one_apart(tmp_path):
    model = factories.model_dir(tmp_path / "model", chat_template=_LAST_APART)
    assert not load_chat(model).earlier_answers
    talk = _talk("ask", "no", "ask", "yes!", "ask")
    c = small(model, data__train=[talk, _talk("ask", "no")], train__steps=1, train__batch_size=4)
    c.data.max_length, c.data.bucket_lengths = 128, (64, 128)
    c.eval.prompts = [talk]
    c.anchor.data, c.anchor.batch_size = [_talk("other", "so", "other", "so")], 4
    results = gkdjax.run(c, tmp_path / "run")
    assert results["rows"]["train"]["dropped"] == []
    (line,) = (tmp_path / "run" / "trajectories_train.jsonl").read_text().splitlines()
    written = json.loads(line)
    assert written["row"] == "data.train:0[5]"
    # Each of the four rows once: three answers with their ends, and what was written.
    (step,) = metrics(tmp_path / "run")
    assert step["targets"] == 3 + 5 + 3 + len(written["ids"])
    assert step["loss"] > 1e-4


def test_the_student_writes_after_what_is_left_of_a_long_row(student, tmp_path):
    c = small(student, data__too_long="truncate-left", gkd__on_policy_fraction=1.0)
    c.data.train = [_talk("x" * 20, "no", f"ask {i}") for i in range(4)]
    c.anchor.data, c.anchor.batch_size = [_talk("y" * 40, "so", "other")], 4
    c.context.target_content_pattern, c.context.target_span = "[ -~]", "match"
    c.train.steps = 2
    results = gkdjax.run(c, tmp_path)
    assert len(results["rows"]["train"]["shortened"]) == 4
    assert results["rows"]["anchor"]["shortened"] == ["anchor.data:0"]
    steps = metrics(tmp_path)
    assert [line["on_policy_rows"] for line in steps] == [4, 4]
    # The pattern is for what is taught: the end of turn is no target there, but the anchor's is.
    assert all(0 < line["targets"] <= 4 * 4 for line in steps)
    # Before the first update the student is its own anchor, but for rounding.
    assert steps[0]["anchor_loss"] == pytest.approx(0, abs=1e-5)
    assert steps[1]["anchor_loss"] > 1e-3
