"""A whole run that measures all there is, and runs that measure some of it."""

import json

import numpy as np
import pytest
from small_runs import PREFIX, ConstantTeacher, metrics, small

import gkdjax
from gkdjax import config
from gkdjax.losses import Agreement
from gkdjax.tools import export_hf
from gkdjax.train import evals
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import read_lines

OTHER = [{"role": "system", "content": "be long"}]
MEASURES = {*Agreement._fields, "perplexity"}
AFTER = ("student", "reprompted_student", "student_other_prefix")
CONDITIONS = ("base", "prompted_base", "prompted_teacher", *AFTER)


def questions(*prompts, answer="."):
    """Right is every answer that has a character."""
    return [{"prompt": prompt, "answer": answer, "match": "regex"} for prompt in prompts]


def measuring(student, **changes):
    """Everything is asked of a run of five steps."""
    c = small(student, train__steps=5, train__grad_accum_steps=1)
    c.data.train = [{"prompt": f"ask {i}"} for i in range(8)]
    c.data.validation = 0.25
    c.eval.questions = questions("q 1", "q 2", "q 3", "q 4", "q 5")
    c.eval.heldout = questions("h 1", "h 2")
    c.eval.retention = {"sort": questions("s 1", "s 2", answer="none of it")}
    c.eval.other_prefix = OTHER
    c.eval.every_steps, c.eval.at_steps = 2, (1, 7)
    c.checkpoint.keep_evaluated, c.checkpoint.max_to_keep, c.checkpoint.every_steps = True, 1, 100
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c


@pytest.fixture(scope="module")
def run(student, other, tmp_path_factory):
    """(results, workdir, config)"""
    workdir = tmp_path_factory.mktemp("measured") / "run"
    c = measuring(student, teacher__backend="flax", teacher__model=other)
    return gkdjax.run(c, workdir), workdir, c


def test_every_condition_has_every_measure(run):
    results, _, _ = run
    for name in CONDITIONS:
        assert set(results[name]) == MEASURES | {"accuracy", "heldout_accuracy"}, name
    # Read with other prefixes, the same text by the same model: all distances differ.
    distances = {results[name]["forward_kl"] for name in CONDITIONS}
    assert len(distances) == len(CONDITIONS)
    teacher = results["prompted_teacher"]
    assert teacher["forward_kl"] == pytest.approx(0.0, abs=1e-5)
    assert teacher["acceptance_rate"] == pytest.approx(1.0, abs=1e-5)
    assert teacher["perplexity"] < results["base"]["perplexity"]


def test_the_schedule_is_the_union_of_both_keys(run):
    _, workdir, _ = run
    lines = read_lines(workdir / "eval.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 4, 5]
    expected = {"step", "accuracy", "validation/loss"}
    for text in ("teacher_text", "student_text", "validation", "side_effects"):
        expected |= {f"{text}/{measure}" for measure in MEASURES}
    assert all(set(line) == expected for line in lines)
    samples = read_lines(workdir / "samples.jsonl")
    assert [line["step"] for line in samples] == [0, 1, 2, 4, 5]
    results = run[0]
    assert samples[0]["answers"] == results["samples"]["base"]
    assert samples[-1]["answers"] == results["samples"]["student"]


def test_steps_that_the_run_never_gets_to_are_told(caplog):
    assert evals.measured_steps(config.Eval(every_steps=2, at_steps=(1, 5)), 5) == {0, 1, 2, 4, 5}
    assert caplog.text == ""
    assert evals.measured_steps(config.Eval(at_steps=(1, 7)), 5) == {0, 1, 5}
    assert "eval.at_steps: the run has 5 steps and never gets to [7]" in caplog.text


def test_side_effects_are_nothing_before_the_first_step(run):
    results, workdir, _ = run
    lines = read_lines(workdir / "eval.jsonl")
    distances = [line["side_effects/forward_kl"] for line in lines]
    assert distances[0] == pytest.approx(0.0, abs=1e-6)
    assert min(distances[1:]) > 1e-4
    assert results["side_effects"]["forward_kl"] == pytest.approx(distances[-1], rel=1e-6)


def test_states_that_were_measured_are_kept_and_can_be_exported(run, tmp_path):
    _, workdir, _ = run
    kept = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert kept == {"1", "2", "4", "5"}
    found = {}
    for step in (1, 5):
        export_hf.export_step(workdir, tmp_path / str(step), step=step)
        found[step] = (tmp_path / str(step) / "model.safetensors").read_bytes()
    assert found[1] != found[5] == (workdir / "merged/model.safetensors").read_bytes()


def test_each_answer_is_written_down_with_its_verdict(run):
    results, workdir, _ = run
    lines = read_lines(workdir / "answers.jsonl")
    for name in CONDITIONS:
        for of, key, count in (("questions", "accuracy", 5), ("heldout", "heldout_accuracy", 2)):
            right = [
                line["right"] for line in lines if (line["condition"], line["set"]) == (name, of)
            ]
            assert len(right) == count and sum(right) / count == results[name][key]
    of_sort = [line for line in lines if line["set"] == "sort"]
    assert [line["condition"] for line in of_sort] == ["base"] * 2 + ["student"] * 2
    assert not any(line["right"] for line in of_sort)
    assert of_sort[0]["expected"] == ["none of it"] and of_sort[0]["question"] == "s 1"
    assert results["retention"]["sort"] == {"before": 0.0, "after": 0.0}


def test_nothing_is_missing_but_what_has_no_meaning(run):
    results, _, _ = run
    assert results["unavailable"] == {}
    assert results["counts"] == {"questions": 5, "heldout": 2, "sort": 2}
    cost = results["prefix_cost"]
    assert cost["tokens_saved"] > len("be brief") and set(cost["seconds"]) == {"without", "with"}


def test_the_loss_of_validation_rows_is_the_training_loss(student, other, tmp_path):
    """On the rows of the first step, and before it: both come from programs of their own."""
    rows = [{"prompt": f"ask {i}", "response": "yes " * (1 + i)} for i in range(4)]
    for reduction in ("token", "example"):
        for top_k in (None, 7):
            c = small(student, data__train=rows, data__validation=rows, train__steps=1)
            c.teacher.backend, c.teacher.model, c.teacher.top_k = "flax", other, top_k
            c.gkd.divergence, c.gkd.jsd_beta, c.gkd.reduction = "generalized_jsd", 0.3, reduction
            workdir = tmp_path / f"{reduction}{top_k}"
            gkdjax.run(c, workdir)
            validation = read_lines(workdir / "eval.jsonl")[0]["validation/loss"]
            assert validation == pytest.approx(metrics(workdir)[0]["loss"], rel=1e-5)


def test_held_out_questions_are_not_asked_on_the_way(run, student, other, tmp_path, monkeypatch):
    from gkdjax.evaluation.evaluate import Evaluation

    asked, ask = [], Evaluation._ask

    def listen(self, reader, examples, view, what):
        asked.append({e.turns[-1].content[0] for e in examples})
        return ask(self, reader, examples, view, what)

    monkeypatch.setattr(Evaluation, "_ask", listen)
    on_the_way = Evaluation.on_the_way

    def watched(self, reader):
        asked.clear()
        found = on_the_way(self, reader)
        assert asked and not any("h" in initials for initials in asked)
        return found

    monkeypatch.setattr(Evaluation, "on_the_way", watched)
    c = measuring(student, teacher__backend="flax", teacher__model=other, train__steps=1)
    gkdjax.run(c, tmp_path)


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


def test_what_is_not_there_is_told_with_what_would_bring_it(student, tmp_path):
    c = small(student, train__steps=1, context__prefix_messages=(), student__adapter="none")
    c.teacher.backend, c.teacher.model = "flax", student
    c.eval.prompts = [{"prompt": "q"}]
    results = gkdjax.run(c, tmp_path)
    assert set(results["unavailable"]) == {
        "accuracy and recovery",
        "accuracy on held-out questions",
        "student with the prefix, and what the prefix costs",
        "student with another prefix",
        "kept abilities",
        "side effects",
        "validation loss",
    }
    for why in results["unavailable"].values():
        assert "set " in why or "there is no prefix" in why
    assert "reprompted_student" not in results and "prefix_cost" not in results
    assert json.loads((tmp_path / "before.json").read_text())["counts"] == {}


def test_side_effects_of_full_fine_tuning_keep_the_untrained_student(student, tmp_path, caplog):
    c = small(student, train__steps=2, student__adapter="none", context__prefix_messages=())
    c.teacher.backend, c.teacher.model = "flax", student
    c.eval.side_effects = [{"prompt": "q"}]
    results = gkdjax.run(c, tmp_path)
    assert "the evaluation of side effects" in caplog.text
    assert results["side_effects"]["forward_kl"] >= 0.0
    (first, last) = read_lines(tmp_path / "eval.jsonl")
    assert first["side_effects/forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(last["side_effects/perplexity"])


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


def test_what_has_no_room_behind_another_prefix_is_told(student, tmp_path, caplog):
    c = small(student, train__steps=1, eval__prompts=[{"prompt": "q"}], teacher__top_k=1)
    c.eval.other_prefix = [{"role": "system", "content": "x" * 44}]  # there is room for one token
    results = gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))
    assert "eval.other_prefix: 1 tokens of the teacher's answers have no room" in caplog.text
    assert results["student_other_prefix"]["forward_kl"] > 0


def test_another_prefix_has_to_fit_too(student, tmp_path):
    c = measuring(student, eval__other_prefix=[{"role": "system", "content": "x" * 64}])
    with pytest.raises(UserError, match=r"eval\.questions:0: .*data\.max_length = 64"):
        gkdjax.run(c, tmp_path)
