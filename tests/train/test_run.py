"""Whole runs, in this process, on four forced devices and tiny random models."""

import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import PREFIX, ConstantTeacher, losses_hex, metrics, small

import gkdjax
from gkdjax import report
from gkdjax.models.hf import load
from gkdjax.train import workdir
from gkdjax.utils.errors import Preempted, UserError


def test_a_custom_teacher_is_learnt_from_and_everything_is_handed_over(student, tmp_path):
    stop = 5  # <end_of_turn>
    teacher = ConstantTeacher(token=50, stop=stop)
    c = small(student, teacher__top_k=1, train__steps=30, train__export="both")
    c.student.lora.targets = "all-linear"
    results = gkdjax.run(c, tmp_path / "run", teacher=teacher)
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert results["steps"] == 30 and results["samples"]["prompted_teacher"] == ["K"] * 3
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    decoder, params = load.load_pretrained(str(tmp_path / "run" / "merged"))
    hidden = decoder.apply({"params": params}, np.full((1, 8), 60), np.ones((1, 8), bool))
    logits = decoder.apply({"params": params}, hidden, method="unembed")
    assert int(jnp.argmax(logits[0, -1])) == 50
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    known = {"config.json", workdir._LOCK, *workdir._BEGUN_WITH, *workdir._MEASURED}
    unknown = {path for path in (tmp_path / "run").iterdir() if path.name not in known}
    for pattern in workdir._COMPUTED:  # a new file of a run is put into one of the lists
        unknown -= {
            tmp_path / "run" / p.relative_to(tmp_path / "run").parts[0]
            for p in (tmp_path / "run").glob(pattern)
        }
    assert not unknown


def test_what_a_custom_teacher_cannot_do_is_refused_with_what_would_work(student, tmp_path):
    with pytest.raises(UserError, match="top_k=None asks for the whole vocabulary; set it to 1"):
        gkdjax.run(small(student), tmp_path / "a", teacher=ConstantTeacher(50, 5))
    c = small(student, teacher__top_k=1, gkd__temperature=2.0)
    with pytest.raises(UserError, match=r"gkd\.temperature=2\.0"):
        gkdjax.run(c, tmp_path / "b", teacher=ConstantTeacher(50, 5))
    with pytest.raises(UserError, match="is no teacher"):
        gkdjax.run(small(student), tmp_path / "c", teacher=object())


def test_an_interrupted_run_continues_as_if_it_had_not_been(student, tmp_path):
    """Batches, adapters and optimizer of the steps after the break are those of a whole run."""
    c = small(student, teacher__top_k=1, train__steps=6, gkd__on_policy_fraction=0.5)
    gkdjax.run(c, tmp_path / "whole", teacher=ConstantTeacher(50, 5))
    with pytest.raises(ConnectionError):
        gkdjax.run(c, tmp_path / "broken", teacher=ConstantTeacher(50, 5, fails_at=4))
    again = ConstantTeacher(50, 5)
    gkdjax.run(c, tmp_path / "broken", teacher=again)
    assert again.calls == 4  # the steps after the checkpoint, not all six once more
    assert losses_hex(tmp_path / "broken") == losses_hex(tmp_path / "whole")
    tensors = [
        (tmp_path / name / "merged" / "model.safetensors").read_bytes()
        for name in ("whole", "broken")
    ]
    assert tensors[0] == tensors[1]


def test_sigterm_saves_says_so_and_the_same_call_goes_on(student, tmp_path):
    c = small(student, teacher__top_k=1, train__steps=6, gkd__on_policy_fraction=0.5)
    gkdjax.run(c, tmp_path / "whole", teacher=ConstantTeacher(50, 5))
    c.checkpoint.every_steps = 100  # nothing but the signal saves before the end
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="saved at step 3") as caught:
        gkdjax.run(c, tmp_path / "stopped", teacher=ConstantTeacher(50, 5, stopped_at=3))
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    again = ConstantTeacher(50, 5)
    gkdjax.run(c, tmp_path / "stopped", teacher=again)
    assert again.calls == 3  # the other three steps
    assert losses_hex(tmp_path / "stopped") == losses_hex(tmp_path / "whole")


def test_on_policy_batches_are_drawn_logged_and_come_after_the_warm_up(student, other, tmp_path):
    c = small(
        student,
        teacher__backend="flax",
        teacher__model=other,
        gkd__divergence="reverse_kl",
        gkd__on_policy_fraction=1.0,
        gkd__on_policy_warmup_steps=2,
        data__train=[{"prompt": f"ask {i}", "response": "yes"} for i in range(6)],
    )
    results = gkdjax.run(c, tmp_path, teacher=None)
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
    c.optim.learning_rate = 2e-3
    c.student.lora.rank = 8
    results = gkdjax.run(c, tmp_path)
    # The teacher is the base: both are measured, and neither is 0 if a view or a shift were wrong.
    assert results["prompted_base"]["forward_kl"] == pytest.approx(0.0, abs=1e-5)
    assert results["prompted_teacher"]["forward_kl"] == pytest.approx(0.0, abs=1e-5)
    assert results["student"]["forward_kl"] < 0.5 * results["base"]["forward_kl"]
    assert set(results) >= {"recovery", "retention", "seconds", "tokens", "versions", "rows"}
    assert results["recovery"] is None  # nobody answers "x": the prefix changes no answer


def test_full_fine_tuning_keeps_a_frozen_copy_and_says_so(student, tmp_path, caplog):
    c = small(student, train__steps=2)
    c.student.adapter = "none"
    gkdjax.run(c, tmp_path)
    assert "frozen second copy of the student" in caplog.text
    _, before = load.load_pretrained(student)
    _, after = load.load_pretrained(str(tmp_path / "merged"))
    assert not np.array_equal(before["embedding"], after["embedding"])


def test_the_anchor_has_a_loss_of_its_own(student, tmp_path):
    c = small(student, anchor__data=[{"prompt": "other"}, {"prompt": "thing"}])
    c.anchor.batch_size = 4
    gkdjax.run(c, tmp_path)
    lines = metrics(tmp_path)
    # The student starts as the base, so that its distance to the base starts at zero.
    assert lines[0]["anchor_loss"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["anchor_loss"] > 1e-5


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "other", "prefix_messages": PREFIX}, "carries the prefix"),
        ({"messages": [*PREFIX, {"role": "user", "content": "other"}]}, "carries the prefix"),
        ({"prompt": "ask 3"}, "a row of data.train"),
    ],
)
def test_an_anchor_row_of_the_baked_condition_is_refused(student, tmp_path, row, told):
    c = small(student, anchor__data=[{"prompt": "fine"}, row])
    c.anchor.batch_size = 4
    with pytest.raises(UserError, match=told) as caught:
        gkdjax.run(c, tmp_path)
    assert "anchor.data:1" in str(caught.value)


def test_rows_that_are_too_long_are_counted_and_named(student, tmp_path, caplog):
    rows = [{"prompt": f"ask {i}", "response": "no"} for i in range(5)]
    rows[1]["response"] = "far too long " * 6
    rows[3]["prompt"] = rows[0]["prompt"] = "much too long " * 6
    dropped = gkdjax.run(small(student, data__train=rows), tmp_path / "drop")
    assert sorted(dropped["rows"]["train"]["dropped"]) == [
        *("data.train:0", "data.train:1", "data.train:3")
    ]
    assert dropped["samples"]["question"] == ["ask 1", "ask 2", "ask 4"]
    assert "data.train: 3 rows dropped" in caplog.text and "data.train:3" in caplog.text
    rows.append({"prompt": "ask 5", "response": ""})
    c = small(student, data__train=rows, data__too_long="truncate-right", data__bad_rows="drop")
    cut = gkdjax.run(c, tmp_path / "cut")
    found = dict(cut["rows"]["train"])
    assert 0 < found.pop("padding")["student"] < 1
    assert found == {
        "rows": 3,
        "dropped": ["data.train:0", "data.train:3"],
        "truncated": ["data.train:1"],
        "unusable": ["data.train:5"],
        "refused_responses": 0,
    }
    assert cut["dropped_rows"] == {"data.train": ["data.train:5"]}
    shown = report.render(cut, tmp_path)
    assert all(told in shown for told in ("1 unusable", "2 dropped", "1 truncated"))


def test_questions_that_do_not_fit_are_named(student, tmp_path):
    long = {"prompt": "much too long " * 6, "answer": "x"}
    with pytest.raises(UserError, match=r"eval\.questions:0: .*data\.max_length = 64"):
        gkdjax.run(small(student, eval__questions=[long]), tmp_path / "a")
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    c = small(student, eval__retention={"reading": str(tmp_path / "long.jsonl")})
    with pytest.raises(UserError, match=r"long\.jsonl:1: .*data\.max_length = 64"):
        gkdjax.run(c, tmp_path / "b")


def test_rows_that_four_devices_cannot_share_are_refused(student, tmp_path):
    with pytest.raises(UserError, match=r"train.batch_size: 6 rows.*4 devices.*is 8"):
        gkdjax.run(small(student, train__batch_size=6), tmp_path)
