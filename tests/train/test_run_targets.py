"""Whole runs whose targets are not all of the assistant's messages, and what then hangs on it."""

import factories
import pytest
from small_runs import ConstantTeacher, metrics, small

import gkdjax
from gkdjax import config
from gkdjax.data.load import load_examples
from gkdjax.models.prefix_cache import PrefixCache
from gkdjax.train import datasets
from gkdjax.utils.errors import UserError

LONG = [{"role": "system", "content": "be brief" * 20}]


def test_text_that_nobody_learns_need_not_have_the_pattern(student, tmp_path):
    c = small(student, teacher__top_k=1, train__steps=2)
    c.context.target_roles, c.context.target_content_pattern = ["user"], "ask"
    results = gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))  # it always says "K"
    assert results["rows"]["train"]["rows"] == 6
    assert results["rows"]["train"]["refused_responses"] == 0


def test_on_policy_text_has_to_be_a_target(student, tmp_path):
    c = small(student, gkd__on_policy_fraction=0.5, context__target_roles=["user"])
    with pytest.raises(UserError, match=r"context\.target_roles.*learns the student's text"):
        gkdjax.run(c, tmp_path)


def test_on_policy_text_that_is_cut_is_counted(student, tmp_path):
    c = small(student, teacher__top_k=1, gkd__on_policy_fraction=1.0, train__steps=2)
    c.data.max_length, c.data.bucket_lengths = 48, (48,)
    c.rollout.max_new_tokens = 30
    gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))
    for line in metrics(tmp_path):
        assert 0 < line["truncated_rows"] <= line["on_policy_rows"] == 4
        assert line["dropped_rows"] == 0


def test_a_prefix_is_read_once_though_the_question_after_it_is_a_target(
    student, tmp_path, monkeypatch
):
    seen, readings = [], PrefixCache._readings
    monkeypatch.setattr(PrefixCache, "_readings", lambda *a: seen.append(readings(*a)) or seen[-1])
    c = small(student, context__prefix_messages=LONG, context__target_roles=["user", "assistant"])
    c.data.train = [{"prompt": f"{i} is asked", "response": "no"} for i in range(6)]
    c.data.max_length, c.data.bucket_lengths, c.train.steps = 256, (), 2
    gkdjax.run(c, tmp_path)
    lengths = {len(ids) for one in seen for ids, _ in one}
    # A system message stands in the user's first turn here, whose header is read before it.
    assert min(lengths) > 150


@pytest.mark.parametrize(
    ("tokens", "roles"), [("response", {"assistant"}), ("all", {"assistant", "user"})]
)
def test_an_anchor_has_targets_of_its_own(student, tokens, roles):
    talk = [{"role": "user", "content": "2 x 21?"}, {"role": "tool", "content": "42"}]
    c = small(student, context__target_roles=["user"], anchor__tokens=tokens)
    c.anchor.data = [{"messages": [*talk, {"role": "assistant", "content": "42"}]}]
    c = config.parse(c)
    assert {*datasets.anchor_targets(c, load_examples(c).anchors).roles} == roles


def test_rows_that_change_on_the_way_are_noticed(student, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "ask", "response": "yes"}\n' * 6)
    c = small(student, teacher__top_k=1, data__train=str(data))
    with pytest.raises(ConnectionError):
        gkdjax.run(c, tmp_path / "run", teacher=ConstantTeacher(50, 5, fails_at=4))
    data.write_text(data.read_text().replace("yes", "no", 1))
    with pytest.raises(UserError, match="the rows of train are not those that the run in"):
        gkdjax.run(c, tmp_path / "run", teacher=ConstantTeacher(50, 5))


def test_what_the_student_is_to_write_has_to_fit_its_context(tmp_path):
    model = factories.model_dir(tmp_path / "model", max_position_embeddings=48)
    c = small(model, gkd__on_policy_fraction=0.5, rollout__max_new_tokens=30)
    c.data.train = [{"prompt": "ask", "response": "no"}]
    c.gkd.on_policy_warmup_steps = c.train.steps  # it is checked before anything is computed
    with pytest.raises(
        UserError, match=r"data\.train:0: .* with the response .*reads 48 at most .*\. Set"
    ):
        gkdjax.run(c, tmp_path / "run")


def test_a_question_longer_than_the_models_context_is_named(tmp_path):
    model = factories.model_dir(tmp_path / "model", max_position_embeddings=48)
    c = small(model, eval__questions=[{"prompt": "why " * 5, "answer": "x"}])
    c.data.train = [{"prompt": "ask", "response": "no"}]
    with pytest.raises(UserError, match=r"eval\.questions:0: .*reads 48 at most .*\. Set"):
        gkdjax.run(c, tmp_path / "run")
