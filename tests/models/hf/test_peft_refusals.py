"""Adapter directories that are damaged, of another kind, or for another base, refused by name."""

import json
import pathlib

import builders
import factories
import numpy as np
import pytest
import safetensors.numpy

from gkdjax.models.decoder import Decoder
from gkdjax.models.hf import peft
from gkdjax.utils.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path) -> pathlib.Path:
    spec = factories.spec()
    adapters = builders.adapters(Decoder(spec), rank=4, names=["q_proj", "o_proj"])
    peft.save_adapter(tmp_path, spec, adapters, "gemma3_text", "a base")
    return tmp_path


def field(**changed):
    def change(directory):
        fields = json.loads((directory / CONFIG).read_text()) | changed
        (directory / CONFIG).write_text(json.dumps(fields))

    return change


def tensors(change):
    def write(directory):
        found = safetensors.numpy.load_file(directory / WEIGHTS)
        change(found)
        safetensors.numpy.save_file(found, directory / WEIGHTS)

    return write


def renamed(old: str, new: str):
    def change(found):
        for name in list(found):
            found[name.replace(old, new)] = found.pop(name)

    return tensors(change)


def pickled(directory):
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


def truncated(directory):
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-10])


def config_text(text: str):
    return lambda directory: (directory / CONFIG).write_text(text)


def as_integers(found):
    found[NAME] = found[NAME].astype(np.int32)


def transposed(found):
    found[NAME] = np.ascontiguousarray(found[NAME].T)


def layer_removed(found):
    for name in [name for name in found if ".layers.2." in name]:
        del found[name]


def layer_added(found):
    found[NAME.replace("layers.1", "layers.3")] = found[NAME]


def doubled(found):
    found[NAME.replace(".weight", ".default.weight")] = found[NAME]


LM_HEAD = "base_model.model.lm_head.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"
VISION = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
MAGNITUDE = NAME.replace("lora_A.weight", "lora_magnitude_vector")

REFUSED = {
    "no config": (lambda d: (d / CONFIG).unlink(), f"no {CONFIG}"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "pickle": (pickled, r"adapter_model\.bin is a pickle.*save_pretrained"),
    "truncated": (truncated, rf"{WEIGHTS} is not a readable"),
    "config does not parse": (config_text("{"), f"{CONFIG} does not parse"),
    "config is a list": (config_text("[]"), f"{CONFIG} must hold a JSON object"),
    "another method": (field(peft_type="IA3"), "peft_type = 'IA3'.*plain LoRA"),
    "no method": (config_text("{}"), "peft_type = None"),
    "dora": (field(use_dora=True), "use_dora = True.*merge_and_unload"),
    "biases": (field(bias="all"), "bias = 'all'"),
    "modules_to_save": (field(modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\]"),
    "trainable tokens": (field(trainable_token_indices=[3]), r"trainable_token_indices = \[3\]"),
    "fan_in_fan_out": (field(fan_in_fan_out=True), "fan_in_fan_out = True"),
    "lora_bias": (field(lora_bias=True), "lora_bias = True"),
    "replicated layers": (field(layer_replication=[[0, 2]]), "layer_replication"),
    "a field of the future": (field(use_anything=True), "use_anything = True"),
    "a changed base": (field(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa"),
    "MLX's": (
        config_text('{"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8}}'),
        rf"{CONFIG} is of an MLX adapter, not of PEFT's.*mlx_lm\.fuse",
    ),
    "a NaN": (tensors(lambda t: t[NAME].fill(np.nan)), f"tensor '{NAME}' holds NaN or infinity"),
    "layers of text": (field(layers_to_transform=["0"]), r"layers_to_transform = \['0'\] must be"),
    "some layers": (field(layers_to_transform=[0, 1]), r"lacks layer 2 lora_A.*all 3 layers"),
    "no rank": (field(r=None), "rank of None"),
    "a rank of 0": (field(r=0), "rank of 0"),
    "a rank of text": (field(rank_pattern={"q_proj": "4"}), "rank of '4'"),
    "patterns as a list": (field(alpha_pattern=[3]), r"alpha_pattern = \[3\]"),
    "an endless alpha": (field(lora_alpha=10**400), "an alpha of 10+ must be a number"),
    "an endless rank": (field(r=10**400), "a rank of 10+ must be a whole number"),
    "no alpha": (field(lora_alpha="6"), "alpha of '6'"),
    "dropout of 1": (field(lora_dropout=1.0), r"lora_dropout = 1\.0"),
    "another rank than the tensors": (
        field(r=8),
        r"lora_[AB]\.weight has shape \(.*4.*\), not \(.*8.*\)",
    ),
    "ranks that differ by layer": (
        field(rank_pattern={r"layers\.1\.self_attn\.q_proj": 2}),
        r"rank_pattern.*layers of q_proj different values, \[2, 4\]",
    ),
    "alphas that differ by layer": (
        field(alpha_pattern={r"model\.layers\.0\..*": 2}),
        r"alpha_pattern.*layers of [oq]_proj different values, \[2, 6",
    ),
    "a target without tensors": (
        field(target_modules=["q_proj", "o_proj", "k_proj"]),
        r"target_modules.*names k_proj.*no tensor",
    ),
    "a target regex without tensors": (
        field(target_modules=r".*\.(self_attn|mlp)\.[qoku]\w*_proj"),
        r"target_modules.*names (up|k)_proj",
    ),
    "no regex": (field(target_modules="("), "no regular expression"),
    "no tensors": (tensors(dict.clear), "no place for nothing"),
    "unknown tensors": (renamed("_proj", "_pro"), r"target_modules = .* leave out every tensor"),
    "unknown target": (
        lambda d: (renamed("q_proj", "qkv_proj")(d), field(target_modules=["qkv_proj"])(d)),
        r"no place for .*qkv_proj.*and 1 more",
    ),
    "lm_head": (
        lambda d: (
            tensors(lambda t: t.update({LM_HEAD: t[NAME]}))(d),
            field(target_modules=["q_proj", "o_proj", "lm_head"])(d),
        ),
        f"no place for {LM_HEAD}",
    ),
    "embedding": (tensors(lambda t: t.update({EMBEDDING: t[NAME]})), f"no place for {EMBEDDING}"),
    "image encoder": (
        tensors(lambda t: t.update({VISION: t[NAME]})),
        rf"no place for {VISION}.*set exclude_modules = '\.\*\(vision_tower\|",
    ),
    "magnitudes": (tensors(lambda t: t.update({MAGNITUDE: t[NAME]})), "lora_magnitude_vector"),
    "no prefix": (renamed("base_model.model.", ""), r"no place for model\.layers"),
    "another adapter's name": (renamed(".weight", ".mine.weight"), "no place for"),
    "half an adapter": (tensors(lambda t: t.pop(NAME)), "q_proj lacks layer 1 lora_A;"),
    "fewer layers": (tensors(layer_removed), r"lacks layer 2 lora_A, layer 2 lora_B.*all 3 layers"),
    "more layers": (tensors(layer_added), r"no place for .*layers\.3.*3 layers.*another base"),
    "doubled": (tensors(doubled), r"lora_A\.(default\.)?weight and .* are the same half"),
    "misshapen": (tensors(transposed), rf"{NAME} has shape \(48, 4\), not \(4, 48\)"),
    "integers": (tensors(as_integers), f"{NAME} is int32; supported: float32"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_it_is_named(adapter, damage):
    do, named = REFUSED[damage]
    peft.load_adapter(adapter, factories.spec())
    do(adapter)
    with pytest.raises(UserError, match=named) as caught:
        peft.load_adapter(adapter, factories.spec())
    assert caught.value.exit_code == 2
    assert str(adapter) in str(caught.value)


def test_an_adapter_of_another_base_is_told_with_both_shapes(adapter):
    told = r"\(48, 4\), not \(32, 4\).*trained on another base\? It says on 'a base'"
    with pytest.raises(UserError, match=told):
        peft.load_adapter(adapter, factories.spec(hidden_size=32))


def test_an_adapter_of_an_image_encoder_too_is_loaded_as_advised(adapter):
    tensors(lambda t: t.update({VISION: t[NAME]}))(adapter)
    with pytest.raises(UserError) as caught:
        peft.load_adapter(adapter, factories.spec())
    field(exclude_modules=str(caught.value).split("exclude_modules = '")[1].split("'")[0])(adapter)
    assert len(peft.load_adapter(adapter, factories.spec()).adapters) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": None, "alpha_pattern": None, "init_lora_weights": "gaussian"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "v_proj", "mlp.gate_proj"]},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"},
        {"layers_to_transform": [], "layers_pattern": None},
        {"megatron_core": "megatron.core", "loftq_config": {"bits": 4}, "qalora_group_size": 16},
    ],
)
def test_what_changes_nothing_is_passed_over(adapter, fields):
    if fields.get("target_modules") == "all-linear":
        fields["exclude_modules"] += ["up_proj", "down_proj"]
    field(**fields)(adapter)
    assert set(peft.load_adapter(adapter, factories.spec()).adapters) == {
        "layers/q_proj",
        "layers/o_proj",
    }
