"""Whole runs, in this process, on four forced devices and tiny random models."""

import gc
import json
import signal
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import ConstantTeacher, losses, losses_hex, merged_weights, metrics, small

import gkdjax
from gkdjax import report
from gkdjax.evaluation.evaluate import Evaluation
from gkdjax.losses import Agreement
from gkdjax.models.hf import load
from gkdjax.train import loop, run, workdir
from gkdjax.utils.errors import Preempted, UserError
from gkdjax.utils.files import read_lines


def test_a_custom_teacher_is_learnt_from_and_everything_is_exported(student, tmp_path):
    path = tmp_path / "run"
    c = small(student, teacher__top_k=1, train__steps=30, train__export="both")
    c.student.lora.targets = "all-linear"
    results = gkdjax.run(c, path, teacher=ConstantTeacher())
    assert losses(path)[-1] < 0.2 * losses(path)[0]
    assert results["steps"] == 30 and results["samples"]["prompted_teacher"] == ["K"] * 3
    assert json.loads((path / "results.json").read_text()) == results
    decoder, params = load.load_pretrained(str(path / "merged"))
    hidden = decoder.apply({"params": params}, np.full((1, 8), 60), np.ones((1, 8), bool))
    logits = decoder.apply({"params": params}, hidden, method="unembed")
    assert int(jnp.argmax(logits[0, -1])) == 50
    assert (path / "adapter" / "adapter_config.json").exists()
    # A new file of a run is put into one of the lists of `workdir`.
    known = {"config.json", *workdir._BEGUN_WITH, *workdir._MEASURED}
    computed = {p.relative_to(path).parts[0] for w in workdir._COMPUTED for p in path.glob(w)}
    assert {found.name for found in path.iterdir()} <= known | computed


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory):
    """(config, directory) of a run that nothing interrupts."""
    c = small(student, teacher__top_k=1, train__steps=6, gkd__on_policy_fraction=0.5)
    path = tmp_path_factory.mktemp("whole")
    gkdjax.run(c, path, teacher=ConstantTeacher())
    return c, path


@pytest.mark.parametrize(
    ("how", "at", "error", "left"),
    [("fails_at", 4, ConnectionError, 4), ("stopped_at", 3, Preempted, 3)],
)
def test_an_interrupted_run_continues_as_if_it_had_not_been(whole, tmp_path, how, at, error, left):
    """Batches, adapters and optimizer of the steps after the break are those of a whole run."""
    c, undisturbed = whole
    c = c.copy_and_resolve_references()
    if error is Preempted:
        c.checkpoint.every_steps = 100  # nothing but the signal saves before the end
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error) as caught:
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(**{how: at}))
    if error is Preempted:
        assert "saved at step 3" in str(caught.value) and caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    again = ConstantTeacher()
    gkdjax.run(c, tmp_path, teacher=again)
    assert again.calls == left  # the steps after the checkpoint, not all six once more
    assert losses_hex(tmp_path) == losses_hex(undisturbed)
    assert merged_weights(tmp_path) == merged_weights(undisturbed)


def test_on_policy_batches_are_sampled_logged_and_come_after_the_warm_up(student, other, tmp_path):
    c = small(student, teacher__backend="flax", teacher__model=other, gkd__divergence="reverse_kl")
    c.gkd.on_policy_fraction, c.gkd.on_policy_warmup_steps = 1.0, 2
    c.data.train = [{"prompt": f"ask {i}", "response": "yes"} for i in range(6)]
    results = gkdjax.run(c, tmp_path)
    lines = metrics(tmp_path)
    assert [line["divergence"] for line in lines] == ["forward_kl"] * 2 + ["reverse_kl"] * 2
    assert [line["on_policy_rows"] for line in lines] == [0, 0, 4, 4]
    # "yes" and its end of turn: 4 targets a row. The student's own text has 4 tokens at most.
    assert [line["targets"] for line in lines[:2]] == [16, 16]
    assert all(line["targets"] <= 16 for line in lines[2:])
    assert results["on_policy_steps"] == 2


def test_self_baking_brings_the_student_nearer_to_its_prompted_self(student, tmp_path):
    questions = [{"prompt": f"tell {i}", "answer": "x"} for i in range(5)]
    c = small(student, train__steps=60, eval__questions=questions, gkd__divergence="forward_kl")
    c.data.train = [{"prompt": f"tell {i}"} for i in range(10, 60)]
    c.optim.learning_rate, c.student.lora.rank = 2e-3, 8
    results = gkdjax.run(c, tmp_path)
    # The teacher is the base: both are measured, and neither is 0 if a view or a shift were wrong.
    assert results["prompted_base"]["forward_kl"] == pytest.approx(0.0, abs=1e-5)
    assert results["prompted_teacher"]["forward_kl"] == pytest.approx(0.0, abs=1e-5)
    assert results["student"]["forward_kl"] < 0.5 * results["base"]["forward_kl"]
    assert set(results) >= {"recovery", "retention", "seconds", "tokens", "versions", "rows"}
    assert results["recovery"] is None  # nothing answers "x": the prefix changes no answer


def test_full_fine_tuning_keeps_a_frozen_copy_for_the_anchor(student, tmp_path, caplog):
    c = small(student, student__adapter="none", anchor__data=[{"prompt": "other"}] * 2)
    gkdjax.run(c, tmp_path)
    assert "frozen second copy of the student" in caplog.text
    before, after = (load.load_pretrained(path)[1] for path in (student, tmp_path / "merged"))
    assert not np.array_equal(before["embedding"], after["embedding"])
    # The student starts as the base, so that its distance to the base starts at zero.
    first, *_, last = (line["anchor_loss"] for line in metrics(tmp_path))
    assert first == pytest.approx(0.0, abs=1e-6) and last > 1e-5


def test_full_fine_tuning_frees_the_untrained_parameters_if_nothing_reads_them(
    student, other, tmp_path, monkeypatch
):
    held = []

    def train(parts, *others):
        leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(parts.base)]
        assert not parts.keeps_base and len(leaves) > 5
        parts.base = None  # as the real one does
        gc.collect()
        held.append(sum(leaf() is not None for leaf in leaves))
        raise InterruptedError

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(Evaluation, "before", lambda self, base: {"answers": []})
    c = small(student, teacher__backend="flax", teacher__model=other, student__adapter="none")
    with pytest.raises(InterruptedError):
        gkdjax.run(c, tmp_path / "run")
    assert held == [0]


def test_rows_that_are_too_long_are_counted_and_named(student, tmp_path, caplog):
    rows = [{"prompt": f"ask {i}", "response": "no"} for i in range(6)]
    rows[1]["response"] = "far too long " * 6
    rows[3]["prompt"] = rows[0]["prompt"] = "much too long " * 6
    rows[5]["response"] = ""
    c = small(student, data__train=rows, data__too_long="truncate-right", data__bad_rows="drop")
    results = gkdjax.run(c, tmp_path)
    found = dict(results["rows"]["train"])
    assert 0 < found.pop("padding")["student"] < 1
    assert found == {
        "rows": 3,
        "dropped": ["data.train:0", "data.train:3"],
        "truncated": ["data.train:1"],
        "unusable": ["data.train:5"],
        "refused_responses": 0,
    }
    assert results["samples"]["question"] == ["ask 1", "ask 2", "ask 4"]
    assert "data.train: 2 rows dropped" in caplog.text and "data.train:3" in caplog.text
    assert results["dropped_rows"] == {"data.train": ["data.train:5"]}
    shown = report.render(results, tmp_path)
    assert all(text in shown for text in ("1 unusable", "2 dropped", "1 truncated"))


def test_rows_that_change_during_a_run_are_noticed(student, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "ask", "response": "yes"}\n' * 6)
    c = small(student, teacher__top_k=1, data__train=str(data))
    with pytest.raises(ConnectionError):
        gkdjax.run(c, tmp_path / "run", teacher=ConstantTeacher(fails_at=4))
    data.write_text(data.read_text().replace("yes", "no", 1))
    with pytest.raises(UserError, match="the rows of train are not those that the run in"):
        gkdjax.run(c, tmp_path / "run", teacher=ConstantTeacher())


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_nothing_is_compiled_after_the_first_epoch(student, other, tmp_path, on_policy):
    """Three epochs of rows whose lengths differ widely, so that batches differ too."""
    c = small(student, teacher__backend="flax", teacher__model=other, train__steps=18)
    c.data.train = [
        {"prompt": "a " * (1 + i % 13), "response": "b " * (1 + i % 7)} for i in range(22)
    ]
    c.data.bucket_lengths, c.gkd.on_policy_fraction = (), on_policy
    results = gkdjax.run(c, tmp_path)
    compiled = [line["compilations"] for line in metrics(tmp_path)]
    assert sum(compiled[:6]) >= 2  # 22 rows in batches of 4; one shape would show nothing
    assert compiled[6:] == [0] * 12 and results["compilations"] == sum(compiled)


def test_the_precision_reaches_every_program_and_a_compilation_is_counted(
    student, other, tmp_path, monkeypatch
):
    make_train_step = loop.make_train_step

    def forgetful(*arguments):
        assert jax.config.jax_default_matmul_precision == "highest"
        step = make_train_step(*arguments)

        def run_step(state, *rest, **options):
            if int(state.step) == 2:
                jax.clear_caches()
            return step(state, *rest, **options)

        return run_step

    monkeypatch.setattr(loop, "make_train_step", forgetful)
    c = small(student, teacher__backend="flax", teacher__model=other)
    c.train.matmul_precision = "highest"
    gkdjax.run(c, tmp_path)
    compiled = [line["compilations"] for line in metrics(tmp_path)]
    assert compiled[1] == 0 < compiled[2]
    assert jax.config.jax_default_matmul_precision is None


def test_prompts_without_an_answer_are_measured_at_start_steps_and_end(
    student, other, tmp_path, capsys
):
    c = small(student, teacher__backend="flax", teacher__model=other, teacher__top_k=7)
    c.eval.prompts = [{"prompt": f"tell {i}"} for i in range(6)]
    c.train.steps, c.eval.every_steps, c.eval.rows = 5, 2, 5
    results = gkdjax.run(c, tmp_path)
    lines = read_lines(tmp_path / "eval.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    texts = ("teacher_text", "student_text")
    fields = (*Agreement._fields, "perplexity")
    for line in lines:
        assert set(line) == {"step", *(f"{text}/{field}" for text in texts for field in fields)}
        for text in texts:
            assert line[f"{text}/forward_kl"] > 0 and line[f"{text}/reverse_kl"] > 0
            for share in ("teacher_top_k_mass", "student_top_k_mass", "acceptance_rate"):
                assert 0 < line[f"{text}/{share}"] < 1
            assert 0 <= line[f"{text}/top1_agreement"] <= 1
    # The teacher's text stays the same, and so does the teacher's prediction of it.
    assert len({line["teacher_text/teacher_top_k_mass"] for line in lines}) == 1
    assert len({line["teacher_text/student_top_k_mass"] for line in lines}) == 4
    assert results["held_out"] == {"before": lines[0], "after": lines[-1]}
    assert "accuracy" not in results["student"] and "recovery" not in results
    printed = capsys.readouterr().out
    assert "Distance to the prompted teacher" in printed and "Right answers" not in printed
