"""The student's text: written for several steps at once, kept on disk, and read back."""

import collections
import json

import pytest
from small_runs import ConstantTeacher, losses_hex, metrics, small

import gkdjax
from gkdjax.utils.errors import Preempted, UserError
from gkdjax.utils.files import read_lines

NAME = "trajectories_student.jsonl"
BLOCK, STEPS = 3, 8


def config(student, **changes):
    """Rows that the student must write again now and then; steps of both kinds in each block."""
    c = small(student, teacher__top_k=1, train__steps=STEPS, gkd__on_policy_fraction=0.7)
    c.data.train = [{"prompt": f"ask {i}" + "!" * (i % 4)} for i in range(6)]
    c.gkd.on_policy_buffer_steps = BLOCK
    c.context.target_content_pattern = "[a-z]"
    c.rollout.temperature, c.rollout.top_p, c.rollout.max_retries = 1.0, 1.0, 1
    c.data.train = [{**row, "response": "yes"} for row in c.data.train]
    c.optim.learning_rate = 1e-3
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    gkdjax.run(config(student), workdir, teacher=ConstantTeacher(50, 5))
    return workdir


def assert_same(workdir, whole):
    assert (workdir / NAME).read_bytes() == (whole / NAME).read_bytes()
    assert losses_hex(workdir) == losses_hex(whole)
    crcs = [[line["batch_crc32"] for line in metrics(d)] for d in (workdir, whole)]
    assert crcs[0] == crcs[1]
    weights = [(d / "merged" / "model.safetensors").read_bytes() for d in (workdir, whole)]
    assert weights[0] == weights[1]


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


@pytest.mark.parametrize("stopped_at", [1, 4, 5, 6])
def test_stopped_in_a_block_or_at_its_end_the_text_is_that_of_a_whole_run(
    student, whole, tmp_path, stopped_at
):
    c = config(student)
    with pytest.raises(Preempted, match=f"saved at step {stopped_at}"):
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5, stopped_at=stopped_at))
    gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))
    assert_same(tmp_path, whole)


def test_text_after_the_checkpoint_is_taken_back_and_a_torn_line_with_it(student, whole, tmp_path):
    c = config(student, checkpoint__every_steps=5)
    with pytest.raises(ConnectionError):
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5, fails_at=8))
    lines = (tmp_path / NAME).read_text()
    assert any(json.loads(line)["written_at"] == 6 for line in lines.splitlines())
    (tmp_path / NAME).write_text(lines + lines[:50])
    again = ConstantTeacher(50, 5)
    gkdjax.run(c, tmp_path, teacher=again)
    assert again.calls == 3
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("damage", ["gone", "short", "another row", "no number"])
def test_missing_text_of_a_block_is_not_written_by_newer_weights(student, tmp_path, damage):
    c = config(student)
    with pytest.raises(Preempted, match="saved at step 4"):
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5, stopped_at=4))
    lines = (tmp_path / NAME).read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["step"] > 3, "choose another step"
    last = json.loads(lines[-1])
    changed = {
        "gone": [],
        "short": lines[:-1],
        "another row": [*lines[:-1], json.dumps(last | {"row": "x"}) + "\n"],
        "no number": [*lines[:-1], json.dumps(last | {"written_at": None}) + "\n"],
    }[damage]
    (tmp_path / NAME).unlink()
    if changed:
        (tmp_path / NAME).write_text("".join(changed))
    told = r"student\.jsonl does not hold the \d+ responses .* at step 3 for step 4 and later"
    told = rf"jsonl:{len(lines)} has no 'written_at'" if damage == "no number" else told
    with pytest.raises(UserError, match=f"{told}.*newer than step 3 from .*checkpoints") as caught:
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))
    assert "--workdir" in str(caught.value)


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


def test_an_off_policy_run_has_no_such_file(student, tmp_path):
    c = config(student, gkd__on_policy_fraction=0.0, train__steps=2)
    gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))
    assert not (tmp_path / NAME).exists()
