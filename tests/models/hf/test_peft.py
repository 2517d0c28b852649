"""PEFT adapter directories: ours read by peft on torch, peft's read by us, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import builders
import checkpoints
import factories
import jax
import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from checkpoints import KINDS, MULTIMODAL, load_torch, torch_logits

from gkdjax.config import Lora
from gkdjax.models import lora
from gkdjax.models.decoder import Decoder
from gkdjax.models.hf import export, load
from gkdjax.models.hf.peft import CONFIG, WEIGHTS, load_adapter, save_adapter
from gkdjax.utils.errors import UserError

# peft reads an attribute that this version of transformers has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

LANGUAGE = r".*\.language_model\..*\."  # not the image encoder's modules of the same names
SOME = ["q_proj", "o_proj", "down_proj"]
PREFIX = "base_model.model.model"
NAME = f"{PREFIX}.layers.1.self_attn.q_proj.lora_A.weight"
VISION = f"{PREFIX}.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """kind -> (directory, decoder, params)."""
    made = {}

    def get(kind: str):
        if kind not in made:
            source = checkpoints.make(tmp_path_factory.mktemp(kind) / "base", kind)
            made[kind] = (source, *load.load_pretrained(source))
        return made[kind]

    return get


def peft_logits(source, adapter) -> np.ndarray:
    return torch_logits(peft.PeftModel.from_pretrained(load_torch(source), str(adapter)).eval())


def attached_logits(decoder, params, adapters) -> np.ndarray:
    return np.asarray(checkpoints.logits(decoder, lora.attach(params, adapters)))


def trained_in_torch(source: str, directory, **fields) -> np.ndarray:
    """An adapter of random halves, saved by peft -> its logits in torch."""
    rules = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | fields))
    model = peft.get_peft_model(load_torch(source), rules).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(directory)
    return torch_logits(model)


def read_json(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def field(without: tuple[str, ...] = (), **changed):
    """Changes fields of the config."""

    def change(directory):
        fields = read_json(directory / CONFIG) | changed
        for key in without:
            del fields[key]
        (directory / CONFIG).write_text(json.dumps(fields))

    return change


def tensors(change):
    """Changes the dict of tensors in place."""

    def write(directory):
        found = safetensors.numpy.load_file(directory / WEIGHTS)
        change(found)
        safetensors.numpy.save_file(found, directory / WEIGHTS)

    return write


def more(name: str):
    return tensors(lambda found: found.update({name: found[NAME]}))


def renamed(old: str, new: str):
    def change(found):
        for name in list(found):
            found[name.replace(old, new)] = found.pop(name)

    return tensors(change)


@pytest.mark.parametrize("names", [None, SOME])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_on_torch_gives_the_logits_of_the_attached_student(base, kind, names, tmp_path):
    source, decoder, params = base(kind)
    adapters = builders.adapters(decoder, rank=4, dropout=0.25, names=names)
    export.export_adapter(tmp_path, decoder.spec, adapters, source)
    wanted = attached_logits(decoder, params, adapters)
    model = peft.PeftModel.from_pretrained(load_torch(source), str(tmp_path)).eval()
    np.testing.assert_allclose(torch_logits(model), wanted, atol=1e-4)
    assert np.abs(wanted - checkpoints.logits(decoder, params)).max() > 0.1
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == decoder.spec.num_layers * len(names or lora.ALL_LINEAR)
    assert not any("vision" in name for name in adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_exports_are_read_back_to_the_bit(base, kind, tmp_path):
    source, decoder, _ = base(kind)
    adapters = builders.adapters(decoder, rank=3, dropout=0.25, names=SOME)
    for scale, alpha in ((1.5, 4.5), (0.9 / 3, 0.9), (16 / 3**0.5, 16 / 3**0.5 * 3)):
        wanted = {path: dataclasses.replace(a, scale=scale) for path, a in adapters.items()}
        export.export_adapter(tmp_path / "out", decoder.spec, wanted, source)
        found = load_adapter(tmp_path / "out", decoder.spec)
        assert jax.tree.structure(found.adapters) == jax.tree.structure(wanted)  # scales, dropout
        jax.tree.map(np.testing.assert_array_equal, found.adapters, wanted)
        rules = found.rules
        assert (rules.rank, rules.dropout, rules.targets) == (3, 0.25, tuple(sorted(SOME)))
        assert rules.alpha == alpha and found.base == source


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_gives_pefts_logits(base, kind, rslora, tmp_path):
    source, decoder, params = base(kind)
    targets = LANGUAGE + "([qo]_proj|down_proj)" if kind == MULTIMODAL else SOME
    fields = {"target_modules": targets, "use_rslora": rslora, "lora_dropout": 0.1}
    wanted = trained_in_torch(source, tmp_path, **fields)
    found = load_adapter(tmp_path, decoder.spec)
    np.testing.assert_allclose(attached_logits(decoder, params, found.adapters), wanted, atol=1e-4)
    assert np.abs(wanted - torch_logits(load_torch(source))).max() > 0.1
    export.export_adapter(tmp_path / "ours", decoder.spec, found.adapters, source)
    checkpoints.assert_same_bytes(tmp_path / "ours", tmp_path)
    alpha = 12.0 if rslora else 6.0  # 6 / sqrt(4) is 12 / 4
    assert found.rules == Lora(4, alpha, 0.1, tuple(sorted(SOME)))
    assert {leaf.dtype for leaf in jax.tree.leaves(found.adapters)} == {np.dtype(np.float32)}
    assert found.base == source


def test_patterns_of_whole_kernels_are_kept_both_ways(base, tmp_path):
    source, decoder, params = base("llama")
    fields = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"v_proj|mlp.down_proj": 20}}
    wanted = trained_in_torch(source, tmp_path / "theirs", target_modules=SOME, **fields)
    found = load_adapter(tmp_path / "theirs", decoder.spec).adapters
    ranks_and_scales = {path[7:]: (a.a.shape[-1], a.scale) for path, a in found.items()}
    assert ranks_and_scales == {"down_proj": (4, 5.0), "o_proj": (2, 3.0), "q_proj": (4, 1.5)}
    np.testing.assert_allclose(attached_logits(decoder, params, found), wanted, atol=1e-4)
    export.export_adapter(tmp_path / "ours", decoder.spec, found, source)
    np.testing.assert_allclose(peft_logits(source, tmp_path / "ours"), wanted, atol=1e-4)
    again = load_adapter(tmp_path / "ours", decoder.spec).adapters
    assert jax.tree.structure(again) == jax.tree.structure(found)


EXCLUDING = [
    {"target_modules": ["q_proj", "o_proj"]},
    {"target_modules": None},  # peft's own: q_proj and v_proj
    {"exclude_modules": ["mlp.down_proj", "proj"]},  # the second is no whole name
    {"exclude_modules": r".*\.(down|v)_proj"},
    {"without": ("r", "lora_alpha", "lora_dropout", "target_modules")},  # peft's own, too
]


@pytest.mark.parametrize("changed", EXCLUDING)
def test_excluded_tensors_are_passed_over_as_by_peft(base, changed, tmp_path, caplog):
    source, decoder, params = base("llama")
    every = trained_in_torch(source, tmp_path, r=8, target_modules=[*SOME, "v_proj"])
    field(**changed)(tmp_path)
    head = np.zeros((8, 48), np.float32)
    tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": head}))(tmp_path)
    wanted = peft_logits(source, tmp_path)
    assert np.abs(wanted - every).max() > 0.1
    with caplog.at_level("WARNING"):
        found, rules, _ = load_adapter(tmp_path, decoder.spec)
    np.testing.assert_allclose(attached_logits(decoder, params, found), wanted, atol=1e-4)
    assert len(found) < 4
    assert "passed over, as peft does: base_model.model.lm_head.lora_A.weight" in caplog.text
    if "without" in changed:
        theirs = peft.LoraConfig()
        defaults = (theirs.r, theirs.lora_alpha, theirs.lora_dropout)
        assert (rules.rank, rules.alpha, rules.dropout) == defaults


def test_an_adapter_directory_is_what_peft_documents(base, tmp_path, monkeypatch):
    """https://huggingface.co/docs/peft/developer_guides/checkpoint"""
    source, decoder, _ = base("gemma3")
    adapters = builders.adapters(decoder, rank=4, dropout=0.1, names=SOME)
    out = tmp_path / "adapter"
    (out / "left_over").mkdir(parents=True)
    licensed = pathlib.Path(shutil.copytree(source, tmp_path / "licensed"))
    (licensed / "USE_POLICY.md").write_text("be kind")
    monkeypatch.chdir(tmp_path)
    export.export_adapter(out, decoder.spec, adapters, "licensed", "google/gemma-3-1b-it")
    assert read_json(out / CONFIG)["base_model_name_or_path"] == "google/gemma-3-1b-it"
    export.export_adapter(out, decoder.spec, adapters, "licensed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "licensed"]
    assert {path.name for path in out.iterdir()} == {
        *("USE_POLICY.md", CONFIG, WEIGHTS, "chat_template.jinja", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert read_json(out / CONFIG) == {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"},
        **{"base_model_name_or_path": str(licensed), "r": 4, "lora_alpha": 6.0},
        **{"lora_dropout": 0.1, "target_modules": sorted(SOME), "fan_in_fan_out": False},
        **{"rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True},
        "init_lora_weights": True,
    }
    found = checkpoints.tensors(out)
    assert len(found) == 3 * 3 * 2
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert found[f"{PREFIX}.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 80)
    assert found[f"{PREFIX}.layers.0.mlp.down_proj.lora_B.weight"].shape == (48, 4)


@pytest.fixture
def adapter(tmp_path) -> pathlib.Path:
    """An adapter of a Gemma 3's q_proj and o_proj, to change."""
    spec = factories.spec()
    adapters = builders.adapters(Decoder(spec), rank=4, names=["q_proj", "o_proj"])
    save_adapter(tmp_path, spec, adapters, "gemma3_text", "a base")
    return tmp_path


def cast(dtype):
    return tensors(lambda found: found.update({n: t.astype(dtype) for n, t in found.items()}))


ALL_BUT = ["k_proj", "v_proj", "mlp.gate_proj", "up_proj", "down_proj"]
SAME = [
    renamed(".weight", ".default.weight"),
    # The names in peft's adapters of a multimodal model before transformers 4.52, and since.
    renamed("model.layers", "language_model.model.layers"),
    renamed("model.layers", "model.language_model.layers"),
    cast(np.float16),
    cast(ml_dtypes.bfloat16),
    field(rank_pattern=None, alpha_pattern=None, init_lora_weights="gaussian"),
    field(target_modules="all-linear", exclude_modules=ALL_BUT),
    field(layers_to_transform=[0, 1, 2], layers_pattern="layers"),
    field(layers_to_transform=[], layers_pattern=None),
    field(megatron_core="core", loftq_config={"bits": 4}, qalora_group_size=16),
]


@pytest.mark.parametrize("change", SAME)
def test_other_forms_of_the_same_adapter_are_read(adapter, change):
    wanted = load_adapter(adapter, factories.spec())
    change(adapter)
    found = load_adapter(adapter, factories.spec())
    assert found.rules == wanted.rules
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6, strict=True),
        *(found.adapters, wanted.adapters),
    )


def pickled(directory):
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


def truncated(directory):
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-10])


def config_text(text: str):
    return lambda directory: (directory / CONFIG).write_text(text)


def tensor(change):
    """Replaces the tensor `NAME`."""
    return tensors(lambda found: found.update({NAME: change(found[NAME])}))


def layer_removed(found):
    for name in [name for name in found if ".layers.2." in name]:
        del found[name]


def both(*changes):
    return lambda directory: [change(directory) for change in changes]


MLX = '{"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8}}'
LM_HEAD = "base_model.model.lm_head.lora_A.weight"
MAGNITUDE = NAME.replace("lora_A.weight", "lora_magnitude_vector")
QKV = both(renamed("q_proj", "qkv_proj"), field(target_modules=["qkv_proj"]))
WITH_HEAD = both(more(LM_HEAD), field(target_modules=["q_proj", "o_proj", "lm_head"]))
REFUSED = [
    (lambda d: (d / CONFIG).unlink(), f"no {CONFIG}"),
    (lambda d: (d / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    (pickled, r"adapter_model\.bin is a pickle.*save_pretrained"),
    (truncated, rf"{WEIGHTS} is not a readable"),
    (config_text("{"), f"{CONFIG} does not parse"),
    (config_text("[]"), f"{CONFIG} must hold a JSON object"),
    (config_text("{}"), "peft_type = None"),
    (config_text(MLX), rf"{CONFIG} is of an MLX adapter, not of PEFT's.*mlx_lm\.fuse"),
    # More than plain LoRA.
    (field(peft_type="IA3"), "peft_type = 'IA3'.*plain LoRA"),
    (field(use_dora=True), "use_dora = True.*merge_and_unload"),
    (field(bias="all"), "bias = 'all'"),
    (field(modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\]"),
    (field(trainable_token_indices=[3]), r"trainable_token_indices = \[3\]"),
    (field(fan_in_fan_out=True), "fan_in_fan_out = True"),
    (field(lora_bias=True), "lora_bias = True"),
    (field(layer_replication=[[0, 2]]), "layer_replication"),
    (field(use_anything=True), "use_anything = True"),  # a field of the future
    (field(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa"),  # a changed base
    # Fields of another form.
    (field(layers_to_transform=["0"]), r"layers_to_transform = \['0'\] must be"),
    (field(r=None), "r = None must be a whole number above 0"),
    (field(r=0), "r = 0 must be"),
    (field(r=10**400), "r = 10+ must be a whole number"),
    (field(rank_pattern={"q_proj": "4"}), r"rank_pattern = \{'q_proj': '4'\} must be an object of"),
    (field(alpha_pattern=[3]), r"alpha_pattern = \[3\] must be an object"),
    (field(lora_alpha=10**400), "lora_alpha = 10+ must be a number"),
    (field(lora_alpha="6"), "lora_alpha = '6' must be"),
    (field(lora_alpha=0), "lora_alpha = 0 must be a number above 0"),
    (field(alpha_pattern={"q_proj": -6}), "alpha_pattern = .* must be an object of numbers above"),
    (field(use_rslora="no"), "use_rslora = 'no' must be true or false"),
    (field(base_model_name_or_path=3), "base_model_name_or_path = 3 must be a name or null"),
    (field(lora_dropout=1.0), r"lora_dropout = 1\.0"),
    (field(target_modules=[3]), r"target_modules = \[3\] must be names"),
    (field(target_modules="("), r"'\(.*' is no regular expression"),
    (field(rank_pattern={"(": 2}), "is no regular expression"),
    # Fields and tensors that disagree.
    (field(r=8), r"lora_[AB]\.weight has shape \(.*4.*\), not \(.*8.*\)"),
    (field(layers_to_transform=[0, 1]), r"lacks layer 2 lora_A.*all 3 layers"),
    (
        field(rank_pattern={r"layers\.1\.self_attn\.q_proj": 2}),
        r"rank_pattern.*layers of q_proj different values, \[2, 4\]",
    ),
    (
        field(alpha_pattern={r"model\.layers\.0\..*": 2}),
        r"alpha_pattern.*layers of [oq]_proj different values, \[2, 6",
    ),
    (
        field(target_modules=["q_proj", "o_proj", "k_proj"]),
        "target_modules.*names k_proj.*no tensor",
    ),
    (
        field(target_modules=r".*\.(self_attn|mlp)\.[qoku]\w*_proj"),
        "target_modules.*names (up|k)_proj",
    ),
    # Tensors without a place, and places without a tensor.
    (tensors(dict.clear), "no place for nothing"),
    (renamed("_proj", "_pro"), "target_modules = .* leave out every tensor"),
    (QKV, "no place for .*qkv_proj.*and 1 more"),
    (WITH_HEAD, f"no place for {LM_HEAD}"),
    (more(f"{PREFIX}.embed_tokens.weight"), r"no place for .*embed_tokens\.weight"),
    (more(VISION), rf"no place for {VISION}.*set exclude_modules = '\.\*\(vision_tower\|"),
    (more(MAGNITUDE), "lora_magnitude_vector"),
    (renamed("base_model.model.", ""), r"no place for model\.layers"),
    (renamed(".weight", ".mine.weight"), "no place for"),
    (tensors(lambda found: found.pop(NAME)), "q_proj lacks layer 1 lora_A;"),
    (tensors(layer_removed), "lacks layer 2 lora_A, layer 2 lora_B.*all 3 layers"),
    (
        more(NAME.replace("layers.1", "layers.3")),
        r"no place for .*layers\.3.*3 layers.*another base",
    ),
    (
        more(NAME.replace(".weight", ".default.weight")),
        r"lora_A\.(default\.)?weight and .* are the same half",
    ),
    # Tensors that are no floats of the right shape.
    (tensor(lambda a: np.full_like(a, np.nan)), f"tensor '{NAME}' holds NaN or infinity"),
    (tensor(lambda a: np.ascontiguousarray(a.T)), rf"{NAME} has shape \(48, 4\), not \(4, 48\)"),
    (tensor(lambda a: a.astype(np.int32)), f"{NAME} is int32; supported: float32"),
]


@pytest.mark.parametrize(("damage", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_damage_is_named(adapter, damage, named):
    damage(adapter)
    with pytest.raises(UserError, match=named) as caught:
        load_adapter(adapter, factories.spec())
    assert caught.value.exit_code == 2
    assert str(adapter) in str(caught.value)


def test_an_adapter_of_another_base_is_named_with_both_shapes(adapter):
    named = r"\(48, 4\), not \(32, 4\).*trained on another base\? It says on 'a base'"
    with pytest.raises(UserError, match=named):
        load_adapter(adapter, factories.spec(hidden_size=32))


def test_an_adapter_of_an_image_encoder_too_is_loaded_as_advised(adapter):
    more(VISION)(adapter)
    with pytest.raises(UserError) as caught:
        load_adapter(adapter, factories.spec())
    field(exclude_modules=str(caught.value).split("exclude_modules = '")[1].split("'")[0])(adapter)
    assert len(load_adapter(adapter, factories.spec()).adapters) == 2
