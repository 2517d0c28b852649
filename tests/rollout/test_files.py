"""The teacher's text is written once: whatever interrupts it, the file ends up the same."""

import dataclasses
import json
import types
import zlib

import numpy as np
import pytest

from gkdjax.losses import TopKLogprobs
from gkdjax.rollout.files import write_once
from gkdjax.types import Completion, Message, Prompt, TokenHidden, TokenTopK
from gkdjax.utils.errors import UserError

MESSAGES = (Message("system", "be brief"), Message("user", "ask"))
PROMPTS = [np.arange(n + 1, dtype=np.int32) for n in range(7)]
ASKED = [
    Prompt(f"data.jsonl:{n // 2}", prompt, MESSAGES, prefix=1, number=n % 2)
    for n, prompt in enumerate(PROMPTS)
]
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
            Completion(
                np.array([len(p), seed, len(prompts)], np.int32),
                finished=seed % 2 == 0,
                refused=seed % 3,
                author="somebody",
            )
            for p, seed in zip(prompts, seeds, strict=True)
        ]


def write(path, writer) -> list[tuple[list[int], bool, int]]:
    written = write_once(path, ASKED, writer, CHAT, step=4, chunk=3, show=False)
    assert all((one.ids.dtype, one.author) == (np.int32, "somebody") for one in written)
    return [(one.ids.tolist(), one.finished, one.refused) for one in written]


@pytest.fixture
def whole(tmp_path):
    """(completions, file content) of a run that nothing interrupts."""
    path = tmp_path / "whole.jsonl"
    return write(path, Writer()), path.read_bytes()


def test_chunks_in_order(tmp_path, whole):
    writer = Writer()
    write(tmp_path / "file.jsonl", writer)
    assert writer.chunks == [[1, 2, 3], [4, 5, 6], [7]]
    assert whole[0][4] == ([5, 104, 3], True, 2)
    assert whole[1].count(b"\n") == 7


def test_tools_are_told_and_reach_the_writer(tmp_path):
    plain, path = ASKED[0], tmp_path / "file.jsonl"
    asked = plain._replace(tools='[{"name":"look"}]')
    assert asked.key() == plain.key()
    for given, there in ((asked, [{"name": "look"}]), (plain, None)):
        path.unlink(missing_ok=True)
        write_once(path, [given], Writer(), CHAT, step=0, chunk=1, show=False)
        (line,) = path.read_text().splitlines()
        assert json.loads(line).get("tools") == there


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
    for line, change in ((2, {"ids": PROMPTS[0]}), (2, {"name": "x"}), (2, {"number": 9})):
        asked = [ASKED[0], ASKED[1]._replace(**change), *ASKED[2:]]
        with pytest.raises(UserError, match=rf"file\.jsonl:{line} was written for other rows"):
            write_once(path, asked, Writer(), CHAT, step=0, chunk=3, show=False)
    with pytest.raises(UserError, match=r"file\.jsonl:6 was written for other rows"):
        write_once(path, ASKED[:5], Writer(), CHAT, step=0, chunk=3, show=False)


def test_a_line_that_does_not_parse_is_named(tmp_path):
    path = tmp_path / "file.jsonl"
    write(path, Writer())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"file\.jsonl:2 does not parse"):
        write(path, Writer())


def test_prompts_of_one_checksum_are_told_apart():
    rng, seen = np.random.default_rng(0), {}
    for prompt in rng.integers(0, 2**18, (400_000, 2)).astype(np.int32):
        other = seen.setdefault(zlib.crc32(prompt.tobytes()), prompt)
        if not np.array_equal(other, prompt):
            break
    else:
        pytest.fail("no two prompts of one CRC-32 were found")
    keys = {Prompt("data.jsonl:1", ids, MESSAGES).key() for ids in (prompt, other)}
    assert len(keys) == 2


def test_a_line_is_for_people_too(tmp_path, whole):
    assert "é".encode() in whole[1]
    first, *others = map(json.loads, whole[1].splitlines())
    prefix = [{"role": "system", "content": "be brief"}]
    assert [line["prefix_messages"] for line in (first, *others)] == [prefix, *[None] * 6]
    assert {line["prefix_digest"] for line in others} == {first["prefix_digest"]}
    line = others[2]
    assert (
        line.items()
        >= {
            **{"row": "data.jsonl:1", "number": 1, "writer": "somebody", "step": 4, "kept": False},
            **{"prefix_messages": None, "refused": 1},
            **{"messages": [{"role": "user", "content": "ask"}], "text": "é\u20284 103 3"},
            **{"finished": False, "ids": [4, 103, 3]},
        }.items()
    )


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"ids": [1, "2"]}, "has 'ids' that are not all token ids"),
        ({"ids": [-1]}, "has 'ids' that are not all token ids"),
        ({"number": None}, "has no 'number', or not a int"),
        ({"finished": 1}, "has no 'finished'"),
    ],
)
def test_a_line_that_is_no_response_is_named(tmp_path, damage, told):
    path = tmp_path / "file.jsonl"
    write(path, Writer())
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | damage)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"file\.jsonl:3.* {told}"):
        write(path, Writer())


class Keeping(Writer):
    """Keeps the top k of every second response, and something that is not written to disk."""

    def __call__(self, places):
        kept = []
        for i, one in zip(places, super().__call__(places), strict=True):
            n = len(one.ids)
            values = np.full((n, 2), i, np.float32)
            topk = TopKLogprobs(values.astype(np.int32), values, values[:, 0], 0.5)
            what = TokenHidden(values) if i % 2 else TokenTopK(topk, values[:, 1])
            kept.append(dataclasses.replace(one, kept=what))
        return kept


def test_what_some_of_a_chunk_kept_is_read_back_and_nothing_else_is_used(tmp_path):
    path = tmp_path / "file.jsonl"
    runs = [
        write_once(path, ASKED, writer, CHAT, step=0, chunk=3, show=False)
        for writer in (Keeping(), None)  # the second one reads
    ]
    for written in runs:
        assert [w.kept is not None for w in written] == [True, False] * 3 + [True]
        for i in (0, 2, 4, 6):
            kept = written[i].kept
            assert kept.topk.ids.tolist() == [[i, i]] * 3 and kept.topk.temperature == 0.5
            assert kept.target_logprob.tolist() == [i] * 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kept"] for line in lines] == [True, False] * 3 + [True]
