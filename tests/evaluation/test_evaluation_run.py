"""A whole run that measures all there is, and runs that measure some of it."""

import itertools
import json

import numpy as np
import pytest
from small_runs import PREFIX, ConstantTeacher, metrics, small

import gkdjax
from gkdjax import config
from gkdjax.evaluation.evaluate import Evaluation
from gkdjax.losses import Agreement
from gkdjax.tools import export_hf
from gkdjax.train import evals
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import read_lines

MEASURES = {*Agreement._fields, "perplexity"}
AFTER = ("student", "reprompted_student", "student_other_prefix")
CONDITIONS = ("base", "prompted_base", "prompted_teacher", *AFTER)


def questions(*prompts, answer="."):
    """Right is every answer that has a character."""
    return [{"prompt": prompt, "answer": answer, "match": "regex"} for prompt in prompts]


def system(text):
    return [{"role": "system", "content": text}]


def measuring(student, **changes):
    """Everything is asked of a run of five steps."""
    changes = {
        "data__train": [{"prompt": f"ask {i}"} for i in range(8)],
        "data__validation": 0.25,
        "eval__questions": questions("q 1", "q 2", "q 3", "q 4", "q 5"),
        "eval__heldout": questions("h 1", "h 2"),
        "eval__retention": {"sort": questions("s 1", "s 2", answer="none of it")},
        "eval__other_prefix": system("be long"),
        "eval__every_steps": 2,
        "eval__at_steps": (1, 7),
        "checkpoint__keep_evaluated": True,
        "checkpoint__max_to_keep": 1,
        "checkpoint__every_steps": 100,
        "train__steps": 5,
    } | changes
    return small(student, train__grad_accum_steps=1, **changes)


@pytest.fixture(scope="module")
def run(student, other, tmp_path_factory):
    """(results, workdir, initials of the questions that were asked on the way)"""
    workdir, asked, on_the_way = tmp_path_factory.mktemp("measured") / "run", [], set()
    ask, measure = Evaluation._ask, Evaluation.on_the_way

    def listen(self, model, examples, *rest):
        asked.extend(example.turns[-1].content[0] for example in examples)
        return ask(self, model, examples, *rest)

    def watch(self, model):
        asked.clear()
        found = measure(self, model)
        on_the_way.update(asked)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "_ask", listen)
        patch.setattr(Evaluation, "on_the_way", watch)
        c = measuring(student, teacher__backend="flax", teacher__model=other)
        return gkdjax.run(c, workdir), workdir, on_the_way


def test_every_condition_has_every_measure(run):
    results, _, _ = run
    for name in CONDITIONS:
        assert set(results[name]) == MEASURES | {"accuracy", "heldout_accuracy"}, name
    # Read with other prefixes, the same text by the same model: all distances differ.
    assert len({results[name]["forward_kl"] for name in CONDITIONS}) == len(CONDITIONS)
    teacher = results["prompted_teacher"]
    assert teacher["forward_kl"] == pytest.approx(0.0, abs=1e-5)
    assert teacher["acceptance_rate"] == pytest.approx(1.0, abs=1e-5)
    assert teacher["perplexity"] < results["base"]["perplexity"]
    assert results["unavailable"] == {}
    assert results["counts"] == {"questions": 5, "heldout": 2, "sort": 2}
    cost = results["prefix_cost"]
    assert cost["tokens_saved"] > len("be brief") and set(cost["seconds"]) == {"without", "with"}


def test_states_on_the_way_are_those_of_both_keys_and_ask_no_held_out_question(run):
    results, workdir, asked = run
    assert asked == {"q"}
    lines, samples = (read_lines(workdir / f"{name}.jsonl") for name in ("eval", "samples"))
    assert [line["step"] for line in lines] == [line["step"] for line in samples] == [0, 1, 2, 4, 5]
    expected = {"step", "accuracy", "validation/loss"}
    for text in ("teacher_text", "student_text", "validation", "side_effects"):
        expected |= {f"{text}/{measure}" for measure in MEASURES}
    assert all(set(line) == expected for line in lines)
    assert samples[0]["answers"] == results["samples"]["base"]
    assert samples[-1]["answers"] == results["samples"]["student"]
    # There are no side effects before the first step.
    distances = [line["side_effects/forward_kl"] for line in lines]
    assert distances[0] == pytest.approx(0.0, abs=1e-6) and min(distances[1:]) > 1e-4
    assert results["side_effects"]["forward_kl"] == pytest.approx(distances[-1], rel=1e-6)


def test_steps_that_the_run_never_gets_to_are_named(caplog):
    assert evals.measured_steps(config.Eval(every_steps=2, at_steps=(1, 5)), 5) == {0, 1, 2, 4, 5}
    assert caplog.text == ""
    assert evals.measured_steps(config.Eval(at_steps=(1, 7)), 5) == {0, 1, 5}
    assert "eval.at_steps: the run has 5 steps and never gets to [7]" in caplog.text


def test_states_that_were_measured_are_kept_and_can_be_exported(run, tmp_path):
    _, workdir, _ = run
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "2", "4", "5"}
    found = {}
    for step in (1, 5):
        export_hf.export_step(workdir, tmp_path / str(step), step=step)
        found[step] = (tmp_path / str(step) / "model.safetensors").read_bytes()
    assert found[1] != found[5] == (workdir / "merged/model.safetensors").read_bytes()


def test_each_answer_is_written_down_with_its_verdict(run):
    results, workdir, _ = run
    lines = read_lines(workdir / "answers.jsonl")
    measures = ("questions", "accuracy", 5), ("heldout", "heldout_accuracy", 2)
    for name, (key, measure, count) in itertools.product(CONDITIONS, measures):
        right = [x["right"] for x in lines if (x["condition"], x["set"]) == (name, key)]
        assert len(right) == count and sum(right) / count == results[name][measure]
    sort = [line for line in lines if line["set"] == "sort"]
    assert [line["condition"] for line in sort] == ["base"] * 2 + ["student"] * 2
    assert not any(line["right"] for line in sort)
    assert sort[0]["expected"] == ["none of it"] and sort[0]["question"] == "s 1"
    assert results["retention"]["sort"] == {"before": 0.0, "after": 0.0}


@pytest.mark.parametrize(("reduction", "top_k"), [("token", None), ("example", 7)])
def test_the_loss_of_validation_rows_is_the_training_loss(
    student, other, tmp_path, reduction, top_k
):
    """On the rows of the first step, and before it: both come from programs of their own."""
    rows = [{"prompt": f"ask {i}", "response": "yes " * (1 + i)} for i in range(4)]
    c = small(student, data__train=rows, data__validation=rows, train__steps=1)
    c.teacher.backend, c.teacher.model, c.teacher.top_k = "flax", other, top_k
    c.gkd.divergence, c.gkd.jsd_beta, c.gkd.reduction = "generalized_jsd", 0.3, reduction
    gkdjax.run(c, tmp_path)
    validation = read_lines(tmp_path / "eval.jsonl")[0]["validation/loss"]
    assert validation == pytest.approx(metrics(tmp_path)[0]["loss"], rel=1e-5)


def test_a_run_interrupted_after_a_measurement_has_each_line_once(student, tmp_path):
    c = measuring(student, teacher__top_k=1, data__validation=None)
    with pytest.raises(ConnectionError):
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5, fails_at=8))
    before = read_lines(tmp_path / "eval.jsonl")
    assert before
    (tmp_path / "samples.jsonl").write_text("")  # killed between the two lines
    results = gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))
    lines = read_lines(tmp_path / "eval.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 4, 5]
    assert lines[: len(before)] == before
    # A teacher that is no model of ours: by definition, and as it said of its own tokens.
    assert results["prompted_teacher"]["forward_kl"] == 0.0
    assert results["prompted_teacher"]["perplexity"] == pytest.approx(1 / 0.9, rel=1e-5)
    assert "its best 1 tokens" in results["unavailable"]["exact divergences"]


def test_what_is_missing_is_listed_with_what_would_bring_it(student, tmp_path, caplog):
    """Side effects of full fine-tuning need a copy of the untrained student, which is announced."""
    c = small(student, train__steps=1, context__prefix_messages=(), student__adapter="none")
    c.teacher.backend, c.teacher.model = "flax", student
    c.eval.side_effects = [{"prompt": "q"}]
    results = gkdjax.run(c, tmp_path)
    assert set(results["unavailable"]) == {
        "accuracy and recovery",
        "accuracy on held-out questions",
        "distance to the prompted teacher",
        "student with the prefix, and what the prefix costs",
        "student with another prefix",
        "kept abilities",
        "validation loss",
    }
    for why in results["unavailable"].values():
        assert "set " in why or "there is no prefix" in why
    assert "reprompted_student" not in results and "prefix_cost" not in results
    assert json.loads((tmp_path / "before.json").read_text())["counts"] == {}
    assert "the evaluation of side effects" in caplog.text
    first, last = read_lines(tmp_path / "eval.jsonl")
    assert first["side_effects/forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(last["side_effects/perplexity"])
    assert results["side_effects"]["forward_kl"] >= 0.0


def test_another_prefix_that_is_the_baked_one_measures_the_same(student, other, tmp_path):
    """One is read from the student's half of the batches, the other from the teacher's."""
    c = measuring(student, teacher__backend="flax", teacher__model=other, train__steps=2)
    c.eval.other_prefix, c.checkpoint.keep_evaluated = PREFIX, False
    c.eval.every_steps, c.eval.at_steps, c.data.validation = None, (), None
    results = gkdjax.run(c, tmp_path)
    there, here = results["reprompted_student"], results["student_other_prefix"]
    assert here == pytest.approx(there, rel=1e-4) and here["forward_kl"] > 1e-3
    samples = results["samples"]
    assert samples["reprompted_student"] == samples["student_other_prefix"]


def test_what_has_no_room_behind_another_prefix_is_named(student, tmp_path, caplog):
    c = small(student, train__steps=1, eval__prompts=[{"prompt": "q"}], teacher__top_k=1)
    c.eval.other_prefix = system("x" * 44)  # there is room for one token
    results = gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))
    assert "eval.other_prefix: 1 tokens of the teacher's answers have no room" in caplog.text
    assert results["student_other_prefix"]["forward_kl"] > 0
    c = measuring(student, eval__other_prefix=system("x" * 64))
    with pytest.raises(UserError, match=r"eval\.questions:0: .*data\.max_length = 64"):
        gkdjax.run(c, tmp_path / "longer")
