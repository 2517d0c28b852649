"""Responses of an earlier run, taken over by another one."""

import dataclasses

import numpy as np
import pytest
from small_runs import losses_hex, small

import gkdjax
from gkdjax.data.dataset import RolloutFilter
from gkdjax.data.loss_mask import TargetRules
from gkdjax.losses.topk import TokenTopK, TopKLogprobs
from gkdjax.rollout import files
from gkdjax.rollout.files import write_once
from gkdjax.rollout.reuse import Source
from gkdjax.teachers.local import LocalTeacher
from gkdjax.types import Completion, Prompt
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import read_lines

NAME = "trajectories_train.jsonl"


class Chat:
    def decode(self, ids):
        return str(list(map(int, ids)))


def asked(*numbers: tuple[int, int]) -> list[Prompt]:
    """(prompt, number) of each; the name of the row is another in each run."""
    return [
        Prompt(f"run{id(numbers)}:{p}", np.array([p, p + 1], np.int32), (), number=n)
        for p, n in numbers
    ]


ALL = (0, 0), (1, 0), (2, 0), (3, 0), (3, 0)


@pytest.fixture
def path(tmp_path):
    """Five responses, to prompts 0 to 3 and once more to prompt 3; nothing is cached of one."""
    made = tmp_path / NAME

    def written(i: int) -> Completion:
        values = np.full((i + 1, 2), i, np.float32)
        topk = TopKLogprobs(values.astype(np.int32), values, values[:, 0], 0.5)
        cached = None if i == 2 else TokenTopK(topk, values[:, 1])
        ids, author = np.full(i + 1, i, np.int32), "him" if i == 3 else "her"
        return Completion(ids, i % 2 == 0, cached, refused=i, author=author)

    how = {"step": 0, "chunk": 2, "show": False}
    write_once(made, asked(*ALL), lambda places: [written(i) for i in places], Chat(), **how)
    assert files.cached_starts(made) == [0, 2, 4]
    return made


def found(path, *numbers, pattern=None, longest=9, **how):
    source = Source(path, "her", 2, 0.5, 9, text_alone=True)
    rules = RolloutFilter(TargetRules(("assistant",), pattern), 0, max_new_tokens=longest)
    return dataclasses.replace(source, **how).responses(asked(*numbers), rules, Chat())


def test_prompts_and_numbers_are_found_whatever_the_rows_are_called(path):
    taken = found(path, (3, 0), (4, 0), (0, 1), (1, 0), (3, 0), (3, 0))
    # Each of the two responses to the last prompt is taken once; the third row has none.
    ids = {place: one.ids.tolist() for place, one in taken.items()}
    assert ids == {0: [3] * 4, 3: [1, 1], 4: [4] * 5}
    assert [one.author for one in taken.values()] == ["him", "her", "her"]
    assert [one.finished for one in taken.values()] == [False, False, True]


@pytest.mark.parametrize(
    ("how", "taken", "cached"),
    [
        ({}, [0, 1, 2, 3, 4], [0, 1, 4]),  # nothing was cached of 2, and another teacher wrote 3
        ({"teacher": "him"}, [0, 1, 2, 3, 4], [3]),
        ({"top_k": 1}, [0, 1, 2, 3, 4], []),
        ({"top_k": None}, [0, 1, 2, 3, 4], []),
        ({"temperature": 1.0}, [0, 1, 2, 3, 4], []),
        ({"teacher": "it"}, [0, 1, 2, 3, 4], []),
        ({"text_alone": False}, [0, 1, 4], [0, 1, 4]),  # the teacher cannot score text
        ({"longest": 2}, [0, 1], [0, 1]),
        ({"pattern": "2|4"}, [2, 4], [4]),
    ],
)
def test_what_this_run_accepts_is_taken_with_what_its_teacher_would_predict(
    path, how, taken, cached
):
    completions = found(path, *ALL, **how)
    assert list(completions) == taken
    assert [place for place, one in completions.items() if one.cached is not None] == cached
    if 4 in cached:
        assert completions[4].cached.topk.ids.tolist() == [[4, 4]] * 5
        assert completions[4].cached.target_logprob.tolist() == [4.0] * 5


def test_a_file_that_does_not_fit_is_refused(path):
    with pytest.raises(UserError, match=rf"{NAME}:5 has the token id 4, and .* 4 ids"):
        found(path, (3, 0), (3, 0), vocab_size=4)
    assert len(found(path, (3, 0), vocab_size=4)) == 1
    for number in ((4, 0), (0, 1)):
        with pytest.raises(UserError, match=r"none of the 5 responses .* with another tokenizer"):
            found(path, number)
    with pytest.raises(UserError, match="there is no file"):
        found(path.with_name("other.jsonl"), (0, 0))
    lines = path.read_text().splitlines()
    for damaged, message in (
        ("{", "is no response: Expecting"),
        ("[]", "is no response: it is no object"),
        ("{}", "is no response: it has no 'row'"),
    ):
        path.write_text("\n".join([lines[0], damaged, *lines[2:]]) + "\n")
        with pytest.raises(UserError, match=rf"{NAME}:2 {message}.*config\.rollout\.reuse"):
            found(path, (0, 0))
    path.write_text("\n".join(lines) + "\n")
    kept = path.with_suffix(".kept") / "00000000.safetensors"
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"00000000\.safetensors cannot be read"):
        found(path, (0, 0))


def flax(student, other, **changes):
    rows = [{"prompt": f"ask {i}" + " more" * (i % 2)} for i in range(6)]
    changes = {"data__train": rows, "train__steps": 3, "teacher__top_k": 5} | changes
    return small(student, **{"teacher__backend": "flax", "teacher__model": other} | changes)


@pytest.fixture(scope="module")
def first(student, other, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first")
    gkdjax.run(flax(student, other), workdir)
    return workdir


def test_a_run_asks_its_teacher_only_for_what_the_file_lacks_and_can_be_interrupted(
    student, other, first, tmp_path, monkeypatch, caplog
):
    """The same run once more; then two responses a prompt instead of one, and a new prompt."""
    calls = []
    scores, samples = LocalTeacher.targets, LocalTeacher.sample

    def sample(self, prompts, seeds, sampling):
        calls.extend([f"write {len(prompts)}"] if sampling.temperature else [])
        return samples(self, prompts, seeds, sampling)

    monkeypatch.setattr(LocalTeacher, "sample", sample)
    monkeypatch.setattr(LocalTeacher, "targets", lambda *a: calls.append("score") or scores(*a))
    caplog.set_level("INFO", "absl")
    c = flax(student, other, rollout__reuse=str(first / NAME))
    gkdjax.run(c, tmp_path / "same")
    assert calls == []
    assert "6 responses from" in caplog.text and "0 to be written (0 are there but" in caplog.text
    assert losses_hex(tmp_path / "same") == losses_hex(first)
    assert (tmp_path / "same" / NAME).read_bytes() == (first / NAME).read_bytes()
    c.rollout.per_prompt = 2
    c.data.train = [{"prompt": "new"}, *c.data.train[1:]]
    gkdjax.run(c, tmp_path / "whole")
    assert calls == ["write 3", "write 4"]  # in chunks of four, of which the first takes one
    lines = read_lines(tmp_path / "whole" / NAME)
    assert [(line["row"], line["number"]) for line in lines[:5]] == [
        (f"data.train:{i}", 0) for i in range(1, 6)
    ]
    before = {line["row"]: line for line in read_lines(first / NAME)}
    no_prefix = {"prefix_messages": None}  # it stands in the first line of each file
    assert all(line | no_prefix == before[line["row"]] | no_prefix for line in lines[:5])
    assert {line["writer"] for line in lines} == {other} and all(line["kept"] for line in lines)
    assert len({(line["row"], line["number"]) for line in lines}) == 12
    again = tmp_path / "again"
    again.mkdir()
    text = (tmp_path / "whole" / NAME).read_text().splitlines(keepends=True)
    (again / NAME).write_text("".join(text[:7]))  # interrupted in the second chunk
    (tmp_path / "whole" / "trajectories_train.kept").rename(again / "trajectories_train.kept")
    gkdjax.run(c, again)
    assert losses_hex(again) == losses_hex(tmp_path / "whole")
    assert (again / NAME).read_text() == "".join(text)
