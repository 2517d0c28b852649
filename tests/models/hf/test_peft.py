"""PEFT adapter directories, ours read by peft on torch and peft's read by us."""

import dataclasses
import json
import pathlib
import shutil

import builders
import checkpoints
import factories
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from checkpoints import KINDS, MULTIMODAL, load_torch, torch_logits

from gkdjax.config import Lora
from gkdjax.models import lora
from gkdjax.models.hf import export, load
from gkdjax.models.hf.peft import load_adapter

# peft reads an attribute that this version of transformers has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LANGUAGE = r".*\.language_model\..*\."  # not the image encoder's modules of the same names
SOME = ["q_proj", "o_proj", "down_proj"]


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


@pytest.mark.parametrize("names", [None, SOME, ["q_proj"]])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_on_torch_gives_the_logits_of_the_attached_student(base, kind, names, tmp_path):
    source, decoder, params = base(kind)
    adapters = builders.adapters(decoder, rank=4, dropout=0.25, names=names)
    export.export_adapter(tmp_path / "adapter", decoder.spec, adapters, source)
    wanted = attached_logits(decoder, params, adapters)
    np.testing.assert_allclose(peft_logits(source, tmp_path / "adapter"), wanted, atol=1e-4)
    assert np.abs(wanted - checkpoints.logits(decoder, params)).max() > 0.1
    model = peft.PeftModel.from_pretrained(load_torch(source), str(tmp_path / "adapter"))
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == decoder.spec.num_layers * len(names or lora.ALL_LINEAR)
    assert not any("vision" in name for name in adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_to_the_bit(base, kind, tmp_path):
    source, decoder, _ = base(kind)
    adapters = builders.adapters(decoder, rank=3, dropout=0.25, names=SOME)
    odd, rslora = (
        {path: dataclasses.replace(adapter, scale=scale) for path, adapter in adapters.items()}
        for scale in (7 / 3, 16 / 3**0.5)
    )
    for name, wanted in {"plain": adapters, "odd": odd, "rslora": rslora}.items():
        export.export_adapter(tmp_path / name, decoder.spec, wanted, source)
        found = load_adapter(tmp_path / name, decoder.spec)
        assert jax.tree.structure(found.adapters) == jax.tree.structure(wanted)  # scales, dropout
        jax.tree.map(np.testing.assert_array_equal, found.adapters, wanted)
    assert json.loads((tmp_path / "odd" / CONFIG).read_text())["lora_alpha"] == 7
    found = load_adapter(tmp_path / "odd", decoder.spec)
    assert found.rules == Lora(3, 7.0, 0.25, tuple(sorted(SOME)))
    assert found.base == source


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_wrote_gives_pefts_logits(base, kind, rslora, tmp_path):
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


def test_patterns_that_take_kernels_as_a_whole_are_kept_both_ways(base, tmp_path):
    source, decoder, params = base("llama")
    fields = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"mlp.down_proj": 20}}
    wanted = trained_in_torch(source, tmp_path / "theirs", target_modules=SOME, **fields)
    found = load_adapter(tmp_path / "theirs", decoder.spec).adapters
    assert {path: (a.a.shape[-1], a.scale) for path, a in found.items()} == {
        "layers/down_proj": (4, 5.0),
        "layers/o_proj": (2, 3.0),
        "layers/q_proj": (4, 1.5),
    }
    got = attached_logits(decoder, params, found)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    export.export_adapter(tmp_path / "ours", decoder.spec, found, source)
    np.testing.assert_allclose(peft_logits(source, tmp_path / "ours"), wanted, atol=1e-4)
    again = load_adapter(tmp_path / "ours", decoder.spec).adapters
    assert jax.tree.structure(again) == jax.tree.structure(found)


@pytest.fixture(scope="module")
def theirs(base, tmp_path_factory) -> pathlib.Path:
    """An adapter of SOME of a Gemma 3, as peft wrote it."""
    directory = tmp_path_factory.mktemp("theirs")
    trained_in_torch(base("gemma3")[0], directory, target_modules=SOME)
    return directory


@pytest.fixture
def adapter(theirs, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(theirs, tmp_path / "adapter"))


def rename(directory: pathlib.Path, change) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    renamed = {change(name): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, directory / WEIGHTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        # What peft wrote of a multimodal model before transformers 4.52, and since.
        lambda name: name.replace("model.layers", "language_model.model.layers"),
        lambda name: name.replace("model.layers", "model.language_model.layers"),
    ],
)
def test_other_names_of_the_same_tensors_are_read(adapter, theirs, change):
    spec = factories.spec()
    rename(adapter, change)
    wanted, got = (load_adapter(directory, spec).adapters for directory in (theirs, adapter))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_16_bits_become_float32(adapter, dtype):
    tensors = safetensors.torch.load_file(adapter / WEIGHTS)
    low = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    safetensors.torch.save_file(low, adapter / WEIGHTS)
    found = load_adapter(adapter, factories.spec()).adapters["layers/o_proj"]
    name = "base_model.model.model.layers.2.self_attn.o_proj.lora_B.weight"
    assert found.b.dtype == jnp.float32
    np.testing.assert_array_equal(found.b[2], low[name].float().numpy().T)


def test_the_bases_name_is_the_one_that_was_given(base, tmp_path, monkeypatch):
    source, decoder, _ = base("gemma3")
    adapters = builders.adapters(decoder, names=["q_proj"])

    def named(*source_and_base):
        export.export_adapter(tmp_path / "adapter", decoder.spec, adapters, *source_and_base)
        fields = json.loads((tmp_path / "adapter" / CONFIG).read_text())
        return fields["base_model_name_or_path"]

    monkeypatch.chdir(pathlib.Path(source).parent)
    assert named("base") == named(source) == source
    assert named(source, "google/gemma-3-1b-it") == "google/gemma-3-1b-it"


def test_an_adapter_directory_is_what_peft_documents(base, tmp_path):
    """https://huggingface.co/docs/peft/developer_guides/checkpoint"""
    source, decoder, _ = base("gemma3")
    adapters = builders.adapters(decoder, rank=4, dropout=0.1, names=SOME)
    out = tmp_path / "adapter"
    (out / "left_over").mkdir(parents=True)
    licensed = pathlib.Path(shutil.copytree(source, tmp_path / "licensed"))
    (licensed / "USE_POLICY.md").write_text("be kind")
    export.export_adapter(out, decoder.spec, adapters, licensed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "licensed"]
    assert {path.name for path in out.iterdir()} == {
        *("USE_POLICY.md", CONFIG, WEIGHTS, "chat_template.jinja", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    fields = json.loads((out / CONFIG).read_text())
    assert (fields["peft_type"], fields["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (4, 6.0, 0.1)
    assert fields["target_modules"] == sorted(SOME)
    assert (fields["bias"], fields["fan_in_fan_out"]) == ("none", False)
    tensors = safetensors.torch.load_file(out / WEIGHTS)
    assert len(tensors) == 3 * 3 * 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    assert tensors[name.format("A")].shape == (4, 80)
    assert tensors[name.format("B")].shape == (48, 4)


def edit(directory: pathlib.Path, without: tuple[str, ...] = (), **changed) -> None:
    fields = json.loads((directory / CONFIG).read_text()) | changed
    (directory / CONFIG).write_text(
        json.dumps({key: value for key, value in fields.items() if key not in without})
    )


def test_a_config_that_leaves_fields_out_has_pefts_defaults(base, tmp_path):
    source, decoder, params = base("llama")
    trained_in_torch(source, tmp_path, r=8, target_modules=["q_proj", "v_proj"])
    edit(tmp_path, without=("r", "lora_alpha", "lora_dropout", "target_modules"))
    rules = load_adapter(tmp_path, decoder.spec).rules
    theirs = peft.LoraConfig()
    assert (rules.rank, rules.alpha, rules.dropout) == (
        *(theirs.r, theirs.lora_alpha, theirs.lora_dropout),
    )
    found = load_adapter(tmp_path, decoder.spec).adapters
    assert set(found) == {"layers/q_proj", "layers/v_proj"}
    wanted = peft_logits(source, tmp_path)
    np.testing.assert_allclose(attached_logits(decoder, params, found), wanted, atol=1e-4)
    assert np.abs(wanted - torch_logits(load_torch(source))).max() > 0.1


EXCLUDING = {
    "fewer targets": {"target_modules": ["q_proj", "o_proj"]},
    "no targets": {"target_modules": None},  # peft's own: q_proj and v_proj
    "excluded": {"exclude_modules": ["mlp.down_proj"]},
    "excluded by a regular expression": {"exclude_modules": r".*\.(down|v)_proj"},
}


@pytest.mark.parametrize("changed", EXCLUDING)
def test_tensors_that_the_config_excludes_are_passed_over_as_peft_does(
    base, changed, tmp_path, caplog
):
    source, decoder, params = base("llama")
    kernels = [*SOME, "v_proj"]
    every = trained_in_torch(source, tmp_path, target_modules=kernels)
    edit(tmp_path, **EXCLUDING[changed])
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    more = {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 48)}
    safetensors.torch.save_file(tensors | more, tmp_path / WEIGHTS)
    wanted = peft_logits(source, tmp_path)
    assert np.abs(wanted - every).max() > 0.1
    with caplog.at_level("WARNING"):
        found = load_adapter(tmp_path, decoder.spec).adapters
    np.testing.assert_allclose(attached_logits(decoder, params, found), wanted, atol=1e-4)
    assert len(found) < len(kernels)
    assert "passed over, as peft does: base_model.model.lm_head.lora_A.weight" in caplog.text
