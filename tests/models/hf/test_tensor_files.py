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
# Files that some repositories have beside the model: the same weights once more, and adapters.
BESIDE = (
    *("consolidated.safetensors", "model.fp16.safetensors"),
    *("model-00001-of-00002.fp16.safetensors", "model.fp16-00002-of-00002.safetensors"),
    *("adapter_model.safetensors", "adapters.safetensors"),
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
def test_shards_are_one_set_of_names(sharded, with_index, tmp_path_factory):
    if not with_index:
        (sharded / INDEX).unlink()
    files = TensorFiles(str(sharded))
    assert files.names == ("a", "b")
    assert "a" in files and "c" not in files
    assert (files.shape("a"), files.dtype("a")) == ((6, 4), np.float32)
    assert (files.shape("b"), files.dtype("b")) == ((2, 4), ml_dtypes.bfloat16)
    assert files.file("b") == sharded / PARTS[1]
    np.testing.assert_array_equal(files.read("a"), A)
    np.testing.assert_array_equal(files.read("b"), B, strict=True)
    part = files.read("a", (slice(1, 3), slice(2, 4)))
    np.testing.assert_array_equal(part, A[1:3, 2:4])
    part[:] = -1  # a copy
    np.testing.assert_array_equal(files.read("a", slice(1, 3)), A[1:3])
    links = tmp_path_factory.mktemp("snapshot")  # as in the hub's cache
    for file in sharded.iterdir():
        (links / file.name).symlink_to(file)
    np.testing.assert_array_equal(TensorFiles(links).read("a"), A)


@pytest.mark.parametrize(
    "dtype", ["float16", "float64", "int8", "uint8", "int64", "bool", "float8_e4m3fn"]
)
def test_any_dtype_is_named(tmp_path, dtype):
    save(tmp_path / "model.safetensors", x=np.zeros(3, np.dtype(dtype)))
    assert TensorFiles(tmp_path).dtype("x") == np.dtype(dtype)


def test_other_files_beside_the_model_are_ignored(sharded):
    for name in BESIDE:
        save(sharded / name, a=A)
    (sharded / "training_args.bin").write_bytes(b"0")
    assert TensorFiles(sharded).names == ("a", "b")
    (sharded / INDEX).unlink()
    assert TensorFiles(sharded).names == ("a", "b")
    for part in PARTS:
        (sharded / part).unlink()
    save(sharded / "model.safetensors", c=A)
    assert TensorFiles(sharded).names == ("c",)


def test_a_tensor_that_only_the_index_has_is_absent(sharded):
    index(sharded, a=PARTS[0], b=PARTS[1], c=PARTS[1])
    files = TensorFiles(sharded)
    assert (files.names, files.absent) == (("a", "b"), {"c": PARTS[1]})


def outside(path):
    """The index names a file that exists, and that is not in the directory."""

    def damage(directory):
        save(directory.parent / "elsewhere.safetensors", b=B)
        index(directory, a=PARTS[0], b=path.format(directory.parent))

    return damage


def index_text(text):
    return lambda directory: (directory / INDEX).write_text(text)


def only(name):
    """One file alone."""

    def damage(directory):
        for file in directory.iterdir():
            file.unlink()
        save(directory / name, a=A)

    return damage


def without_index(name):
    def damage(directory):
        save(directory / name, a=A, b=B)
        (directory / INDEX).unlink()

    return damage


def truncate(directory):
    path = directory / PARTS[1]
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = [
    (outside("../elsewhere.safetensors"), r"'b' into '\.\./elsewhere"),
    (outside("{}/elsewhere.safetensors"), r"'b' into '/.*plain name"),
    (outside("..\\elsewhere.safetensors"), "'b' into .*plain name"),
    (lambda d: index(d, a="model.bin"), r"'a' into 'model\.bin'"),
    (lambda d: index(d, a=3), "'a' into 3"),
    (index_text("{}"), f"{INDEX} holds no weight_map"),
    (index_text("[]"), f"{INDEX} must hold a JSON object"),
    (index_text('{"we'), f"{INDEX} does not parse"),
    (index_text("[" * 100_000), f"{INDEX} does not parse: it nests too deeply"),
    (lambda d: (d / PARTS[1]).unlink(), f"{PARTS[1]} is missing"),
    (lambda d: save(d / "model.safetensors", c=A), r"does not name model\.safetensors"),
    (lambda d: save(d / PARTS[1], b=B, c=A), f"'c' stands in {PARTS[1]}; {INDEX} does not name"),
    (
        lambda d: index(d, a=PARTS[1], b=PARTS[0]),
        f"'a' stands in {PARTS[0]}; {INDEX} puts it into {PARTS[1]}",
    ),
    (without_index(PARTS[1]), f"'a' stands in {PARTS[0]} and in {PARTS[1]}"),
    (without_index("model.safetensors"), f"{PARTS[0]} are both there"),
    (truncate, f"{PARTS[1]} is not a readable safetensors file"),
    (lambda d: (d / PARTS[0]).write_bytes(b"x" * 99), f"{PARTS[0]} is not a readable"),
    (lambda d: (d / PARTS[0]).write_bytes(b""), f"{PARTS[0]} is not a readable"),
    (only("pytorch_model-1-of-2.bin"), r"pickle files \(pytorch_model-1-.*convert them to safe"),
    (only("adapter_model.safetensors"), r"an adapter \(adapter_model\.safetensors\) and no model"),
    (only("adapters.safetensors"), r"an adapter \(adapters\.safetensors\) and no"),  # MLX's
    (only("README.md"), r"holds no \*\.safetensors file"),
]


@pytest.mark.parametrize(("damage", "wanted"), DAMAGE, ids=[wanted for _, wanted in DAMAGE])
def test_damage_is_named(sharded, damage, wanted):
    damage(sharded)
    with pytest.raises(UserError, match=wanted) as caught:
        TensorFiles(sharded)
    assert str(sharded) in str(caught.value)
