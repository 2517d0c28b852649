"""The teacher's text is written once: whatever interrupts it, the file ends up the same."""

import dataclasses
import json
import types
import zlib

import numpy as np
import pytest

from gkdjax.losses.topk import TokenHidden, TokenTopK, TopKLogprobs
from gkdjax.rollout.files import write_once
from gkdjax.types import Completion, Message, Prompt
from gkdjax.utils.errors import UserError

MESSAGES = (Message("system", "be brief"), Message("user", "ask"))
PROMPTS = [
    Prompt(
        *(f"data.jsonl:{n // 2}", np.arange(n + 1, dtype=np.int32), MESSAGES),
        prefix=1,
        number=n % 2,
    )
    for n in range(7)
]
CHAT = types.SimpleNamespace(decode=lambda ids: "é\u2028" + " ".join(map(str, ids)))


class Writer:
    """Writes text that depends on the whole chunk, as a padded batch's rounding may."""

    def __init__(self, fails_at: int = 99):
        self.chunks, self._fails_at = [], fails_at

    def __call__(self, places):
        if len(self.chunks) == self._fails_at:
            raise KeyboardInterrupt
        self.chunks.append([*places])
        return [
            Completion(
                np.array([i + 1, 100 + i, len(places)], np.int32), i % 2 == 0, None, i % 3, "a"
            )
            for i in places
        ]


def write(path, writer, prompts=PROMPTS):
    written = write_once(path, prompts, writer, CHAT, step=4, chunk=3, show=False)
    assert all((one.ids.dtype, one.author) == (np.int32, "a") for one in written)
    return [(one.ids.tolist(), one.finished, one.refused) for one in written]


@pytest.fixture
def whole(tmp_path):
    """(path, completions, file content) of a run that nothing interrupts."""
    path = tmp_path / "whole.jsonl"
    writer = Writer()
    completions = write(path, writer)
    assert writer.chunks == [[0, 1, 2], [3, 4, 5], [6]]
    assert completions[4] == ([5, 104, 3], True, 1) and len(completions) == 7
    return path, completions, path.read_bytes()


def test_a_complete_file_is_read_and_nothing_is_written(whole):
    path, completions, content = whole
    writer = Writer()
    assert write(path, writer) == completions
    assert writer.chunks == [] and path.read_bytes() == content


def test_stopped_between_chunks(tmp_path, whole):
    path, writer = tmp_path / "file.jsonl", Writer()
    with pytest.raises(KeyboardInterrupt):
        write(path, Writer(fails_at=2))
    assert path.read_bytes().count(b"\n") == 6  # what was paid for is kept
    assert write(path, writer) == whole[1]
    assert writer.chunks == [[6]] and path.read_bytes() == whole[2]


@pytest.mark.parametrize("lines", range(7))
@pytest.mark.parametrize("torn", ["", '{"row": "data.js', "all but the newline"])
def test_stopped_in_the_middle_of_a_chunk_or_a_line(tmp_path, whole, lines, torn):
    path, writer = tmp_path / "file.jsonl", Writer()
    all_lines = whole[2].decode().splitlines(keepends=True)
    tail = all_lines[lines][:-1] if torn.startswith("all") else torn
    path.write_text("".join(all_lines[:lines]) + tail)
    assert write(path, writer) == whole[1]
    assert [n for chunk in writer.chunks for n in chunk] == list(range(lines // 3 * 3, 7))
    assert path.read_bytes() == whole[2]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("change", [{"ids": PROMPTS[0].ids}, {"name": "x"}, {"number": 9}, None])
def test_text_of_other_rows_is_refused(whole, change):
    asked = (
        [PROMPTS[0], PROMPTS[1]._replace(**change or {}), *PROMPTS[2:]] if change else PROMPTS[:5]
    )
    line = 2 if change else 6
    with pytest.raises(UserError, match=rf"whole\.jsonl:{line} was written for other rows"):
        write(whole[0], Writer(), asked)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "is no response: (Expecting|Unterminated)"),
        ("[" * 100_000, "is no response: maximum recursion"),
        ({"ids": [1, "2"]}, "is no response: its 'ids' are not all token ids"),
        ({"ids": [-1]}, "is no response: its 'ids' are not all token ids"),
        ({"number": None}, "is no response: it has no 'number', or not a int"),
        ({"finished": 1}, "is no response: it has no 'finished'"),
    ],
)
def test_a_line_that_is_no_response_is_named(whole, damage, message):
    lines = whole[0].read_text().splitlines()
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(lines[2]) | damage)
    lines[2] = damage or lines[2][:9]
    whole[0].write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"whole\.jsonl:3 {message}"):
        write(whole[0], Writer())


def test_prompts_of_one_checksum_are_told_apart():
    prompts = [np.array(ids, np.int32) for ids in ([58917, 45441], [173622, 42674])]
    assert len({zlib.crc32(ids.tobytes()) for ids in prompts}) == 1
    assert len({Prompt("data.jsonl:1", ids, MESSAGES).key() for ids in prompts}) == 2


def test_a_line_is_for_people_too(tmp_path, whole):
    assert "é".encode() in whole[2]
    first, *others = map(json.loads, whole[2].splitlines())
    prefix = [{"role": "system", "content": "be brief"}]
    assert [line["prefix_messages"] for line in (first, *others)] == [prefix, *[None] * 6]
    assert {line["prefix_digest"] for line in others} == {first["prefix_digest"]}
    expected = {"row": "data.jsonl:1", "number": 1, "writer": "a", "step": 4, "kept": False}
    expected |= {"messages": [{"role": "user", "content": "ask"}], "text": "é\u20284 103 3"}
    expected |= {"prefix_messages": None, "refused": 0, "finished": False, "ids": [4, 103, 3]}
    assert others[2].items() >= expected.items() and "tools" not in first
    path, asked = tmp_path / "file.jsonl", PROMPTS[0]._replace(tools='[{"name":"look"}]')
    assert asked.key() == PROMPTS[0].key()
    write(path, Writer(), [asked])
    assert json.loads(path.read_text())["tools"] == [{"name": "look"}]


class Keeping(Writer):
    """Keeps the top k of every second response, and something that is not written to disk."""

    def __call__(self, places):
        cached = []
        for i, one in zip(places, super().__call__(places), strict=True):
            values = np.full((len(one.ids), 2), i, np.float32)
            topk = TopKLogprobs(values.astype(np.int32), values, values[:, 0], 0.5)
            what = TokenHidden(values) if i % 2 else TokenTopK(topk, values[:, 1])
            cached.append(dataclasses.replace(one, cached=what))
        return cached


def test_what_some_of_a_chunk_kept_is_read_back_and_nothing_else_is_used(tmp_path):
    path = tmp_path / "file.jsonl"
    for writer in (Keeping(), None):  # the second time it reads
        written = write_once(path, PROMPTS, writer, CHAT, step=0, chunk=3, show=False)
        assert [one.cached is not None for one in written] == [True, False] * 3 + [True]
        for i in (0, 2, 4, 6):
            cached = written[i].cached
            assert cached.topk.ids.tolist() == [[i, i]] * 3 and cached.topk.temperature == 0.5
            assert cached.target_logprob.tolist() == [i] * 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kept"] for line in lines] == [True, False] * 3 + [True]
