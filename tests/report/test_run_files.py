"""Damaged small files of a run: made again, cut down, or an error that says what to do."""

import json
from datetime import datetime

import pytest
from made_up_runs import before, full_results, metric, samples, three_phases

from gkdjax.report import run_files, tables
from gkdjax.utils import files
from gkdjax.utils.errors import UserError

LOST = {
    "rows.json": ({"train": 1}, "nobody sees whether the rows have changed"),
    "models.json": ({"models/student": "/models/student"}, "may have a newer commit"),
    "clock.json": ({"began": "2026-01-01T00:00:00"}, "show today's"),
    "teacher.json": ({"model": "m", "probe": "p"}, "has had other weights"),
    "failure.json": ({"failure": "nan"}, "nothing of the config may be changed"),
}
AGAIN = {
    "before.json": before(),
    "results.json": full_results(),
    "ending.json": {"stop_ids": [1], "pad_id": 0},
    "teacher_ended_at.json": {"keys": []},
    "teacher_ended_at.1.json": {"keys": ["a"]},
}
DAMAGE = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "not UTF-8": lambda whole: whole.replace(b'"', b"\xff", 1),
    "another type": lambda whole: b"[]",
    "nested": lambda whole: b"[" * 100_000,
    "a value's type": lambda whole: json.dumps(dict.fromkeys(json.loads(whole), 0.5)).encode(),
    "a missing key": lambda whole: b"{}",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*LOST, *AGAIN])
def test_a_damaged_file_is_made_again_or_an_error(tmp_path, caplog, name, damage):
    path = tmp_path / name
    content = AGAIN.get(name) or LOST[name][0]
    assert run_files.load(path) is None
    files.write_json(path, content)
    assert run_files.load(path) == content and not caplog.messages
    if damage == "a missing key" and name in ("rows.json", "models.json"):
        return  # their keys are names of the run's own: another one is looked up, and not found
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    if name in AGAIN:
        assert run_files.load(path) is None
        assert f"{path} " in caplog.text and "it is made again" in caplog.text
    else:
        with pytest.raises(UserError, match=LOST[name][1]) as error:
            run_files.load(path)
        assert str(error.value).startswith(f"{path} ")
        assert "Put it back, or delete it: " in str(error.value)


def test_what_a_file_holds_is_parsed_or_damaged(tmp_path):
    path, parse = tmp_path / "clock.json", lambda found: datetime.fromisoformat(found["began"])
    assert run_files.load(path, parse) is None
    files.write_json(path, {"began": "2026-01-01T00:00:00"})
    assert run_files.load(path, parse) == datetime(2026, 1, 1)
    files.write_json(path, {"began": "new year"})
    with pytest.raises(UserError, match=r"clock\.json is damaged: .*'new year'.*show today's"):
        run_files.load(path, parse)


LINES = {
    "metrics.jsonl": three_phases(9),
    "eval.jsonl": [{"step": step, "accuracy": 0.5} for step in range(9)],
    "samples.jsonl": [sample | {"step": step} for step, sample in enumerate(samples())],
    "bad_steps.jsonl": [{"step": step, "reason": "nan"} for step in range(9)],
}


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "a value's type"])
@pytest.mark.parametrize("name", LINES)
def test_a_damaged_line_is_cut_off_or_an_error(tmp_path, caplog, name, damage):
    path, steps = tmp_path / name, [line["step"] for line in LINES[name]]
    files.write_lines(path, LINES[name])
    whole = path.read_bytes().splitlines(keepends=True)
    bad = DAMAGE[damage](whole[3])
    for ending in (b"\n", b""):  # the last line; also without its end
        path.write_bytes(b"".join(whole[:3]) + bad + ending)
        assert run_files.keep_lines_before(path, steps[5]) == {*steps[:3]}
        assert path.read_bytes() == b"".join(whole[:3])
    told = f"{path} is damaged from line 4 on, and cut off there"
    assert caplog.messages.count(told) == (2 if bad else 1)
    path.write_bytes(b"".join([*whole[:3], bad, b"\n", *whole[4:]]))
    content = path.read_bytes()
    with pytest.raises(UserError, match=rf"{name}:4 is damaged\. Put it back, or delete it: \w"):
        run_files.keep_lines_before(path, steps[5])
    assert path.read_bytes() == content
    assert run_files.keep_lines_before(path, steps[3]) == {*steps[:3]}  # past the checkpoint
    assert path.read_bytes() == b"".join(whole[:3])


def test_a_file_that_is_gone_or_garbage_has_no_lines(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    assert run_files.keep_lines_before(path, 4) == set() and not path.exists()
    path.write_bytes(bytes(5000))
    assert run_files.keep_lines_before(path, 4) == set() and path.read_bytes() == b""
    assert "damaged from line 1 on" in caplog.text


def test_a_line_without_its_end_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(metric(0, 1.0)))
    assert run_files.keep_lines_before(path, 1) == {0}
    assert path.read_text().endswith("}\n")


def changes(value):
    """Yields copies of an object in each of which one value, at any depth, has another type."""
    for key, inner in value.items():
        for wrong in (None, "x", [None], {"a": [1]}, 10**400):
            if type(wrong) is not type(inner) or wrong == 10**400:
                yield value | {key: wrong}
        if isinstance(inner, dict):
            yield from (value | {key: changed} for changed in changes(inner))


@pytest.mark.parametrize("name", ["results.json", "before.json"])
def test_a_value_of_another_type_is_damage_or_can_be_shown(tmp_path, name):
    path = tmp_path / name
    for changed in changes(AGAIN[name]):
        path.write_text(json.dumps(changed))  # without waiting for the disk
        found = run_files.load(path)
        if found is not None:
            tables.tables(found)
            tables.side_by_side(found["samples"])


@pytest.mark.parametrize("name", [*LINES, *AGAIN, "rows.json"])
def test_a_directory_in_place_of_a_file_is_named(tmp_path, caplog, name):
    path = tmp_path / name
    path.mkdir()
    if name in AGAIN:
        assert run_files.load(path) is None and f"{path} cannot be read: Is a" in caplog.text
        return
    read = (
        run_files.load if name == "rows.json" else lambda path: run_files.keep_lines_before(path, 1)
    )
    with pytest.raises(UserError, match=f"{name} cannot be read: Is a directory"):
        read(path)
