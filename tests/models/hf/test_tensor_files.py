"""The safetensors of a directory: single, sharded, indexed, and what is refused."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gkdjax.models.hf.tensor_files import INDEX, TensorFiles
from gkdjax.utils.errors import UserError

A = np.arange(24, dtype=np.float32).reshape(6, 4)
B = np.arange(8).astype(ml_dtypes.bfloat16).reshape(2, 4)
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
COPIES = (
    *("consolidated.safetensors", "model.fp16.safetensors"),
    *("model-00001-of-00002.fp16.safetensors", "model.fp16-00002-of-00002.safetensors"),
)


def save(path: pathlib.Path, **tensors: np.ndarray) -> None:
    safetensors.numpy.save_file(tensors, path)


def index(directory: pathlib.Path, **weight_map) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path) -> pathlib.Path:
    save(tmp_path / PARTS[0], a=A)
    save(tmp_path / PARTS[1], b=B)
    index(tmp_path, a=PARTS[0], b=PARTS[1])
    return tmp_path


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_one_set_of_names(sharded, with_index):
    if not with_index:
        (sharded / INDEX).unlink()
    files = TensorFiles(str(sharded))
    assert files.names == ("a", "b")
    assert "a" in files and "c" not in files
    assert (files.shape("a"), files.dtype("a")) == ((6, 4), np.float32)
    assert (files.shape("b"), files.dtype("b")) == ((2, 4), ml_dtypes.bfloat16)
    assert files.file("b") == sharded / PARTS[1]
    np.testing.assert_array_equal(files.read("a"), A)
    np.testing.assert_array_equal(files.read("b"), B)
    assert files.read("b").dtype == B.dtype


def test_an_index_that_nests_deeply_does_not_parse(sharded):
    (sharded / INDEX).write_text("[" * 100_000)
    with pytest.raises(UserError, match=rf"{INDEX} does not parse: it nests too deeply"):
        TensorFiles(sharded)


def test_a_slice_is_a_copy_of_its_own(sharded):
    files = TensorFiles(sharded)
    part = files.read("a", (slice(1, 3), slice(2, 4)))
    np.testing.assert_array_equal(part, A[1:3, 2:4])
    part[:] = -1
    np.testing.assert_array_equal(files.read("a", slice(1, 3)), A[1:3])


@pytest.mark.parametrize(
    "dtype", ["float16", "float64", "int8", "uint8", "int64", "bool", "float8_e4m3fn"]
)
def test_any_kind_of_dtype_is_named(tmp_path, dtype):
    save(tmp_path / "model.safetensors", x=np.zeros(3, np.dtype(dtype)))
    assert TensorFiles(tmp_path).dtype("x") == np.dtype(dtype)


def test_a_cache_of_links_is_read(sharded, tmp_path_factory):
    links = tmp_path_factory.mktemp("snapshot")
    for file in sharded.iterdir():
        (links / file.name).symlink_to(file)
    np.testing.assert_array_equal(TensorFiles(links).read("a"), A)


def test_an_adapter_and_other_files_beside_the_model_are_left_alone(sharded):
    save(sharded / "adapter_model.safetensors", a=A)
    (sharded / "training_args.bin").write_bytes(b"0")
    save(sharded / "adapters.safetensors", a=A)  # MLX's
    for copy in COPIES:  # some repositories have all of it once more
        save(sharded / copy, a=A)
    assert TensorFiles(sharded).names == ("a", "b")
    (sharded / INDEX).unlink()
    assert TensorFiles(sharded).names == ("a", "b")
    for part in PARTS:
        (sharded / part).unlink()
    save(sharded / "model.safetensors", c=A)
    assert TensorFiles(sharded).names == ("c",)


def test_a_tensor_that_only_the_index_has_is_kept_as_absent(sharded):
    index(sharded, a=PARTS[0], b=PARTS[1], c=PARTS[1])
    files = TensorFiles(sharded)
    assert (files.names, files.absent) == (("a", "b"), {"c": PARTS[1]})


def outside(path):
    """The index names a file that exists, and that is not in the directory."""

    def damage(directory):
        save(directory.parent / "elsewhere.safetensors", b=B)
        index(directory, a=PARTS[0], b=path.format(directory.parent))

    return damage


def truncate(directory):
    path = directory / PARTS[1]
    path.write_bytes(path.read_bytes()[:-1])


def both(directory):
    save(directory / PARTS[1], a=A, b=B)
    (directory / INDEX).unlink()


def pickled(directory):
    for file in directory.iterdir():
        file.unlink()
    (directory / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04")


def adapter_alone(name):
    def damage(directory):
        pickled(directory)
        save(directory / name, a=A)

    return damage


def whole_and_parts(directory):
    save(directory / "model.safetensors", a=A, b=B)
    (directory / INDEX).unlink()


DAMAGE = {
    "outside, relative": (outside("../elsewhere.safetensors"), r"'b' into '\.\./elsewhere"),
    "outside, absolute": (outside("{}/elsewhere.safetensors"), r"'b' into '/.*plain name"),
    "outside, windows": (outside("..\\elsewhere.safetensors"), "'b' into .*plain name"),
    "not safetensors": (lambda d: index(d, a="model.bin"), r"'a' into 'model\.bin'"),
    "no file name": (lambda d: index(d, a=3), "'a' into 3"),
    "no weight map": (lambda d: (d / INDEX).write_text("{}"), rf"{INDEX} holds no weight_map"),
    "index is a list": (
        lambda d: (d / INDEX).write_text("[]"),
        rf"{INDEX} must hold a JSON object",
    ),
    "index is cut off": (lambda d: (d / INDEX).write_text('{"we'), rf"{INDEX} does not parse"),
    "indexed file missing": (lambda d: (d / PARTS[1]).unlink(), rf"{PARTS[1]} is missing"),
    "file not indexed": (lambda d: save(d / "model.safetensors", c=A), r"name model\.safetensors"),
    "tensor not indexed": (
        lambda d: save(d / PARTS[1], b=B, c=A),
        rf"'c' stands in {PARTS[1]}; {INDEX} does not name it",
    ),
    "tensor in another file": (
        lambda d: index(d, a=PARTS[1], b=PARTS[0]),
        rf"'a' stands in {PARTS[0]}; {INDEX} puts it into {PARTS[1]}",
    ),
    "tensor in both files": (both, rf"'a' stands in {PARTS[0]} and in {PARTS[1]}"),
    "truncated": (truncate, rf"{PARTS[1]} is not a readable safetensors file"),
    "garbled": (lambda d: (d / PARTS[0]).write_bytes(b"x" * 99), rf"{PARTS[0]} is not a readable"),
    "pickle": (pickled, r"pickle files \(pytorch_model-00001-.*convert them to safetensors"),
    "adapter": (
        adapter_alone("adapter_model.safetensors"),
        r"holds an adapter \(adapter_model\.safetensors\) and no model",
    ),
    "MLX's": (
        adapter_alone("adapters.safetensors"),
        r"an adapter \(adapters\.safetensors\) and no",
    ),
    "whole and parts": (whole_and_parts, rf"model\.safetensors and {PARTS[0]} are both there"),
    "nothing": (lambda d: [f.unlink() for f in d.iterdir()], r"holds no \*\.safetensors file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(sharded, damage):
    do, wanted = DAMAGE[damage]
    do(sharded)
    with pytest.raises(UserError, match=wanted) as caught:
        TensorFiles(sharded)
    assert str(sharded) in str(caught.value)
