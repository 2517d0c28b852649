"""The teacher's text is written once: whatever interrupts it, the file ends up the same."""

import types

import numpy as np
import pytest

from gkdjax.data.views import Fate
from gkdjax.errors import UserError
from gkdjax.trajectories import ResponseRules, Written, write_accepted, write_once
from gkdjax.types import Trajectory

PROMPTS = [np.arange(n + 1, dtype=np.int32) for n in range(7)]
NAMES = [f"data.jsonl:{n}" for n in range(7)]
SEEDS = list(range(100, 107))
CHAT = types.SimpleNamespace(decode=lambda ids: "é\u2028" + " ".join(map(str, ids)))


class Writer:
    """Writes text that depends on the whole chunk, as a padded batch's rounding may."""

    def __init__(self, fails_at: int = 99):
        self.chunks, self._fails_at = [], fails_at

    def __call__(self, places):
        prompts, seeds = [PROMPTS[i] for i in places], [SEEDS[i] for i in places]
        if len(self.chunks) == self._fails_at:
            raise KeyboardInterrupt
        self.chunks.append([len(prompt) for prompt in prompts])
        return [
            Written(
                Trajectory(np.array([len(p), seed, len(prompts)], np.int32), seed % 2 == 0),
                refused=seed % 3,
            )
            for p, seed in zip(prompts, seeds, strict=True)
        ]


def write(path, writer) -> list[tuple[list[int], bool, int]]:
    written = write_once(path, NAMES, PROMPTS, writer, CHAT, chunk=3, show=False)
    assert all(t.ids.dtype == np.int32 for t, _ in written)
    return [(t.ids.tolist(), t.finished, refused) for t, refused in written]


@pytest.fixture
def whole(tmp_path):
    """(trajectories, file content) of a run that nothing interrupts."""
    path = tmp_path / "whole.jsonl"
    return write(path, Writer()), path.read_bytes()


def test_chunks_in_order(tmp_path, whole):
    writer = Writer()
    write(tmp_path / "file.jsonl", writer)
    assert writer.chunks == [[1, 2, 3], [4, 5, 6], [7]]
    assert whole[0][4] == ([5, 104, 3], True, 2)
    assert whole[1].count(b"\n") == 7


def test_a_complete_file_is_read_and_nothing_is_written(tmp_path, whole):
    path = tmp_path / "whole.jsonl"
    writer = Writer()
    assert write(path, writer) == whole[0]
    assert writer.chunks == []
    assert path.read_bytes() == whole[1]


def test_stopped_between_chunks(tmp_path, whole):
    path = tmp_path / "file.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(path, Writer(fails_at=2))
    assert path.read_bytes().count(b"\n") == 6  # what was paid for is kept
    writer = Writer()
    assert write(path, writer) == whole[0]
    assert writer.chunks == [[7]]
    assert path.read_bytes() == whole[1]


@pytest.mark.parametrize("lines", range(7))
@pytest.mark.parametrize("torn", ["", '{"row": "data.js', "all but the newline"])
def test_stopped_in_the_middle_of_a_chunk_or_a_line(tmp_path, whole, lines, torn):
    path = tmp_path / "file.jsonl"
    all_lines = whole[1].decode().splitlines(keepends=True)
    tail = all_lines[lines][:-1] if torn.startswith("all") else torn
    path.write_text("".join(all_lines[:lines]) + tail)
    writer = Writer()
    assert write(path, writer) == whole[0]
    assert [n for chunk in writer.chunks for n in chunk] == list(range(lines // 3 * 3 + 1, 8))
    assert path.read_bytes() == whole[1]
    assert not list(tmp_path.glob("*.part"))


def test_text_of_other_rows_is_refused(tmp_path):
    path = tmp_path / "file.jsonl"
    write(path, Writer())
    changed = [PROMPTS[0], PROMPTS[1] + 1, *PROMPTS[2:]]
    for names, prompts in ((NAMES[:5], PROMPTS[:5]), (NAMES[::-1], PROMPTS), (NAMES, changed)):
        with pytest.raises(UserError, match="written for other rows"):
            write_once(path, names, prompts, Writer(), CHAT, chunk=3, show=False)


def test_a_line_that_does_not_parse_is_named(tmp_path):
    path = tmp_path / "file.jsonl"
    write(path, Writer())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"file\.jsonl:2 does not parse"):
        write(path, Writer())


TEXT = types.SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))


class Attempts:
    """Answers prompt i, at attempt n, with the n-th text of the i-th list, or its last."""

    def __init__(self, *texts):
        self.texts, self.calls = texts, []

    def __call__(self, prompts, seeds):
        self.calls.append(list(seeds))
        return [
            Trajectory(np.array([*map(ord, self._text(*divmod(seed, 100)))], np.int32), True)
            for seed in seeds
        ]

    def _text(self, place, attempt):
        return self.texts[place][min(attempt, len(self.texts[place]) - 1)]


def accepted(writer, pattern, max_refills):
    rules = ResponseRules(pattern, max_refills, max_new_tokens=9)
    found = write_accepted(
        *(writer, PROMPTS[: len(writer.texts)]),
        *(lambda place, attempt: 100 * place + attempt, rules, TEXT),
    )
    return [(TEXT.decode(t.ids), refused, rules.fate(t, TEXT)) for t, refused in found]


def test_a_response_without_the_pattern_is_written_again_and_no_other_one_is():
    writer = Attempts(["yes"], ["no", "no", "oh yes"], ["no", "yes"])
    found = accepted(writer, "yes$", 5)
    assert found == [("yes", 0, Fate.KEPT), ("oh yes", 2, Fate.KEPT), ("yes", 1, Fate.KEPT)]
    assert writer.calls == [[0, 100, 200], [101, 201], [102]]


def test_refilling_ends_at_its_bound():
    writer = Attempts(["no"], ["yes"])
    assert accepted(writer, "yes", 2) == [("no", 3, Fate.UNMATCHED), ("yes", 0, Fate.KEPT)]
    assert writer.calls == [[0, 100], [1], [2]]
    assert accepted(Attempts(["no"]), "yes", 0) == [("no", 1, Fate.UNMATCHED)]


def test_a_response_without_a_token_is_refused_with_and_without_a_pattern():
    for pattern in (None, ".*"):
        found = accepted(Attempts(["", "", "x"], [""]), pattern, 2)
        assert found == [("x", 2, Fate.KEPT), ("", 3, Fate.EMPTY)]
