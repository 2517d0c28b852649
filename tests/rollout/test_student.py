"""The student's text: written for several steps at once, kept on disk, and read back."""

import collections
import json

import pytest
from small_runs import ConstantTeacher, losses_hex, metrics, outcome, small

import gkdjax
from gkdjax.utils.errors import Preempted, UserError
from gkdjax.utils.files import read_lines

NAME = "trajectories_student.jsonl"
BLOCK, STEPS = 3, 8


def config(student, **changes):
    """Rows that the student must write again now and then; steps of both kinds in each block."""
    rows = [{"prompt": f"ask {i}" + "!" * (i % 4), "response": "yes"} for i in range(6)]
    changes = {
        "data__train": rows,
        "train__steps": STEPS,
        "gkd__on_policy_fraction": 0.7,
        "gkd__on_policy_buffer_steps": BLOCK,
        "context__target_content_pattern": "[a-z]",
        "rollout__temperature": 1.0,
        "rollout__top_p": 1.0,
        "rollout__max_retries": 1,
        "optim__learning_rate": 1e-3,
    } | changes
    return small(student, teacher__top_k=1, **changes)


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    gkdjax.run(config(student), workdir, teacher=ConstantTeacher(50, 5))
    return workdir


def test_a_block_is_written_at_its_first_step_for_all_its_on_policy_steps(whole):
    lines, steps = read_lines(whole / NAME), metrics(whole)
    on = [line["step"] for line in steps if line["on_policy_rows"]]
    assert {step // BLOCK for step in on} == {0, 1, 2} and len(on) < STEPS
    assert any(step // BLOCK == (step + 1) // BLOCK for step in on if step + 1 in on)
    assert [line["step"] for line in lines] == [step for step in on for _ in range(4)]
    assert all(line["written_at"] == line["step"] // BLOCK * BLOCK for line in lines)
    assert {line["writer"] for line in lines} == {"student"}
    assert all(line["messages"][0]["content"].startswith("ask") for line in lines)
    refused = collections.Counter()
    for line in lines:
        refused[line["step"]] += line["refused"]
    assert [refused[line["step"]] for line in steps] == [x["refused_responses"] for x in steps]
    assert sum(refused.values()) > 0 and sum(line["dropped_rows"] for line in steps) > 0
    # Once its shapes are known, text of whatever length compiles nothing.
    assert sum(line["compilations"] for line in steps[BLOCK:]) == 0


@pytest.mark.parametrize("stopped_at", [4, 6])  # in a block, and at its end
def test_a_run_that_was_stopped_has_the_text_of_a_whole_run(student, whole, tmp_path, stopped_at):
    c = config(student)
    with pytest.raises(Preempted, match=f"saved at step {stopped_at}"):
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5, stopped_at=stopped_at))
    gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))
    assert outcome(tmp_path) == outcome(whole)


def test_text_after_the_checkpoint_is_removed_and_a_torn_line_with_it(student, whole, tmp_path):
    c = config(student, checkpoint__every_steps=5)
    with pytest.raises(ConnectionError):
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5, fails_at=8))
    lines = (tmp_path / NAME).read_text()
    assert any(json.loads(line)["written_at"] == 6 for line in lines.splitlines())
    (tmp_path / NAME).write_text(lines + lines[:50])
    again = ConstantTeacher(50, 5)
    gkdjax.run(c, tmp_path, teacher=again)
    assert again.calls == 3
    assert outcome(tmp_path) == outcome(whole)


def test_missing_text_of_a_block_is_not_written_by_newer_weights(student, tmp_path):
    c = config(student)
    with pytest.raises(Preempted, match="saved at step 4"):
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5, stopped_at=4))
    lines = (tmp_path / NAME).read_text().splitlines(keepends=True)
    last = json.loads(lines[-1])
    assert last["step"] > 3, "choose another step"
    lacks = r"student\.jsonl does not hold the \d+ responses .* at step 3 for step 4 and later"
    for damaged, message in (
        ([], lacks),
        (lines[:-1], lacks),
        ([*lines[:-1], json.dumps(last | {"row": "x"}) + "\n"], lacks),
        (
            [*lines[:-1], json.dumps(last | {"written_at": None}) + "\n"],
            rf"jsonl:{len(lines)} is no .* it has no 'written_at'",
        ),
    ):
        (tmp_path / NAME).write_text("".join(damaged))
        with pytest.raises(
            UserError, match=f"{message}.*newer than step 3 from .*checkpoints.* --w"
        ):
            gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))
    (tmp_path / NAME).unlink()
    with pytest.raises(UserError, match=lacks):
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))


def test_a_block_changes_whose_weights_write_and_nothing_else(student, tmp_path):
    lines = {}
    for block in (1, BLOCK):
        c = config(student, gkd__on_policy_buffer_steps=block, optim__learning_rate=1e-30)
        gkdjax.run(c, tmp_path / str(block), teacher=ConstantTeacher(50, 5))
        lines[block] = read_lines(tmp_path / str(block) / NAME)
    assert all(line["written_at"] == line["step"] for line in lines[1])
    for line in (*lines[1], *lines[BLOCK]):
        del line["written_at"]
    assert lines[1] == lines[BLOCK]  # a student that does not learn writes the same at any time
    assert losses_hex(tmp_path / "1") == losses_hex(tmp_path / str(BLOCK))
