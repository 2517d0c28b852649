"""A directory is replaced as a whole, and stays when anything goes wrong."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gkdjax.models.hf import writer
from gkdjax.utils.errors import UserError

PART, OLD = ".target.gkdjax-part", ".target.gkdjax-old"


def write(directory: pathlib.Path, text: str) -> None:
    with writer.whole_directory(directory) as part:
        (part / "deeper").mkdir()
        (part / "deeper/file").write_text(text)


def text(directory: pathlib.Path) -> str:
    return (directory / "deeper/file").read_text()


def names(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_new_directory_takes_the_old_ones_place(tmp_path):
    target = tmp_path / "above" / "target"
    write(target, "old")
    (target / "left_over").touch()
    users = ["target.old", "target.part"]
    for leaving in (PART, OLD, *users):  # of processes that were killed, and the user's own
        (target.parent / leaving).mkdir()
        (target.parent / leaving / "file").touch()
    with pytest.raises(RuntimeError), writer.whole_directory(target) as part:
        (part / "file").touch()
        assert text(target) == "old"
        raise RuntimeError
    assert text(target) == "old"
    write(target, "new")
    assert names(target.parent) == ["target", *users]
    assert names(target) == ["deeper"] and text(target) == "new"
    (tmp_path / "link").symlink_to(target)
    write(tmp_path / "link", "newer")
    assert (tmp_path / "link").is_symlink() and text(target) == "newer"


def test_a_process_killed_between_the_renames_leaves_both_whole(tmp_path, monkeypatch):
    target, rename = tmp_path / "target", pathlib.Path.rename
    write(target, "old")

    def killed(self, other):
        if self.name == PART:
            raise KeyboardInterrupt
        return rename(self, other)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathlib.Path, "rename", killed)
        write(target, "new")
    assert names(tmp_path) == [OLD, PART]
    assert (text(tmp_path / OLD), text(tmp_path / PART)) == ("old", "new")
    write(target, "newer")
    assert names(tmp_path) == ["target"]


def test_everything_is_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    target, done, to_disk = tmp_path / "target", [], writer.to_disk
    write(target, "old")

    def recorded(path):
        done.append((path.name, text(target)))
        to_disk(path)

    monkeypatch.setattr(writer, "to_disk", recorded)
    write(target, "new")
    first = [("deeper", "old"), ("file", "old"), (PART, "old")]
    assert sorted(done) == sorted([*first, (tmp_path.name, "new")])


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out cannot be written: .*file"):
        write(tmp_path / "file/out", "new")

    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(UserError, match=r"target cannot be written: .*No space left"):
        write(tmp_path / "target", "new")
    assert names(tmp_path) == ["file"]


def test_a_file_is_what_the_safetensors_library_reads(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.safetensors"
    kinds = ("float32", "bfloat16", "float16", "int8", "uint8", "float64", "bool", "int64")
    arrays = {
        f"{kind} {shape}": (10 * rng.standard_normal(shape)).astype(jnp.dtype(kind))
        for kind in kinds
        for shape in ((), (3,), (0,), (5, 3), (2, 3, 5))
    }
    arrays["transposed"] = np.arange(6, dtype=np.int16).reshape(2, 3).T
    tensors = {
        name: writer.Tensor(array.dtype, array.shape, lambda array=array: array)
        for name, array in arrays.items()
    }
    writer.save_tensors(tensors, path)
    found = safetensors.numpy.load_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    # Each tensor begins at a multiple of its numbers' size, and is mapped as it is.
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    starts = {name: header[name]["data_offsets"][0] for name in arrays}
    assert all((8 + length + at) % arrays[name].itemsize == 0 for name, at in starts.items())
    (tmp_path / "any").touch()  # others may read it like any new file
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_tensors_are_made_one_at_a_time_as_planned(tmp_path):
    path, sizes = tmp_path / "a.safetensors", []

    def make():
        sizes.append(path.stat().st_size)
        return np.ones(2**16, np.float32)

    tensor = writer.Tensor(np.dtype(np.float32), (2**16,), make)
    writer.save_tensors(dict.fromkeys("abc", tensor), path)
    assert [size // 2**18 for size in sizes] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"a was made as float32 \(65536,\)"):
        writer.save_tensors({"a": tensor._replace(shape=(2,))}, path)
