"""The teacher's text, written anew every few steps: which rows, into which file, and resumed."""

import numpy as np
import pytest
from small_runs import ConstantTeacher, losses_hex, metrics, small

import gkdjax
from gkdjax.types import Completion
from gkdjax.utils.errors import Preempted, UserError
from gkdjax.utils.files import read_lines


class Inspired(ConstantTeacher):
    """Writes 1 to 12 letters, which follow from the seed; every fifth time nothing at all."""

    prompts = 0

    def sample(self, prompts, seeds, sampling):
        self.prompts += len(prompts)
        return [Completion(self._words(seed), True) for seed in seeds]

    def _words(self, seed):
        letters = np.random.default_rng(seed).integers(72, 98, 1 + seed % 12)
        return np.array([*letters, 5] if seed % 5 else [], np.int32)


def config(student, **changes):
    """Six steps of four rows from eight prompts, and anew at steps 2 and 4."""
    c = small(student, teacher__top_k=1, train__steps=6, rollout__refresh_every_steps=2)
    c.data.train = [{"prompt": f"ask {i}"} for i in range(8)]
    c.data.bucket_lengths, c.rollout.max_new_tokens = (), 16
    c.rollout.max_retries = 0
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c


def files(workdir):
    return {path.name: path.read_bytes() for path in workdir.glob("trajectories_*.jsonl")}


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    gkdjax.run(config(student), workdir, teacher=Inspired(50, 5))
    return workdir


def test_each_generation_has_new_text_for_the_rows_of_its_steps(student, whole, tmp_path):
    names = ["trajectories_train.jsonl", *(f"trajectories_train_00000{n}.jsonl" for n in (2, 4))]
    assert sorted(files(whole)) == names
    first, *later = (read_lines(whole / name) for name in names)
    assert len(first) == 8 and {line["step"] for line in first} == {0}
    first = {line["row"]: line["text"] for line in first}
    for step, lines in zip((2, 4), later, strict=True):
        assert {line["step"] for line in lines} == {step}
        assert 4 <= len(lines) <= 8 and len({line["row"] for line in lines}) == len(lines)
        assert sum(line["text"] == first[line["row"]] for line in lines) <= 1
    gkdjax.run(
        config(student, rollout__refresh_every_steps=None), tmp_path, teacher=Inspired(50, 5)
    )
    once = [line["batch_crc32"] for line in metrics(tmp_path)]
    anew = [line["batch_crc32"] for line in metrics(whole)]
    assert [a == b for a, b in zip(once, anew, strict=True)] == [True] * 2 + [False] * 4


def test_a_refused_new_response_leaves_the_first_one_and_is_counted(student, tmp_path, caplog):
    class Reluctant(Inspired):
        """After the first eight responses, every second one has no token."""

        def _words(self, seed):
            words = np.array([60] * (1 + seed % 12) + [5], np.int32)
            return words if self.prompts <= 8 or seed % 2 else words[:0]

    caplog.set_level("INFO", "absl")
    gkdjax.run(config(student, train__steps=4), tmp_path, teacher=Reluctant(50, 5))
    first = read_lines(tmp_path / "trajectories_train.jsonl")
    anew = read_lines(tmp_path / "trajectories_train_000002.jsonl")
    refused = [line for line in anew if not line["ids"]]
    assert 0 < len(refused) < len(anew) == 8
    assert f"step 2: 8 responses are new; {len(refused)} rows, whose" in caplog.text
    tokens = {line["row"]: len(line["ids"]) for line in first}
    anew = tokens | {line["row"]: len(line["ids"]) for line in anew if line["ids"]}
    targets = [line["targets"] for line in metrics(tmp_path)]  # of two epochs
    assert sum(targets[:2]) == sum(tokens.values()) != sum(anew.values()) == sum(targets[2:])


@pytest.mark.parametrize("stopped_at", [4, 5])
def test_a_run_resumed_in_a_generation_needs_no_earlier_one(student, whole, tmp_path, stopped_at):
    """Stopped in a generation (5), and at its end (4)."""
    c = config(student)
    with pytest.raises(Preempted, match=f"saved at step {stopped_at}"):
        gkdjax.run(c, tmp_path, teacher=Inspired(50, 5, stopped_at=stopped_at))
    earlier = tmp_path / "trajectories_train_000002.jsonl"
    middle = earlier.read_bytes()
    earlier.unlink()
    again = Inspired(50, 5)
    gkdjax.run(c, tmp_path, teacher=again)
    assert not earlier.exists()
    earlier.write_bytes(middle)
    assert files(tmp_path) == files(whole)
    assert losses_hex(tmp_path) == losses_hex(whole)
    weights = [(d / "merged" / "model.safetensors").read_bytes() for d in (tmp_path, whole)]
    assert weights[0] == weights[1]
    lines = [line["batch_crc32"] for d in (tmp_path, whole) for line in metrics(d)]
    assert lines[:6] == lines[6:]
    asked = len(read_lines(whole / "trajectories_train_000004.jsonl"))
    assert again.prompts == (asked if stopped_at == 4 else 0)


def test_longer_text_of_a_generation_has_a_shape_of_its_own(student, tmp_path):
    class Verbose(Inspired):
        """The first responses are short."""

        def _words(self, seed):
            return np.array([60] * (2 if self.prompts <= 8 else 14) + [5], np.int32)

    for name, stopped_at in (("whole", None), ("stopped", 3)):
        teacher = Verbose(50, 5, stopped_at=stopped_at)
        c = config(student, train__steps=4)
        if stopped_at:
            with pytest.raises(Preempted):
                gkdjax.run(c, tmp_path / name, teacher=teacher)
            teacher = Verbose(50, 5)
        gkdjax.run(c, tmp_path / name, teacher=teacher)
    lines = metrics(tmp_path / "whole")
    assert [line["targets"] for line in lines] == [12, 12, 60, 60]
    assert losses_hex(tmp_path / "stopped") == losses_hex(tmp_path / "whole")


def test_on_policy_steps_need_no_new_text(student, tmp_path):
    c = config(student, gkd__on_policy_fraction=0.5, train__steps=8)
    gkdjax.run(c, tmp_path, teacher=Inspired(50, 5))
    off = [line["step"] for line in metrics(tmp_path) if not line["on_policy_rows"]]
    generations = {step // 2 * 2 for step in off} - {0}
    assert 0 < len(off) < 8 and generations
    wanted = {f"trajectories_train_{step:06d}.jsonl" for step in generations}
    assert set(files(tmp_path)) == wanted | {
        *("trajectories_train.jsonl", "trajectories_student.jsonl")
    }


def test_what_would_have_no_effect_is_refused(student, tmp_path):
    rows = [{"prompt": f"ask {i}", "response": "yes"} for i in range(4)]
    with pytest.raises(UserError, match=r"rollout\.refresh_every_steps = 2 is for the teacher's"):
        gkdjax.run(config(student, data__train=rows), tmp_path / "a", teacher=Inspired(50, 5))
    c = config(student, gkd__on_policy_fraction=1.0, rollout__refresh_every_steps=None)
    c.rollout.reuse = "x.jsonl"
    with pytest.raises(UserError, match=r"rollout\.reuse = 'x\.jsonl' is for the teacher's"):
        gkdjax.run(c, tmp_path / "b", teacher=Inspired(50, 5))
