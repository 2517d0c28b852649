"""What is handed over, read back by torch's transformers and merged by hand as PEFT does it."""

import functools
import json
import pathlib

import builders
import factories
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from gkdjax import config, export, hf, lora

TOKENS_BT = np.random.default_rng(0).integers(3, factories.VOCAB_SIZE, (2, 12)).astype(np.int32)
RANK, ALPHA = 4, 6.0  # alpha / rank is the scale of `builders.adapters`
NAMES = ("q_proj", "o_proj", "down_proj")


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder, params):
    hidden = decoder.apply({"params": params}, TOKENS_BT, TOKENS_BT >= 0)
    return decoder.apply({"params": params}, hidden, method="unembed")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return factories.model_dir(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def model(source):
    """(decoder, params, adapters, logits with the adapters attached)."""
    decoder, params = hf.load_pretrained(source)
    adapters = builders.adapters(decoder, rank=RANK, names=NAMES)
    attached = np.asarray(_logits(decoder, lora.attach(params, adapters)))
    return decoder, params, adapters, attached


def load_torch(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BT).long()).logits.numpy()


def test_a_merged_directory_is_the_attached_student_in_torch(source, model, tmp_path):
    decoder, params, adapters, attached = model
    export.export_merged(tmp_path / "merged", decoder.spec, params, adapters, source)
    assert not list(tmp_path.glob("*.part"))
    loaded = load_torch(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(loaded), attached, atol=1e-4)
    assert np.abs(attached - np.asarray(torch_logits(load_torch(source)))).max() > 0.5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    message = [{"role": "user", "content": "Hi"}]
    assert "<start_of_turn>user\nHi" in tokenizer.apply_chat_template(message, tokenize=False)
    again = hf.load_pretrained(str(tmp_path / "merged"))[1]
    jax.tree.map(np.testing.assert_array_equal, again, lora.merge(params, adapters))


def test_exported_weights_may_be_read_like_any_new_file(adapter_dir, tmp_path):
    (tmp_path / "any").touch()
    mode = (tmp_path / "any").stat().st_mode
    assert (pathlib.Path(adapter_dir) / "adapter_model.safetensors").stat().st_mode == mode


def test_the_sources_dtype_is_kept(model, tmp_path):
    """Masters are float32; the sum is rounded once, at the end."""
    source = factories.model_dir(tmp_path / "source", dtype="bfloat16")
    decoder, _, adapters, _ = model
    params = hf.load_pretrained(source, dtype="float32")[1]
    export.export_merged(tmp_path / "merged", decoder.spec, params, adapters, source)
    assert hf.stored_dtype(str(tmp_path / "merged")) == "bfloat16"
    tensors = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    wanted = np.asarray(lora.merge(params, adapters)["layers"]["q_proj"][1]).T
    got = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(got, torch.tensor(wanted).bfloat16())
    # All parameters trained, no adapter: as they are.
    export.export_merged(tmp_path / "full", decoder.spec, params, None, source)
    jax.tree.map(
        np.testing.assert_array_equal,
        *(hf.load_pretrained(directory)[1] for directory in (str(tmp_path / "full"), source)),
    )


@pytest.fixture
def adapter_dir(source, model, tmp_path) -> pathlib.Path:
    rules = config.Lora(
        rank=RANK, alpha=ALPHA, dropout=0.1, targets=("layers/[qo]_proj", "down_proj")
    )
    directory = tmp_path / "adapter"
    export.export_adapter(directory, model[0].spec, model[2], rules, source)
    return directory


def test_an_adapter_directory_is_what_peft_documents(source, adapter_dir):
    """https://huggingface.co/docs/peft/developer_guides/checkpoint"""
    assert sorted(p.name for p in adapter_dir.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    fields = json.loads((adapter_dir / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA"
    assert fields["task_type"] == "CAUSAL_LM"
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (RANK, ALPHA, 0.1)
    assert fields["target_modules"] == sorted(NAMES)  # kernels, not our regular expressions
    assert (fields["bias"], fields["fan_in_fan_out"]) == ("none", False)
    assert pathlib.Path(fields["base_model_name_or_path"]).samefile(source)
    tensors = safetensors.torch.load_file(adapter_dir / "adapter_model.safetensors")
    modules = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    assert set(tensors) == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"
        for layer in range(3)
        for module in modules
        for half in "AB"
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (
        RANK,
        80,
    )
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (
        48,
        RANK,
    )


def test_the_adapter_merged_by_hand_is_the_attached_student(source, model, adapter_dir):
    """W + alpha / r * B A, module by module, as PEFT's merge_and_unload."""
    fields = json.loads((adapter_dir / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(adapter_dir / "adapter_model.safetensors")
    base = load_torch(source)
    adapted = 0
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in fields["target_modules"]:
            a, b = (tensors.pop(f"base_model.model.{name}.lora_{half}.weight") for half in "AB")
            module.weight.data += fields["lora_alpha"] / fields["r"] * b @ a
            adapted += 1
    assert (adapted, tensors) == (9, {})
    np.testing.assert_allclose(torch_logits(base), model[3], atol=1e-4)


def test_a_second_export_replaces_the_first_whole(source, model, adapter_dir, tmp_path):
    decoder, params, adapters, _ = model
    fewer = {"layers/q_proj": adapters["layers/q_proj"]}
    (adapter_dir / "left_over").touch()
    export.export_adapter(adapter_dir, decoder.spec, fewer, config.Lora(rank=RANK), source)
    assert not (adapter_dir / "left_over").exists()
    assert len(safetensors.torch.load_file(adapter_dir / "adapter_model.safetensors")) == 6
    merged = tmp_path / "merged"
    export.export_merged(merged, decoder.spec, params, adapters, source)
    (merged / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    export.export_merged(merged, decoder.spec, params, None, source)
    again = hf.load_pretrained(str(merged))[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)
