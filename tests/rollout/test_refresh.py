"""The teacher's text, written anew every few steps: which rows, into which file, and resumed."""

import numpy as np
import pytest
from feeds import feed_of
from small_runs import ConstantTeacher, metrics, outcome, small

import gkdjax
from gkdjax.data.chat_template import load_chat
from gkdjax.rollout.teacher import prepare, refresh
from gkdjax.types import Completion
from gkdjax.utils.errors import Preempted, UserError
from gkdjax.utils.files import read_lines

NAMES = ["trajectories_train.jsonl", *(f"trajectories_train_00000{n}.jsonl" for n in (2, 4))]


class Inspired(ConstantTeacher):
    """Writes 1 to 12 letters, which follow from the seed; every fifth time nothing at all."""

    prompts = 0

    def sample(self, prompts, seeds, sampling):
        self.prompts += len(prompts)
        letters = [np.random.default_rng(s).integers(72, 98, 1 + s % 12) for s in seeds]
        words = [[*some, 5] if s % 5 else [] for s, some in zip(seeds, letters, strict=True)]
        return [Completion(np.array(each, np.int32), True) for each in words]


def config(student, **changes):
    """Six steps of four rows from eight prompts, and anew at steps 2 and 4."""
    changes = {
        "data__train": [{"prompt": f"ask {i}"} for i in range(8)],
        "data__bucket_lengths": (),
        "rollout__refresh_every_steps": 2,
        "rollout__max_new_tokens": 16,
        "rollout__max_retries": 0,
        "train__steps": 6,
    } | changes
    return small(student, teacher__top_k=1, **changes)


def files(workdir):
    return sorted(path.name for path in workdir.glob("trajectories_*.jsonl"))


def test_refreshed_text_is_for_the_rows_of_its_steps_and_may_need_a_larger_shape(student, tmp_path):
    class Verbose(ConstantTeacher):
        def sample(self, prompts, seeds, sampling):
            self.calls += 1
            ids = np.array([60] * (2 if self.calls < 3 else 14) + [5], np.int32)
            return [Completion(ids, True) for _ in prompts]

    teacher, c = Verbose(50, 5), config(student)
    dataset = feed_of(load_chat(student), rows=8, responses=False)
    first = prepare(c, "train", dataset, teacher, tmp_path, 99)
    new = refresh(c, first, teacher, tmp_path, [3], 2)
    lines = read_lines(tmp_path / NAMES[1])
    rows = {first.example(row).name for row in first.batch_rows(3)}
    assert {line["row"] for line in lines} == rows and {line["step"] for line in lines} == {2}
    targets = [[d.batch(step)[0].target_mask_BN.sum() for step in (2, 3)] for d in (first, new)]
    assert targets == [[12, 12], [12, 60]]
    for dataset in (first, new):
        np.testing.assert_array_equal(dataset.batch_rows(3), first.batch_rows(3))


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    gkdjax.run(config(student), workdir, teacher=Inspired(50, 5))
    return workdir


def test_each_block_of_steps_has_new_text(whole):
    assert files(whole) == NAMES
    first, *later = (read_lines(whole / name) for name in NAMES)
    assert len(first) == 8 and {line["step"] for line in first} == {0}
    first = {line["row"]: line["text"] for line in first}
    for step, lines in zip((2, 4), later, strict=True):
        assert {line["step"] for line in lines} == {step}
        assert 4 <= len(lines) <= 8 and len({line["row"] for line in lines}) == len(lines)
        assert sum(line["text"] == first[line["row"]] for line in lines) <= 1


@pytest.mark.parametrize("stopped_at", [4, 5])  # at the end of a block, and in one
def test_a_run_resumed_in_a_block_needs_no_earlier_one(student, whole, tmp_path, stopped_at):
    c = config(student)
    with pytest.raises(Preempted, match=f"saved at step {stopped_at}"):
        gkdjax.run(c, tmp_path, teacher=Inspired(50, 5, stopped_at=stopped_at))
    earlier = tmp_path / NAMES[1]
    middle = earlier.read_bytes()
    earlier.unlink()
    again = Inspired(50, 5)
    gkdjax.run(c, tmp_path, teacher=again)
    assert not earlier.exists()
    earlier.write_bytes(middle)
    assert outcome(tmp_path) == outcome(whole)
    asked = len(read_lines(whole / NAMES[2]))
    assert again.prompts == (asked if stopped_at == 4 else 0)


def test_on_policy_steps_need_no_new_text(student, tmp_path):
    c = config(student, gkd__on_policy_fraction=0.5, train__steps=8)
    gkdjax.run(c, tmp_path, teacher=Inspired(50, 5))
    off = [line["step"] for line in metrics(tmp_path) if not line["on_policy_rows"]]
    blocks = {step // 2 * 2 for step in off} - {0}
    assert 0 < len(off) < 8 and blocks
    wanted = {f"trajectories_train_{step:06d}.jsonl" for step in blocks}
    assert files(tmp_path) == sorted({*wanted, NAMES[0], "trajectories_student.jsonl"})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"data__train": [{"prompt": f"ask {i}", "response": "yes"} for i in range(4)]},
            r"rollout\.refresh_every_steps = 2",
        ),
        (
            {
                "gkd__on_policy_fraction": 1.0,
                "rollout__refresh_every_steps": None,
                "rollout__reuse": "x.jsonl",
            },
            r"rollout\.reuse = 'x\.jsonl'",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(student, tmp_path, changes, named):
    with pytest.raises(UserError, match=f"{named} is for the teacher's"):
        gkdjax.run(config(student, **changes), tmp_path, teacher=Inspired(50, 5))
