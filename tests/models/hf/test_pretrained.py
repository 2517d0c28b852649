"""Hugging Face directories in: against torch, and damaged in every way we know of."""

import functools
import json
import pathlib
import shutil

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from gkdjax.models.decoder_config import param_shapes
from gkdjax.models.hf import load, model_config
from gkdjax.utils.errors import UserError

WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
TOKENS_BT = np.random.default_rng(0).integers(3, factories.VOCAB_SIZE, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A sound float32 model directory; not to be written to."""
    return factories.model_dir(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def copy(source, tmp_path) -> pathlib.Path:
    """A copy of `source` to damage."""
    return pathlib.Path(shutil.copytree(source, tmp_path / "model"))


def tensors_of(directory) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(pathlib.Path(directory) / WEIGHTS)


def write(directory, tensors: dict, name: str = WEIGHTS) -> None:
    safetensors.numpy.save_file(tensors, pathlib.Path(directory) / name)


def edit_config(directory, **changed) -> None:
    path = pathlib.Path(directory) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def torch_logits(directory) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BT).long()).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder, params):
    hidden_BTD = decoder.apply({"params": params}, TOKENS_BT, jnp.ones(TOKENS_BT.shape, bool))
    return decoder.apply({"params": params}, hidden_BTD, method="unembed")


def assert_same(params, wanted) -> None:
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    assert jax.tree.map(lambda leaf: leaf.dtype, params) == jax.tree.map(lambda x: x.dtype, wanted)


def test_loaded_model_equals_torch(source):
    decoder, params = load.load_pretrained(source)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert decoder.compute_dtype == jnp.float32
    shapes = {"embedding": params["embedding"].shape, "final_norm": params["final_norm"].shape}
    shapes |= {f"layers/{name}": leaf.shape for name, leaf in params["layers"].items()}
    assert shapes == param_shapes(decoder.spec)
    np.testing.assert_allclose(_logits(decoder, params), torch_logits(source), atol=2e-5)


def test_each_tensor_lands_where_its_name_says(source):
    _, params = load.load_pretrained(source)
    tensors = tensors_of(source)
    np.testing.assert_array_equal(params["layers"]["q_proj"][1], tensors[Q_PROJ].T)
    for layer in range(3):
        for leaf, name in [
            ("attn_norm", "input_layernorm"),
            ("attn_post_norm", "post_attention_layernorm"),
            ("mlp_norm", "pre_feedforward_layernorm"),
            ("mlp_post_norm", "post_feedforward_layernorm"),
        ]:
            wanted = tensors[f"model.layers.{layer}.{name}.weight"]
            np.testing.assert_array_equal(params["layers"][leaf][layer], wanted)


def test_dtypes(source, tmp_path):
    low = factories.model_dir(tmp_path / "low", dtype="bfloat16")
    decoder, params = load.load_pretrained(low)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
    assert (decoder.param_dtype, decoder.compute_dtype) == (jnp.bfloat16, jnp.bfloat16)
    # The same numbers, rounded by torch on the way out or by us on the way in.
    assert_same(load.load_pretrained(source, dtype="bfloat16")[1], params)
    raised = load.load_pretrained(low, dtype=jnp.float32)[1]
    assert_same(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), raised)
    mixed, params = load.load_pretrained(low, compute_dtype="float32")
    assert params["embedding"].dtype == jnp.bfloat16
    assert mixed.compute_dtype == jnp.float32


def shard(directory: pathlib.Path, with_index: bool) -> None:
    """Splits the weights over two files, as the hub stores large models."""
    tensors = tensors_of(directory)
    names = sorted(tensors)
    parts = {
        f"model-0000{i + 1}-of-00002.safetensors": {n: tensors[n] for n in names[i::2]}
        for i in range(2)
    }
    for file, part in parts.items():
        write(directory, part, file)
    (directory / WEIGHTS).unlink()
    if with_index:
        where = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_read(source, copy, with_index):
    shard(copy, with_index)
    assert_same(load.load_pretrained(copy)[1], load.load_pretrained(source)[1])


def drop(directory):
    tensors = tensors_of(directory)
    del tensors[Q_PROJ]
    write(directory, tensors)


def add(directory):
    write(directory, tensors_of(directory) | {"model.layers.3.extra": np.zeros(3, np.float32)})


def double(directory):
    for i, names in enumerate((tensors_of(directory), [Q_PROJ]), start=1):
        part = {name: tensors_of(directory)[name] for name in names}
        write(directory, part, f"model-0000{i}-of-00002.safetensors")
    (directory / WEIGHTS).unlink()


def reshape(directory):
    tensors = tensors_of(directory)
    tensors[Q_PROJ] = np.ascontiguousarray(tensors[Q_PROJ].T)
    write(directory, tensors)


def truncate(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def truncate_header(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:20])


def not_finite(value):
    def damage(directory):
        tensors = tensors_of(directory)
        tensors[Q_PROJ][-1, -1] = value
        write(directory, tensors)

    return damage


def index_of_more(directory):
    index = dict.fromkeys([*tensors_of(directory), "model.layers.9.mlp.up_proj.weight"], WEIGHTS)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))


def config_text(text):
    return lambda directory: (directory / "config.json").write_text(text)


def config_field(**changed):
    return lambda directory: edit_config(directory, **changed)


DAMAGE = {
    "missing tensor": (drop, rf"missing tensors.*{Q_PROJ}"),
    "unknown tensor": (add, r"unknown tensors.*model\.layers\.3\.extra"),
    "doubled tensor": (double, rf"{Q_PROJ}.*model-00001-of.*model-00002-of"),
    "misshapen tensor": (reshape, rf"{Q_PROJ}.*\(48, 64\), not \(64, 48\)"),
    "NaN": (not_finite(np.nan), rf"model\.safetensors: tensor '{Q_PROJ}' holds NaN or infinity"),
    "infinity": (not_finite(-np.inf), rf"tensor '{Q_PROJ}' holds NaN or infinity"),
    "only in the index": (
        index_of_more,
        rf"'model\.layers\.9\..*' is missing in {WEIGHTS}; .*index",
    ),
    "truncated weights": (truncate, r"model\.safetensors is not a readable"),
    "truncated header": (truncate_header, r"model\.safetensors is not a readable"),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), "not a readable"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), r"no \*\.safetensors"),
    "no directory": (shutil.rmtree, "no such model directory.*model"),
    "no config": (lambda d: (d / "config.json").unlink(), r"no config\.json"),
    "config does not parse": (config_text('{\n"a": 1,\n'), r"config\.json does not parse.*line 3"),
    "config is no text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"),
        "does not parse",
    ),
    "config is a list": (config_text("[]"), r"config\.json.*object"),
    "no model_type": (config_text("{}"), r"model_type None.*supported: gemma3, .*qwen3"),
    "unknown model_type": (
        config_field(model_type="mamba"),
        r"model_type 'mamba' is not supported; supported: gemma3, .*qwen3",
    ),
    "model_type is a list": (config_field(model_type=[]), "supported: gemma3, .*qwen3"),
    "a number that is text": (config_field(hidden_size="wide"), r"config\.json.*hidden_size"),
    "sizes that do not fit": (config_field(hidden_size=49), r"config\.json.*49"),
    "layer kinds of another depth": (config_field(num_hidden_layers=4), r"config\.json"),
    "an unknown layer kind": (
        config_field(layer_types=["spiral_attention"] * 3),
        r"config\.json.*spiral_attention",
    ),
    "another depth than the weights": (
        config_field(num_hidden_layers=2, layer_types=["full_attention"] * 2),
        r"unknown tensors.*model\.layers\.2",
    ),
    "not computed": (config_field(attention_bias=True), r"config\.json.*attention_bias"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(copy, damage):
    do, named = DAMAGE[damage]
    do(copy)
    with pytest.raises(UserError, match=f"(?s){named}") as caught:
        load.load_pretrained(copy)
    assert caught.value.exit_code == 2


def test_a_key_that_nobody_reads_is_told(copy, caplog):
    edit_config(copy, rope_interleaved=True)
    with caplog.at_level("WARNING"):
        load.load_pretrained(copy)
    assert "config.json: rope_interleaved: transformers passes over it" in caplog.text


def test_shards_with_one_missing_are_caught(copy):
    shard(copy, with_index=True)
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        load.load_pretrained(copy)


def test_the_spec_is_read_without_the_weights(copy):
    (copy / WEIGHTS).unlink()
    assert model_config.load_spec(copy) == factories.spec()
