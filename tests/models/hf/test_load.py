"""Model directories in: against torch, each number read once, every tensor accounted for."""

import collections
import json
import math
import pathlib
import shutil

import checkpoints
import factories
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from gkdjax.models.decoder_config import param_shapes
from gkdjax.models.hf import load
from gkdjax.models.hf.tensor_files import INDEX, TensorFiles
from gkdjax.parallel.mesh import make_mesh
from gkdjax.utils.errors import UserError

WEIGHTS = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
MESHES = {"fsdp=4": (4, 1), "fsdp=2, tensor=2": (2, 2), "data=2, fsdp=2": (2, 1), "data=4": (1, 1)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """family -> a float32 model directory with an untied head; not to be written to."""
    made = {}

    def make(family: str) -> str:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            made[family] = factories.model_dir(path, family=family, tie_word_embeddings=False)
        return made[family]

    return make


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory) -> str:
    return checkpoints.make(tmp_path_factory.mktemp("multimodal"), checkpoints.MULTIMODAL)


@pytest.fixture
def copy(directory, tmp_path) -> pathlib.Path:
    """A Llama to damage."""
    return pathlib.Path(shutil.copytree(directory("llama"), tmp_path / "model"))


@pytest.fixture
def reads(monkeypatch) -> collections.Counter:
    """Tensor name -> how many of its numbers were read."""
    counted: collections.Counter = collections.Counter()
    read = TensorFiles.read

    def counting(self, name, index=None):
        part = read(self, name, index)
        counted[name] += part.size
        counted["largest read"] = max(counted["largest read"], part.size)
        return part

    monkeypatch.setattr(TensorFiles, "read", counting)
    return counted


def tensors_of(directory) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(pathlib.Path(directory) / WEIGHTS)


def write(directory, tensors: dict, name: str = WEIGHTS) -> None:
    safetensors.numpy.save_file(tensors, directory / name, metadata={"format": "pt"})


def edit(directory: pathlib.Path, **changed) -> None:
    """Replaces tensors of a directory, and adds those it does not have."""
    write(directory, tensors_of(directory) | changed)


def index(directory: pathlib.Path, weight_map: dict) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_torch_logits(directory, decoder, params) -> None:
    wanted = checkpoints.torch_logits(checkpoints.load_torch(directory))
    np.testing.assert_allclose(checkpoints.logits(decoder, params), wanted, atol=2e-5)


def assert_same(params, wanted) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, wanted)


def test_a_loaded_model_is_the_model_in_torch(directory):
    decoder, params = load.load_pretrained(directory("gemma3"))
    leaves = traverse_util.flatten_dict(params, sep="/")
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype("float32")}
    assert {path: leaf.shape for path, leaf in leaves.items()} == param_shapes(decoder.spec)
    assert decoder.compute_dtype == jnp.float32
    assert not any(leaf.committed for leaf in leaves.values())  # they go where they are needed
    assert_torch_logits(directory("gemma3"), decoder, params)


@pytest.mark.parametrize("family", factories.FAMILIES)
@pytest.mark.parametrize("axes", MESHES)
def test_every_shard_is_the_right_part_of_the_whole(directory, family, axes):
    fsdp, tensor = MESHES[axes]
    whole = traverse_util.flatten_dict(load.load_pretrained(directory(family))[1], sep="/")
    decoder, params = load.load_pretrained(directory(family), mesh=make_mesh(-1, fsdp, tensor))
    sharded = traverse_util.flatten_dict(params, sep="/")
    assert sharded.keys() == whole.keys() == param_shapes(decoder.spec).keys()
    for path, leaf in sharded.items():
        assert leaf.sharding == decoder.layout.sharding_of(path, leaf.shape)
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole[path])[shard.index])
            if leaf.ndim > 1 and not path.endswith(("norm", "bias")):
                assert shard.data.nbytes * fsdp * tensor == leaf.nbytes, path


@pytest.mark.parametrize("axes", [None, *MESHES])
def test_each_number_is_read_once_and_few_at_a_time(directory, reads, axes):
    mesh = None if axes is None else make_mesh(-1, *MESHES[axes])
    load.load_pretrained(directory("llama"), mesh=mesh)
    largest = reads.pop("largest read")
    files = TensorFiles(directory("llama"))
    assert reads == {name: math.prod(files.shape(name)) for name in files.names}
    assert largest <= 16 * 80  # 16 rows of the widest, down_proj


def test_a_mesh_that_does_not_divide_is_refused_before_reading(tmp_path, reads):
    odd = factories.model_dir(tmp_path, intermediate_size=82)
    wanted = r"layers/gate_proj: dimension 2 of \(3, 48, 82\) .* axis 'tensor'"
    with pytest.raises(UserError, match=wanted):
        load.load_pretrained(odd, mesh=make_mesh(tensor=4))
    assert not reads


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32"])
def test_numbers_are_cast_on_the_way(tmp_path, stored, wanted):
    low = factories.model_dir(tmp_path, dtype=stored, family="llama")
    decoder, kept = load.load_pretrained(low)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(stored)}
    assert decoder.param_dtype == decoder.compute_dtype == stored
    for mesh in (None, make_mesh(1, 2, 2)):
        decoder, cast = load.load_pretrained(low, wanted, "float32", mesh)
        assert (decoder.param_dtype, decoder.compute_dtype) == (wanted, "float32")
        assert_same(cast, jax.tree.map(lambda leaf: leaf.astype(wanted), kept))


def test_torch_and_we_round_alike(directory, tmp_path):
    low = factories.model_dir(tmp_path, dtype="bfloat16", tie_word_embeddings=False)
    rounded = load.load_pretrained(directory("gemma3"), dtype="bfloat16")[1]
    assert_same(rounded, load.load_pretrained(low)[1])


def shard(directory: pathlib.Path, with_index: bool) -> None:
    """Splits the weights over two files, as the hub stores large models."""
    tensors, where = tensors_of(directory), {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::2]}
        write(directory, part, file)
        where |= dict.fromkeys(part, file)
    (directory / WEIGHTS).unlink()
    if with_index:
        index(directory, where)


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_read(directory, copy, with_index):
    shard(copy, with_index)
    assert_same(load.load_pretrained(copy)[1], load.load_pretrained(directory("llama"))[1])
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        load.load_pretrained(copy)


def renamed(source: str, target: pathlib.Path, body: str, image: str, head: str | None) -> None:
    """Writes a multimodal model with other names of its parts."""
    shutil.copytree(source, target)
    tensors = {}
    for name, tensor in tensors_of(source).items():
        if "vision" in name or "projector" in name:
            tensors[image + name.removeprefix("model.")] = tensor
        else:
            rest = (
                name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
            )
            tensors[body + rest] = tensor
    if head:
        tensors[head] = tensors[f"{body}embed_tokens.weight"]
    write(target, tensors)


OLD, NEW = "language_model.model.", "model.language_model."


@pytest.mark.parametrize(
    ("body", "image", "head"),
    [
        (OLD, "", None),
        (NEW, "model.", None),
        # As transformers takes them, too: each part has the names of any layout.
        (OLD, "model.", "lm_head.weight"),
        (OLD, "", "language_model.lm_head.weight"),
        (NEW, "", "language_model.lm_head.weight"),
        (NEW, "", "lm_head.weight"),
    ],
)
def test_body_head_and_image_encoder_each_have_the_names_of_a_layout(
    multimodal, tmp_path, reads, body, image, head
):
    model = tmp_path / "model"
    renamed(multimodal, model, body, image, head)
    wanted = load.load_pretrained(multimodal)[1]
    decoder, params = load.load_pretrained(model)
    assert decoder.spec == factories.spec()
    assert_same(params, wanted)
    assert not [name for name in reads if "vision" in name or "projector" in name]
    assert_torch_logits(model, decoder, params)
    edit(model, **{"audio_tower.w": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"unknown tensors \['audio_tower\.w'\] \(1 in all\)"):
        load.load_pretrained(model)


@pytest.fixture
def tied(tmp_path) -> pathlib.Path:
    path = tmp_path / "tied"
    return pathlib.Path(factories.model_dir(path, family="qwen3", vocab_size=1100))


def test_a_tied_model_may_hold_its_head_too(tied):
    before = load.load_pretrained(tied)[1]
    edit(tied, **{HEAD: tensors_of(tied)[EMBEDDING]})
    decoder, after = load.load_pretrained(tied)
    assert_same(after, before)
    places = load.tensor_places(TensorFiles(tied), decoder.spec, "qwen3")
    assert places[HEAD] == places[EMBEDDING] == ("embedding", None)
    assert places["model.layers.2.mlp.up_proj.weight"] == ("layers/up_proj", 2)
    assert set(places) == set(TensorFiles(tied).names)


@pytest.mark.parametrize("row", [0, 1099])
def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tied, row):
    other = tensors_of(tied)[EMBEDDING].copy()
    other[row, -1] += 1
    edit(tied, **{HEAD: other})
    with pytest.raises(UserError, match=rf"'{HEAD}' differs from '{EMBEDDING}'"):
        load.load_pretrained(tied)


NORM = "model.layers.2.input_layernorm.weight"
DTYPES = "only float32, bfloat16, float16 are read"
MISFITS = [
    (NORM, np.zeros(47, np.float32), r"has shape \(47,\), not \(48,\)"),
    ("model.norm.weight", np.zeros((1, 48), np.float32), r"\(1, 48\), not \(48,\)"),
    (EMBEDDING, np.zeros((127, 48), np.float32), r"\(127, 48\), not \(128, 48\)"),
    (HEAD, np.zeros((48, 128), np.float32), r"\(48, 128\), not \(128, 48\)"),
    (Q_PROJ, np.zeros((48, 64), np.float32), r"\(48, 64\), not \(64, 48\)"),
    (Q_PROJ, np.zeros((64, 48), np.int8), f"is wrongly typed: int8, where {DTYPES}"),
    (Q_PROJ, np.zeros((64, 48), np.float64), f"is wrongly typed: float64, where {DTYPES}"),
    (Q_PROJ, np.zeros((64, 48), ml_dtypes.float8_e4m3fn), "is wrongly typed: float8_e4m3fn, where"),
]


@pytest.mark.parametrize(("name", "tensor", "wanted"), MISFITS)
def test_a_tensor_that_does_not_fit_is_named(copy, reads, name, tensor, wanted):
    edit(copy, **{name: tensor})
    with pytest.raises(UserError, match=rf"{WEIGHTS}: tensor '{name}' .*{wanted}"):
        load.load_pretrained(copy)
    assert not reads


def not_finite(value):
    def damage(directory):
        tensor = tensors_of(directory)[Q_PROJ]
        tensor[-1, -1] = value
        edit(directory, **{Q_PROJ: tensor})

    return damage


def rename(old: str, new: str):
    def damage(directory):
        tensors = tensors_of(directory).items()
        write(directory, {name.replace(old, new): tensor for name, tensor in tensors})

    return damage


def config(**fields):
    def damage(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def index_of_more(directory):
    more = [*tensors_of(directory), "model.layers.9.mlp.up_proj.weight"]
    index(directory, dict.fromkeys(more, WEIGHTS))


def unlink(name: str):
    return lambda directory: (directory / name).unlink()


ANOTHER = rf"embedding is missing: '{EMBEDDING}', for model_type 'llama'.*transformer\."
DAMAGE = [
    (rename(Q_PROJ, "model.layers.3.extra"), rf"missing tensors.*{Q_PROJ}"),
    (lambda d: edit(d, more=np.zeros(3, np.float32)), r"unknown tensors \['more'\]"),
    (rename("model.", "transformer."), ANOTHER),
    (not_finite(np.nan), rf"model\.safetensors: tensor '{Q_PROJ}' holds NaN or infinity"),
    (not_finite(-np.inf), rf"tensor '{Q_PROJ}' holds NaN or infinity"),
    (index_of_more, rf"'model\.layers\.9\..*' is missing in {WEIGHTS}; .*index"),
    (unlink(WEIGHTS), r"no \*\.safetensors"),
    (unlink("config.json"), r"no config\.json"),
    (shutil.rmtree, "no such model directory.*model"),
    (config(num_hidden_layers=2), r"unknown tensors.*model\.layers\.2"),
]


@pytest.mark.parametrize(("damage", "wanted"), DAMAGE, ids=[wanted for _, wanted in DAMAGE])
def test_damage_is_named(copy, damage, wanted):
    damage(copy)
    with pytest.raises(UserError, match=wanted) as caught:
        load.load_pretrained(copy)
    assert caught.value.exit_code == 2


def test_a_key_that_nothing_reads_is_logged(copy, caplog):
    config(rope_interleaved=True)(copy)
    with caplog.at_level("WARNING"):
        load.load_pretrained(copy)
    assert "config.json: rope_interleaved: transformers passes over it" in caplog.text
