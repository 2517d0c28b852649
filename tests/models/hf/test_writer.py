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


def tensor(array: np.ndarray) -> writer.Tensor:
    return writer.Tensor(array.dtype, array.shape, lambda: array)


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
    write(target, "new")
    assert names(target.parent) == ["target", *users]
    assert names(target) == ["deeper"]
    assert (target / "deeper/file").read_text() == "new"


def test_nothing_is_there_before_the_end_and_the_old_one_stays_after_an_error(tmp_path):
    target = tmp_path / "target"
    write(target, "old")
    with pytest.raises(RuntimeError), writer.whole_directory(target) as part:
        (part / "file").touch()
        assert (target / "deeper/file").read_text() == "old"
        raise RuntimeError
    assert names(tmp_path) == ["target"]
    assert (target / "deeper/file").read_text() == "old"


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
    assert (tmp_path / OLD / "deeper/file").read_text() == "old"
    assert (tmp_path / PART / "deeper/file").read_text() == "new"
    write(target, "newer")
    assert names(tmp_path) == ["target"]


def test_everything_is_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    target, done, to_disk = tmp_path / "target", [], writer._to_disk
    write(target, "old")

    def recorded(path):
        done.append((path.name, (target / "deeper/file").read_text()))
        to_disk(path)

    monkeypatch.setattr(writer, "_to_disk", recorded)
    write(target, "new")
    assert sorted(done) == sorted(
        [("deeper", "old"), ("file", "old"), (PART, "old"), (tmp_path.name, "new")]
    )


def test_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/deeper/file").read_text() == "new"


def test_a_file_is_what_the_safetensors_library_reads(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.safetensors"
    kinds = ("float32", "bfloat16", "float16", "int8", "uint8", "float64", "bool", "int64")
    kinds = {kind: jnp.dtype(kind) for kind in kinds}
    arrays = {
        f"{kind} of {len(shape)} axes {shape}": (10 * rng.standard_normal(shape)).astype(dtype)
        for kind, dtype in kinds.items()
        for shape in ((), (3,), (0,), (5, 3), (2, 3, 5))
    }
    arrays["transposed"] = np.arange(6, dtype=np.int16).reshape(2, 3).T
    writer.save_tensors({name: tensor(array) for name, array in arrays.items()}, path)
    found = safetensors.numpy.load_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    # Each tensor begins at a multiple of its numbers' size, and is mapped as it is.
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    starts = {name: header[name]["data_offsets"][0] for name in arrays}
    assert all((8 + length + at) % arrays[name].itemsize == 0 for name, at in starts.items())


def test_tensors_are_made_one_at_a_time(tmp_path):
    path = tmp_path / "a.safetensors"
    sizes = []

    def make():
        sizes.append(path.stat().st_size)
        return np.ones(2**16, np.float32)

    tensors = {name: writer.Tensor(np.dtype(np.float32), (2**16,), make) for name in "abc"}
    writer.save_tensors(tensors, path)
    assert [size // 2**18 for size in sizes] == [0, 1, 2]


def test_a_tensor_that_is_not_as_planned_is_named(tmp_path):
    wrong = writer.Tensor(np.dtype(np.float32), (2,), lambda: np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"a was made as float32 \(3,\)"):
        writer.save_tensors({"a": wrong}, tmp_path / "a.safetensors")


def test_tensors_may_be_read_like_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    writer.save_tensors({"a": tensor(np.ones(3, np.float32))}, tmp_path / "a.safetensors")
    mode = (tmp_path / "any").stat().st_mode
    assert (tmp_path / "a.safetensors").stat().st_mode == mode


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out cannot be made: .*file"):
        write(tmp_path / "file/out", "new")

    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(UserError, match=r"target cannot be written: .*No space left"):
        write(tmp_path / "target", "new")
    assert names(tmp_path) == ["file"]
