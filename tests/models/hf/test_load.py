"""Leaves are read slice by slice, each number once, and every tensor is accounted for."""

import collections
import math
import pathlib
import shutil

import checkpoints
import factories
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gkdjax.models.decoder_config import param_shapes
from gkdjax.models.hf import load
from gkdjax.models.hf.tensor_files import TensorFiles
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.utils import tree
from gkdjax.utils.errors import UserError

WEIGHTS = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
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


def leaves_of(params: dict) -> dict[str, jax.Array]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {tree.path_str(path): leaf for path, leaf in flat}


def edit(model: pathlib.Path, **changed) -> None:
    """Replaces tensors of a directory, and adds those it does not have."""
    tensors = safetensors.numpy.load_file(model / WEIGHTS) | changed
    safetensors.numpy.save_file(tensors, model / WEIGHTS)


@pytest.mark.parametrize("family", factories.FAMILIES)
@pytest.mark.parametrize("axes", MESHES)
def test_every_shard_is_the_right_part_of_the_whole(directory, family, axes):
    fsdp, tensor = MESHES[axes]
    whole = leaves_of(load.load_pretrained(directory(family))[1])
    mesh = parallel_mesh.make_mesh(fsdp=fsdp, tensor=tensor)
    decoder, params = load.load_pretrained(directory(family), mesh=mesh)
    cut = leaves_of(params)
    shapes = param_shapes(decoder.spec)
    places = {path: decoder.layout.sharding_of(path, shapes[path]) for path in shapes}
    assert cut.keys() == whole.keys() == places.keys()
    for path, leaf in cut.items():
        assert leaf.sharding == places[path]
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole[path])[shard.index])
            if leaf.ndim > 1 and not path.endswith(("norm", "bias")):
                assert shard.data.nbytes * fsdp * tensor == leaf.nbytes, path


@pytest.mark.parametrize("axes", [None, *MESHES])
def test_each_number_is_read_once_and_few_at_a_time(directory, reads, axes):
    mesh = None if axes is None else parallel_mesh.make_mesh(-1, *MESHES[axes])
    load.load_pretrained(directory("llama"), mesh=mesh)
    largest = reads.pop("largest read")
    files = TensorFiles(directory("llama"))
    assert reads == {name: math.prod(files.shape(name)) for name in files.names}
    assert largest <= 16 * 80  # 16 rows of the widest, down_proj


def test_without_a_mesh_the_leaves_go_wherever_they_are_needed(directory):
    _, params = load.load_pretrained(directory("llama"))
    assert not any(leaf.committed for leaf in jax.tree.leaves(params))


def test_a_mesh_that_does_not_divide_is_refused_before_reading(directory, tmp_path, reads):
    odd = factories.model_dir(tmp_path, intermediate_size=82)
    wanted = r"layers/gate_proj: dimension 2 of \(3, 48, 82\) .* axis 'tensor'"
    with pytest.raises(UserError, match=wanted):
        load.load_pretrained(odd, mesh=parallel_mesh.make_mesh(tensor=4))
    assert not reads


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32"])
def test_numbers_are_cast_on_the_way(tmp_path, stored, wanted):
    low = factories.model_dir(tmp_path, dtype=stored, family="llama")
    kept = load.load_pretrained(low)[1]
    for mesh in (None, parallel_mesh.make_mesh(1, 2, 2)):
        cast = load.load_pretrained(low, dtype=wanted, mesh=mesh)[1]
        for leaf, original in zip(jax.tree.leaves(cast), jax.tree.leaves(kept), strict=True):
            assert (original.dtype, leaf.dtype) == (stored, wanted)
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(original.astype(wanted)))


def test_an_image_encoder_is_known_and_not_read(multimodal, reads):
    decoder, params = load.load_pretrained(multimodal)
    assert decoder.spec == factories.spec()
    assert not [name for name in reads if "vision" in name or "projector" in name]
    wanted = checkpoints.torch_logits(checkpoints.load_torch(multimodal))
    np.testing.assert_allclose(checkpoints.logits(decoder, params), wanted, atol=2e-5)


def in_the_other_layout(source: str, target: pathlib.Path) -> pathlib.Path:
    """The same multimodal model with the names of the other of the two layouts."""
    shutil.copytree(source, target)
    old, new = "language_model.model.", "model.language_model."
    tensors = safetensors.numpy.load_file(target / WEIGHTS)
    if any(name.startswith(new) for name in tensors):
        renames = [(new, old), ("model.vision_tower.", "vision_tower.")]
        renames.append(("model.multi_modal_projector.", "multi_modal_projector."))
    else:
        renames = [(old, new), ("vision_tower.", "model.vision_tower.")]
        renames.append(("multi_modal_projector.", "model.multi_modal_projector."))
    renamed = {}
    for name, tensor in tensors.items():
        start, end = next(pair for pair in renames if name.startswith(pair[0]))
        renamed[end + name.removeprefix(start)] = tensor
    safetensors.numpy.save_file(renamed, target / WEIGHTS)
    return target


def test_both_layouts_of_a_multimodal_checkpoint_are_read(multimodal, tmp_path):
    other = in_the_other_layout(multimodal, tmp_path / "other")
    assert not set(TensorFiles(other).names) & set(TensorFiles(multimodal).names)
    again = load.load_pretrained(other)[1]
    jax.tree.map(np.testing.assert_array_equal, again, load.load_pretrained(multimodal)[1])


@pytest.mark.parametrize("body", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight"])
def test_body_head_and_image_encoder_each_have_the_names_of_a_layout(
    multimodal, tmp_path, body, head
):
    """As transformers takes them: the image encoder has the other layout's than the body."""
    model = pathlib.Path(shutil.copytree(multimodal, tmp_path / "model"))
    renamed = {}
    for name, tensor in safetensors.numpy.load_file(model / WEIGHTS).items():
        start, found, rest = name.rpartition("language_model.model.")
        start, found, rest = (start, found, rest) if found else name.partition("language_model.")
        other = name.removeprefix("model.")
        if "vision" not in name and "projector" not in name:
            renamed[body + rest] = tensor
        else:
            renamed[other if body.startswith("model.") else f"model.{other}"] = tensor
    if head:
        renamed[head] = renamed[f"{body}embed_tokens.weight"]
    safetensors.numpy.save_file(renamed, model / WEIGHTS, metadata={"format": "pt"})
    decoder, params = load.load_pretrained(model)
    wanted = checkpoints.torch_logits(checkpoints.load_torch(multimodal))
    np.testing.assert_allclose(checkpoints.logits(decoder, params), wanted, atol=2e-5)
    assert np.allclose(checkpoints.torch_logits(checkpoints.load_torch(model)), wanted)


def test_what_is_neither_text_nor_image_is_unknown(multimodal, tmp_path):
    model = pathlib.Path(shutil.copytree(multimodal, tmp_path / "model"))
    edit(model, **{"audio_tower.w": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"unknown tensors \['audio_tower\.w'\] \(1 in all\)"):
        load.load_pretrained(model)


@pytest.fixture
def tied(tmp_path) -> pathlib.Path:
    path = tmp_path / "tied"
    return pathlib.Path(factories.model_dir(path, family="qwen3", vocab_size=1100))


def test_a_tied_model_may_hold_its_head_too(tied):
    before = load.load_pretrained(tied)[1]
    edit(tied, **{HEAD: safetensors.numpy.load_file(tied / WEIGHTS)[EMBEDDING]})
    decoder, after = load.load_pretrained(tied)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    known = load.tensor_places(TensorFiles(tied), decoder.spec, "qwen3")
    assert known[HEAD] == known[EMBEDDING] == ("embedding", None)
    assert known["model.layers.2.mlp.up_proj.weight"] == ("layers/up_proj", 2)
    assert set(known) == set(TensorFiles(tied).names)


@pytest.mark.parametrize("row", [0, 1099])
def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tied, row):
    other = safetensors.numpy.load_file(tied / WEIGHTS)[EMBEDDING].copy()
    other[row, -1] += 1
    edit(tied, **{HEAD: other})
    with pytest.raises(UserError, match=rf"'{HEAD}' differs from '{EMBEDDING}'"):
        load.load_pretrained(tied)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DAMAGE = {
    "norm": ("model.layers.2.input_layernorm.weight", np.zeros(47), r"\(47,\), not \(48,\)"),
    "final norm": ("model.norm.weight", np.zeros((1, 48)), r"\(1, 48\), not \(48,\)"),
    "table": (EMBEDDING, np.zeros((127, 48)), r"\(127, 48\), not \(128, 48\)"),
    "head": (HEAD, np.zeros((48, 128)), r"\(48, 128\), not \(128, 48\)"),
    "integers": (Q_PROJ, np.zeros((64, 48), np.int8), "wrongly typed: int8, where only float32,"),
    "float64": (Q_PROJ, np.zeros((64, 48), np.float64), "wrongly typed: float64, where only"),
    "float8": (
        Q_PROJ,
        np.zeros((64, 48), ml_dtypes.float8_e4m3fn),
        "wrongly typed: float8_e4m3fn, where only",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_tensor_that_does_not_fit_is_named(copy, reads, damage):
    name, tensor, wanted = DAMAGE[damage]
    edit(copy, **{name: tensor if "wrongly" in wanted else tensor.astype(np.float32)})
    with pytest.raises(UserError, match=wanted) as caught:
        load.load_pretrained(copy)
    assert repr(name) in str(caught.value) and WEIGHTS in str(caught.value)
    assert not reads


def test_names_of_another_architecture_are_named(copy):
    tensors = safetensors.numpy.load_file(copy / WEIGHTS)
    renamed = {name.replace("model.", "transformer."): t for name, t in tensors.items()}
    safetensors.numpy.save_file(renamed, copy / WEIGHTS)
    wanted = rf"embedding is missing: '{EMBEDDING}', for model_type 'llama'.*transformer\."
    with pytest.raises(UserError, match=wanted):
        load.load_pretrained(copy)
