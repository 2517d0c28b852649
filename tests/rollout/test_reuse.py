"""Responses of an earlier run, taken over by another one."""

import json

import numpy as np
import pytest
from small_runs import ConstantTeacher, losses_hex, small

import gkdjax
from gkdjax.data.dataset import RolloutFilter
from gkdjax.data.loss_mask import TargetRules
from gkdjax.losses import TopKLogprobs
from gkdjax.rollout import files
from gkdjax.rollout.files import write_once
from gkdjax.rollout.reuse import Source
from gkdjax.teachers.local import LocalTeacher
from gkdjax.types import Completion, Prompt, TokenTopK
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import read_lines

NAME = "trajectories_train.jsonl"
RULES = RolloutFilter(TargetRules(("assistant",)), max_retries=0, max_new_tokens=9)
PROMPTS = [np.array([n, n + 1], np.int32) for n in range(5)]


class Chat:
    def decode(self, ids):
        return str(list(map(int, ids)))


def asked(*numbers: tuple[int, int]) -> list[Prompt]:
    """(prompt, number) of each; the name of the row is another in each run."""
    return [Prompt(f"run{id(numbers)}:{p}", PROMPTS[p], (), number=n) for p, n in numbers]


def response(i: int, author: str) -> Completion:
    values = np.full((i + 1, 2), i, np.float32)
    kept = TokenTopK(TopKLogprobs(values.astype(np.int32), values, values[:, 0], 0.5), values[:, 1])
    kept = None if i == 2 else kept
    return Completion(np.full(i + 1, i, np.int32), i % 2 == 0, kept, i, author)


@pytest.fixture
def path(tmp_path):
    """Five responses, to prompts 0 to 3 and once more to prompt 3."""
    made = tmp_path / NAME
    wanted = asked((0, 0), (1, 0), (2, 0), (3, 0), (3, 0))
    authors = ("her", "her", "her", "him", "her")

    def write(places):
        return [response(i, authors[i]) for i in places]

    write_once(made, wanted, write, Chat(), step=0, chunk=2, show=False)
    assert files.kept_starts(made) == [0, 2, 4]
    return made


def source(path, teacher="her", top_k=2, temperature=0.5, vocab_size=9) -> Source:
    return Source(path, teacher, top_k, temperature, vocab_size, text_alone=True)


def test_prompts_and_numbers_are_found_whatever_the_rows_are_called(path):
    wanted = asked((3, 0), (4, 0), (0, 1), (1, 0), (3, 0), (3, 0))
    found = source(path).responses(wanted, RULES, Chat())
    ids = {place: one.ids.tolist() for place, one in found.items()}
    # Of the two responses to the last prompt each row takes one; the third row has none.
    assert ids == {0: [3] * 4, 3: [1, 1], 4: [4] * 5}
    assert [one.author for one in found.values()] == ["him", "her", "her"]
    assert [one.finished for one in found.values()] == [False, False, True]


def test_what_was_kept_is_used_where_this_runs_teacher_would_say_it(path):
    wanted = asked((0, 0), (1, 0), (2, 0), (3, 0), (3, 0))

    def kept(**how):
        found = source(path, **how).responses(wanted, RULES, Chat())
        return [place for place, one in found.items() if one.kept is not None]

    assert kept() == [0, 1, 4]  # nothing was kept of 2, and another teacher wrote 3
    assert kept(teacher="him") == [3]
    assert kept(top_k=1) == kept(top_k=None) == kept(temperature=1.0) == kept(teacher="it") == []
    found = source(path).responses(asked((3, 0), (3, 0)), RULES, Chat())[1].kept
    assert found.topk.ids.tolist() == [[4, 4]] * 5 and found.target_logprob.tolist() == [4.0] * 5


def test_ids_that_the_models_do_not_have_are_refused(path):
    with pytest.raises(UserError, match=rf"{NAME}:5 has the token id 4, and .* 4 ids"):
        source(path, vocab_size=4).responses(asked((3, 0), (3, 0)), RULES, Chat())
    assert len(source(path, vocab_size=4).responses(asked((3, 0)), RULES, Chat())) == 1


def test_a_file_for_no_row_is_refused(path):
    for wanted in (asked((4, 0)), asked((0, 1))):
        with pytest.raises(UserError, match=r"none of the 5 responses .* with another tokenizer"):
            source(path).responses(wanted, RULES, Chat())
    with pytest.raises(UserError, match="there is no file"):
        source(path.with_name("other.jsonl")).responses(asked((0, 0)), RULES, Chat())


def test_damage_is_named(path):
    lines = path.read_text().splitlines()
    wanted = asked((0, 0))
    for damaged, told in (("{", "does not parse"), ("[]", "is no object"), ("{}", "has no 'row'")):
        path.write_text("\n".join([lines[0], damaged, *lines[2:]]) + "\n")
        with pytest.raises(UserError, match=rf"{NAME}:2 {told}.*config\.rollout\.reuse"):
            source(path).responses(wanted, RULES, Chat())
    path.write_text("\n".join(lines) + "\n")
    kept = path.with_suffix(".kept") / "00000000.safetensors"
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"00000000\.safetensors cannot be read"):
        source(path).responses(wanted, RULES, Chat())


def flax(student, other, **changes):
    c = small(student, teacher__backend="flax", teacher__model=other, teacher__top_k=5)
    c.data.train = [{"prompt": f"ask {i}" + " more" * (i % 2)} for i in range(6)]
    c.train.steps = 3
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c


@pytest.fixture(scope="module")
def first(student, other, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first")
    gkdjax.run(flax(student, other), workdir)
    return workdir


def asked_of(monkeypatch) -> list[str]:
    """What the teacher is asked to do from here on: "score", or the seeds of a call that draws."""
    told = []
    scores, samples = LocalTeacher.targets, LocalTeacher.sample

    def sample(self, prompts, seeds, sampling):
        told.extend([f"write {len(prompts)}"] if sampling.temperature else [])
        return samples(self, prompts, seeds, sampling)

    monkeypatch.setattr(LocalTeacher, "sample", sample)
    monkeypatch.setattr(LocalTeacher, "targets", lambda *a: told.append("score") or scores(*a))
    return told


def test_the_same_run_once_more_asks_its_teacher_nothing(
    student, other, first, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "absl")
    told = asked_of(monkeypatch)
    c = flax(student, other, rollout__reuse=str(first / NAME))
    gkdjax.run(c, tmp_path)
    assert told == []
    assert (
        "6 responses from" in caplog.text and "0 to be written (0 are there but not" in caplog.text
    )
    assert losses_hex(tmp_path) == losses_hex(first)
    assert (tmp_path / NAME).read_bytes() == (first / NAME).read_bytes()


def test_what_the_file_lacks_is_written_and_the_run_can_be_interrupted(
    student, other, first, tmp_path, monkeypatch
):
    """Two responses a prompt instead of one, and the first prompt is new."""
    changes = {"rollout__reuse": str(first / NAME), "rollout__per_prompt": 2}
    c = flax(student, other, **changes)
    rows = [{"prompt": "new"}, *c.data.train[1:]]
    c.data.train = rows
    told = asked_of(monkeypatch)
    gkdjax.run(c, tmp_path / "whole")
    assert told == ["write 3", "write 4"]  # in chunks of four, of which the first takes one
    lines = read_lines(tmp_path / "whole" / NAME)
    assert [(line["row"], line["number"]) for line in lines[:5]] == [
        (f"data.train:{i}", 0) for i in range(1, 6)
    ]
    before = {line["row"]: line for line in read_lines(first / NAME)}
    told = {"prefix_messages": None}  # by the first line of each file
    assert all(line | told == before[line["row"]] | told for line in lines[:5])
    assert {line["writer"] for line in lines} == {other}
    assert len({(line["row"], line["number"]) for line in lines}) == 12
    assert all(line["kept"] for line in lines)
    again = tmp_path / "again"
    again.mkdir()
    text = (tmp_path / "whole" / NAME).read_text().splitlines(keepends=True)
    (again / NAME).write_text("".join(text[:7]))  # interrupted in the second chunk
    (tmp_path / "whole" / "trajectories_train.kept").rename(again / "trajectories_train.kept")
    gkdjax.run(c, again)
    assert losses_hex(again) == losses_hex(tmp_path / "whole")
    assert (again / NAME).read_text() == "".join(text)


def test_text_of_another_teacher_is_scored_by_this_one(student, first, tmp_path):
    teacher = ConstantTeacher(50, 5)
    c = flax(student, "", teacher__top_k=1, rollout__reuse=str(first / NAME))
    c.teacher.backend = "local-toggle"
    gkdjax.run(c, tmp_path, teacher=teacher)
    assert teacher.calls == 3
    mine, theirs = read_lines(tmp_path / NAME), read_lines(first / NAME)
    assert [line["ids"] for line in mine] == [line["ids"] for line in theirs]
    assert [line["writer"] for line in mine] == [line["writer"] for line in theirs]
    assert not any(line["kept"] for line in mine) and all(line["kept"] for line in theirs)


def test_what_this_run_does_not_accept_is_written_anew(student, other, first, tmp_path):
    lines = read_lines(first / NAME)
    letter = next(text[0] for text in (line["text"] for line in lines) if text)
    bad = {line["row"] for line in lines if letter not in line["text"]}
    assert 0 < len(bad) < 6, "choose another letter"
    c = flax(student, other, rollout__reuse=str(first / NAME))
    c.context.target_content_pattern = f"[{letter}]"
    c.rollout.max_retries = 40
    results = gkdjax.run(c, tmp_path)
    mine, theirs = (
        {line["row"]: line for line in read} for read in (read_lines(tmp_path / NAME), lines)
    )
    assert {row for row in mine if mine[row]["ids"] != theirs[row]["ids"]} == bad
    assert all(letter in line["text"] for line in mine.values())
    assert results["rows"]["train"]["rows"] == 6


def test_what_is_longer_than_this_run_writes_is_written_anew(student, other, first, tmp_path):
    c = flax(student, other, rollout__reuse=str(first / NAME), rollout__max_new_tokens=2)
    gkdjax.run(c, tmp_path)
    lengths = [len(line["ids"]) for line in read_lines(tmp_path / NAME)]
    assert max(lengths) == 2 < max(len(line["ids"]) for line in read_lines(first / NAME))


def test_another_prefix_is_told(student, other, first, tmp_path):
    c = flax(student, other, rollout__reuse=str(first / NAME))
    c.context.prefix_messages = [{"role": "system", "content": "be long"}]
    with pytest.raises(UserError, match="after another prefix"):
        gkdjax.run(c, tmp_path / "a")
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "ask 0"}) + "\n")
    c.rollout.reuse = str(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"x\.jsonl:1 has no 'row'"):
        gkdjax.run(c, tmp_path / "b")
