"""Files on a disk that takes no more, and the order in which they get there."""

import errno
import os
import pathlib
import re

import pytest
from disks import longest_file

from gkdjax.parallel import multihost
from gkdjax.utils import files
from gkdjax.utils.errors import NotWritten

FULL = pathlib.Path("/dev/full")  # answers every write with "No space left on device"


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    (tmp_path / "a.json.part").symlink_to(FULL)
    with pytest.raises(NotWritten, match=r"a\.json cannot be written: No space left.* are free"):
        files.write_json(path, {"new": 1})
    assert files.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, r"No space left on device, .* are free there: make room"),
        (errno.EDQUOT, r"Disk quota exceeded, .* are free there: make room"),
        (errno.EACCES, r"Permission denied: give this user the right to write there"),
        (errno.EROFS, r"Read-only file system: mount it for writing, or name another place"),
        (errno.ENOTDIR, r"Not a directory \(/x/y\)"),
    ],
)
def test_what_helps_is_told_and_nothing_else(tmp_path, code, told):
    named = "/x/y" if code == errno.ENOTDIR else str(tmp_path)
    with pytest.raises(NotWritten) as raised, files.writing(tmp_path):
        raise OSError(code, os.strerror(code), named)
    assert re.fullmatch(f"{tmp_path} cannot be written: {told}", str(raised.value))


def test_a_line_is_added_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.jsonl"
    files.append_line(path, {"step": 0})
    with longest_file(20), pytest.raises(NotWritten, match=r"a\.jsonl cannot be written: File too"):
        files.append_line(path, {"step": 1})
    assert files.read_lines(path) == [{"step": 0}]
    files.append_line(path, {"step": 1})
    assert files.read_lines(path) == [{"step": 0}, {"step": 1}]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_so_is_the_name(tmp_path, monkeypatch):
    path, done = tmp_path / "a.json", []
    to_disk = files.to_disk

    def recorded(place):
        done.append((place.name, path.exists()))
        to_disk(place)

    monkeypatch.setattr(files, "to_disk", recorded)
    files.write_json(path, {})
    assert done == [("a.json.part", False), (tmp_path.name, True)]


def test_the_copy_of_a_process_that_does_not_fit_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("x" * 100)
    told = rf"{tmp_path} cannot be copied for this process: .*File too large.*set TMPDIR"
    with longest_file(10), pytest.raises(NotWritten, match=told), multihost._copied(tmp_path):
        pass


def test_room_is_looked_for_ahead(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "free_bytes", lambda path: 2500)
    files.require_room(tmp_path, "a checkpoint", 1000, 2500)
    assert not caplog.messages
    files.require_room(tmp_path, "a checkpoint", 1000, 4000)
    assert "is going to write 4.00 kB, of which a checkpoint takes 1.00 kB" in caplog.text
    with pytest.raises(NotWritten, match=r"a checkpoint takes 3\.00 kB, and 2\.50 kB are free"):
        files.require_room(tmp_path, "a checkpoint", 3000, 4000)
