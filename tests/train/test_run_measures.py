"""What a run measures of itself: the schedule, the report, and what it compiles when."""

import jax
import pytest
from small_runs import metrics, small

import gkdjax
from gkdjax.losses import Agreement
from gkdjax.train import loop
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import read_lines


def of_many_lengths(student: str, other: str):
    """Three epochs of rows whose lengths differ widely, so that batches differ too."""
    c = small(student, teacher__backend="flax", teacher__model=other)
    c.data.train = [
        {"prompt": "a " * (1 + i % 13), "response": "b " * (1 + i % 7)} for i in range(22)
    ]
    c.data.bucket_lengths = ()
    c.train.steps = 18
    return c


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_nothing_is_compiled_after_the_first_epoch(student, other, tmp_path, on_policy):
    c = of_many_lengths(student, other)
    c.gkd.on_policy_fraction = on_policy
    results = gkdjax.run(c, tmp_path)
    compiled = [line["compilations"] for line in metrics(tmp_path)]
    first_epoch = 6  # 22 rows in batches of 4
    assert sum(compiled[:first_epoch]) >= 2  # more than one shape, or this shows nothing
    assert compiled[first_epoch:] == [0] * 12
    assert results["compilations"] == sum(compiled)


def test_a_step_that_compiles_anew_is_counted(student, other, tmp_path, monkeypatch):
    """The test above can fail: a step of another shape shows in the counter."""
    c = small(student, teacher__backend="flax", teacher__model=other)
    run_step = loop.make_train_step

    def forgetful(*arguments):
        step = run_step(*arguments)

        def run(state, *rest, **options):
            if int(state.step) == 2:
                jax.clear_caches()
            return step(state, *rest, **options)

        return run

    monkeypatch.setattr(loop, "make_train_step", forgetful)
    gkdjax.run(c, tmp_path)
    compiled = [line["compilations"] for line in metrics(tmp_path)]
    assert compiled[1] == 0 < compiled[2]


@pytest.fixture(scope="module")
def measured(student, other, tmp_path_factory):
    """(results, workdir) of a run that is measured every two of its five steps."""
    workdir = tmp_path_factory.mktemp("measured")
    c = small(student, teacher__backend="flax", teacher__model=other, teacher__top_k=7)
    c.train.steps = 5
    c.eval.questions = [{"prompt": f"tell {i}", "answer": "x"} for i in range(6)]
    c.eval.every_steps, c.eval.rows = 2, 5
    return gkdjax.run(c, workdir), workdir


def test_the_schedule_measures_start_steps_and_end(measured):
    results, workdir = measured
    lines = read_lines(workdir / "eval.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    expected = {"step", "accuracy"}
    texts = ("teacher", "student")
    expected |= {f"{text}_text/{field}" for text in texts for field in Agreement._fields}
    expected |= {f"{text}_text/perplexity" for text in texts}
    for line in lines:
        assert set(line) == expected
        for text in texts:
            assert line[f"{text}_text/forward_kl"] > 0 and line[f"{text}_text/reverse_kl"] > 0
            for share in ("teacher_top_k_mass", "student_top_k_mass", "acceptance_rate"):
                assert 0 < line[f"{text}_text/{share}"] < 1
            assert 0 <= line[f"{text}_text/top1_agreement"] <= 1
    # The teacher's text stays the same, and so does what the teacher makes of it.
    assert len({line["teacher_text/teacher_top_k_mass"] for line in lines}) == 1
    assert len({line["teacher_text/student_top_k_mass"] for line in lines}) == 4
    assert results["held_out"] == {"before": lines[0], "after": lines[-1]}


def test_prompts_without_an_answer_are_measured_too(student, tmp_path, capsys):
    c = small(student, eval__prompts=[{"prompt": f"tell {i}"} for i in range(3)])
    results = gkdjax.run(c, tmp_path)
    assert [line["step"] for line in read_lines(tmp_path / "eval.jsonl")] == [0, 4]
    assert "accuracy" not in results["student"] and "recovery" not in results
    assert results["student"]["forward_kl"] != results["base"]["forward_kl"] > 1e-3
    # Teacher and student are one model: before training it differs by its prefix alone.
    assert results["prompted_base"]["forward_kl"] == pytest.approx(0.0, abs=1e-5)
    printed = capsys.readouterr().out
    assert "Distance to the prompted teacher" in printed and "Right answers" not in printed
    assert "acceptance rate" in printed


def test_a_schedule_with_nothing_to_measure_on_is_refused(student, tmp_path):
    with pytest.raises(UserError, match=r"eval\.every_steps = 2: nothing to measure on"):
        gkdjax.run(small(student, eval__every_steps=2), tmp_path)


def test_matmul_precision_reaches_every_program(student, tmp_path, monkeypatch):
    seen = []
    run_step = loop.make_train_step

    def look(*arguments):
        seen.append(jax.config.jax_default_matmul_precision)
        return run_step(*arguments)

    monkeypatch.setattr(loop, "make_train_step", look)
    gkdjax.run(small(student, train__matmul_precision="highest", train__steps=1), tmp_path)
    assert seen == ["highest"]
    assert jax.config.jax_default_matmul_precision is None
