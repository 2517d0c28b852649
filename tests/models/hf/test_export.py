"""Model directories that are handed over, read back by torch's transformers and byte by byte."""

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
import transformers
from checkpoints import KINDS, MULTIMODAL, assert_same_bytes, load_torch, tensors, torch_logits

from gkdjax import config
from gkdjax.data.chat_template import load_chat
from gkdjax.models import lora
from gkdjax.models.hf import export, load
from gkdjax.models.sampler import sample
from gkdjax.types import Message, SamplingParams
from gkdjax.utils.errors import UserError

INDEX = "model.safetensors.index.json"
TERMS = (
    "LICENSE",
    "LICENCE.txt",
    "Llama3_license.md",
    "USE_POLICY.md",
    "Notice.txt",
    "LICENSE-2.0",
)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return checkpoints.make(tmp_path_factory.mktemp("source"), "gemma3")


@pytest.fixture(scope="module")
def model(source):
    """(decoder, params, adapters)."""
    decoder, params = load.load_pretrained(source)
    return decoder, params, builders.adapters(decoder, rank=4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_directory_is_the_attached_student_in_torch(kind, tmp_path):
    source = checkpoints.make(tmp_path / "source", kind)
    decoder, params = load.load_pretrained(source)
    adapters = builders.adapters(decoder, rank=4)
    export.export_merged(tmp_path / "merged", decoder.spec, params, adapters, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "source"]
    attached = np.asarray(checkpoints.logits(decoder, lora.attach(params, adapters)))
    np.testing.assert_allclose(torch_logits(load_torch(tmp_path / "merged")), attached, atol=1e-4)
    assert np.abs(attached - torch_logits(load_torch(source))).max() > 0.5
    again = load.load_pretrained(str(tmp_path / "merged"))[1]
    jax.tree.map(np.testing.assert_array_equal, again, lora.merge(params, adapters))


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_untrained_weights_come_back_byte_for_byte(kind, dtype, max_shard_size, tmp_path):
    source = checkpoints.make(tmp_path / "source", kind, dtype, max_shard_size)
    files = list(pathlib.Path(source).glob("*.safetensors"))
    assert (len(files) > 2) == (max_shard_size != "5GB")
    for load_as in (None, "float32"):  # a frozen base; masters of all parameters
        decoder, params = load.load_pretrained(source, dtype=load_as)
        export.export_merged(tmp_path / "out", decoder.spec, params, None, source)
        assert_same_bytes(tmp_path / "out", source)


def test_what_is_no_text_decoder_comes_back_as_it_was(tmp_path):
    source = checkpoints.make(tmp_path / "source", MULTIMODAL)
    integers = {"vision_tower.embeddings.position_ids": torch.arange(4)}
    before = tensors(source) | integers
    half = {n: t.half() if n.startswith("vision_tower.head") else t for n, t in before.items()}
    safetensors.torch.save_file(half, tmp_path / "source/model.safetensors")
    decoder, params = load.load_pretrained(source)
    trained = jax.tree.map(lambda leaf: leaf + 1.0, params)
    export.export_merged(tmp_path / "out", decoder.spec, trained, None, source)
    after = tensors(tmp_path / "out")
    assert after.keys() == half.keys()
    for name, tensor in half.items():
        kept = not name.startswith("language_model.")
        assert torch.equal(after[name], tensor) == kept, name
        assert after[name].dtype == tensor.dtype


def test_files_beside_the_weights_come_along(tmp_path):
    source = pathlib.Path(checkpoints.make(tmp_path / "source", MULTIMODAL))
    (source / "training_args.bin").write_bytes(b"not ours to keep")
    for name in ("README.md", "license_of_code.py", "model_card.txt"):
        (source / name).write_text("of other things")
    for name in TERMS:
        (source / name).write_text(f"{name} of the source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("a second template")
    decoder, params = load.load_pretrained(str(source))
    export.export_merged(tmp_path / "out", decoder.spec, params, None, str(source))
    kept = {path.relative_to(source) for path in source.rglob("*.j*")}
    assert {str(path) for path in kept} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "additional_chat_templates/tools.jinja"),
        *("preprocessor_config.json", "processor_config.json"),
    }
    kept |= set(map(pathlib.Path, TERMS))
    found = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == kept | {pathlib.Path("model.safetensors")}
    for path in kept:
        assert (tmp_path / "out" / path).read_bytes() == (source / path).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    message = [{"role": "user", "content": "Hi"}]
    assert "<start_of_turn>user\nHi" in tokenizer.apply_chat_template(message, tokenize=False)


def test_masters_are_rounded_once_to_the_sources_dtype(model, tmp_path):
    source = checkpoints.make(tmp_path / "source", "gemma3", "bfloat16")
    decoder, _, adapters = model
    low = load.load_pretrained(source)[1]
    export.export_merged(tmp_path / "merged", decoder.spec, low, adapters, source)
    got = tensors(tmp_path / "merged")
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    high = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    wanted = np.asarray(lora.merge(high, adapters)["layers"]["q_proj"][1]).T
    assert torch.equal(got[Q_PROJ], torch.tensor(wanted).bfloat16())


def test_a_base_kept_in_16_bits_is_merged_in_the_sources_float32(source, model, tmp_path):
    decoder, _, adapters = model
    low = load.load_pretrained(source, dtype="bfloat16")[1]
    export.export_merged(tmp_path / "merged", decoder.spec, low, adapters, source)
    high = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    wanted = np.asarray(lora.merge(high, adapters)["layers"]["q_proj"][1]).T
    np.testing.assert_array_equal(tensors(tmp_path / "merged")[Q_PROJ], wanted, strict=True)


def test_the_newer_names_of_the_multimodal_layout_come_back_too(tmp_path):
    source = pathlib.Path(checkpoints.make(tmp_path / "source", MULTIMODAL))
    renamed = {
        "model." + name.replace("language_model.model.", "language_model."): tensor
        for name, tensor in tensors(source).items()
    }
    safetensors.torch.save_file(renamed, source / "model.safetensors")
    decoder, params = load.load_pretrained(str(source))
    export.export_merged(tmp_path / "out", decoder.spec, params, None, str(source))
    assert_same_bytes(tmp_path / "out", source)
    np.testing.assert_allclose(
        torch_logits(load_torch(tmp_path / "out")), checkpoints.logits(decoder, params), atol=1e-4
    )


def test_each_tensor_keeps_its_own_dtype(source, tmp_path):
    mixed = pathlib.Path(shutil.copytree(source, tmp_path / "mixed"))
    kept = {n: t if "norm" in n else t.bfloat16() for n, t in tensors(source).items()}
    safetensors.torch.save_file(kept, mixed / "model.safetensors")
    decoder, params = load.load_pretrained(str(mixed))
    export.export_merged(tmp_path / "out", decoder.spec, params, None, str(mixed))
    assert_same_bytes(tmp_path / "out", mixed)


def test_a_tied_models_second_table_is_the_trained_embedding(source, tmp_path):
    doubled = pathlib.Path(shutil.copytree(source, tmp_path / "doubled"))
    head = tensors(source)["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(
        tensors(source) | {"lm_head.weight": head}, doubled / "model.safetensors"
    )
    decoder, params = load.load_pretrained(str(doubled))
    trained = params | {"embedding": params["embedding"] * 2.0}
    export.export_merged(tmp_path / "out", decoder.spec, trained, None, str(doubled))
    got = tensors(tmp_path / "out")
    assert torch.equal(got["lm_head.weight"], 2 * head)
    assert torch.equal(got["model.embed_tokens.weight"], 2 * head)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def buffers(tensors):
    kept = torch.ones(4, dtype=torch.float16)  # of another dtype and other numbers than ours
    return tensors | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": kept.clone() for i in range(3)
    }


def head_alone(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)
    return tensors


def head_in(dtype):
    return lambda tensors: tensors | {HEAD: tensors[EMBEDDING].to(dtype)}


def one_layer_in_float32(tensors):
    return {n: t.float() if ".layers.1." in n else t for n, t in tensors.items()}


UNUSUAL = {
    "inv_freq": buffers,
    "head alone": head_alone,
    "head in float32": head_in(torch.float32),
    "one layer in float32": one_layer_in_float32,
}


@pytest.mark.parametrize("form", UNUSUAL)
@pytest.mark.parametrize("kind", factories.FAMILIES)
def test_what_transformers_loads_is_loaded_and_comes_back(form, kind, tmp_path):
    source = pathlib.Path(checkpoints.make(tmp_path / "source", kind, "bfloat16"))
    before = torch_logits(load_torch(source))
    edited = UNUSUAL[form](tensors(source))
    safetensors.torch.save_file(edited, source / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(torch_logits(load_torch(source)), before)
    decoder, params = load.load_pretrained(source, dtype="float32")
    np.testing.assert_allclose(checkpoints.logits(decoder, params), before, atol=2e-5)
    decoder, kept = load.load_pretrained(source)  # each leaf in its own dtype
    mixed = form == "one layer in float32"
    assert kept["layers"]["q_proj"].dtype == (jnp.float32 if mixed else jnp.bfloat16)
    for loaded in (params, kept):
        export.export_merged(tmp_path / "out", decoder.spec, loaded, None, source)
        assert_same_bytes(tmp_path / "out", source)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16")])
def test_a_tied_head_of_another_dtype_stays_tied_when_trained(dtypes, tmp_path):
    embedding, head = (getattr(torch, dtype) for dtype in dtypes)
    source = pathlib.Path(checkpoints.make(tmp_path / "source", "llama"))
    found = tensors(source)
    table = found[EMBEDDING].to(embedding).to(head)  # what both can hold
    found |= {EMBEDDING: table.to(embedding), HEAD: table}
    safetensors.torch.save_file(found, source / "model.safetensors", {"format": "pt"})
    decoder, params = load.load_pretrained(source, dtype="float32")
    trained = params | {"embedding": params["embedding"] * 1.37}
    export.export_merged(tmp_path / "out", decoder.spec, trained, None, source)
    got = tensors(tmp_path / "out")
    assert (got[EMBEDDING].dtype, got[HEAD].dtype) == (embedding, head)
    assert torch.equal(got[EMBEDDING].float(), got[HEAD].float())
    load.load_pretrained(tmp_path / "out")


def test_a_tied_head_that_only_the_index_names_is_not_missed(tmp_path):
    source = pathlib.Path(checkpoints.make(tmp_path / "source", "qwen3"))
    where = dict.fromkeys([*tensors(source), HEAD], "model.safetensors")
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    decoder, params = load.load_pretrained(source)
    np.testing.assert_allclose(
        checkpoints.logits(decoder, params), torch_logits(load_torch(source)), atol=2e-5
    )
    export.export_merged(tmp_path / "out", decoder.spec, params, None, source)
    assert_same_bytes(tmp_path / "out", source)


@pytest.mark.parametrize("kind", ["llama", MULTIMODAL])
def test_shards_are_bounded_indexed_and_loaded_by_transformers(kind, tmp_path):
    source = checkpoints.make(tmp_path / "source", kind)
    decoder, params = load.load_pretrained(source)
    out = tmp_path / "out"
    export.export_merged(out, decoder.spec, params, None, source, shard_bytes=50_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 5
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / INDEX).read_text())
    parts = {file.name: safetensors.torch.load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, part in parts.items() for name in part}
    sizes = {file: sum(t.nbytes for t in part.values()) for file, part in parts.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    # The image encoder has a tensor that is larger by itself.
    assert all(size <= 50_000 or len(parts[file]) == 1 for file, size in sizes.items())
    assert_same_bytes(out, source)
    np.testing.assert_array_equal(torch_logits(load_torch(out)), torch_logits(load_torch(source)))
    again = load.load_pretrained(str(out))[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_number_too_large_for_float16_is_named(tmp_path):
    source = checkpoints.make(tmp_path / "source", "llama", "float16")
    decoder, params = load.load_pretrained(source, dtype="float32")
    layers = params["layers"] | {"q_proj": params["layers"]["q_proj"].at[1, 0, 0].set(7e4)}
    with pytest.raises(UserError, match=f"{Q_PROJ}.*65504.*bfloat16"):
        export.export_merged(
            tmp_path / "out", decoder.spec, params | {"layers": layers}, None, source
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_second_export_replaces_the_first_whole(source, model, tmp_path):
    decoder, params, adapters = model
    out = tmp_path / "out"
    export.export_merged(out, decoder.spec, params, adapters, source, shard_bytes=50_000)
    (out / "left_over").touch()
    export.export_merged(out, decoder.spec, params, None, source)
    assert_same_bytes(out, source)
    assert not (out / "left_over").exists() and not (out / INDEX).exists()


def test_the_source_itself_may_be_replaced(source, model, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    decoder, params, adapters = model
    export.export_merged(copy, decoder.spec, params, adapters, str(copy))
    again = load.load_pretrained(str(copy))[1]
    jax.tree.map(np.testing.assert_array_equal, again, lora.merge(params, adapters))
    assert (copy / "tokenizer.json").is_file()


def test_a_source_that_has_changed_is_refused(source, model, tmp_path):
    copy = pathlib.Path(shutil.copytree(source, tmp_path / "copy"))
    fewer = {name: t for name, t in tensors(source).items() if name != Q_PROJ}
    safetensors.torch.save_file(fewer, copy / "model.safetensors")
    with pytest.raises(UserError, match=Q_PROJ):
        export.export_merged(tmp_path / "out", model[0].spec, model[1], None, str(copy))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", factories.FAMILIES)
def test_save_pretrained_is_byte_for_byte_what_was_loaded(kind, dtype, tied, tmp_path):
    source = checkpoints.make(tmp_path / "source", kind, dtype, tie_word_embeddings=tied)
    decoder, params = load.load_pretrained(source)
    export.save_pretrained(tmp_path / "saved", decoder.spec, params, source)
    assert_same_bytes(tmp_path / "saved", source)
    assert ("lm_head.weight" in tensors(tmp_path / "saved")) == (not tied)
    export.save_pretrained(source, decoder.spec, params, source)  # the source itself
    assert_same_bytes(tmp_path / "saved", source)


def test_save_pretrained_has_the_dtype_of_the_parameters(source, tmp_path):
    decoder, params = load.load_pretrained(source, dtype="bfloat16")
    edited = pathlib.Path(shutil.copytree(source, tmp_path / "edited"))
    config = json.loads((edited / "config.json").read_text())
    del config["dtype"]
    (edited / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    (edited / "model.safetensors").unlink()  # a fresh model has no source weights
    export.save_pretrained(tmp_path / "saved", decoder.spec, params, edited)
    written = json.loads((tmp_path / "saved/config.json").read_text())
    assert written == config | {"dtype": "bfloat16"}
    wanted = {name: tensor.bfloat16() for name, tensor in tensors(source).items()}
    got = tensors(tmp_path / "saved")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_save_pretrained_is_the_model_in_torch(tmp_path):
    source = checkpoints.make(tmp_path / "source", "qwen3", tie_word_embeddings=False)
    decoder, params = load.load_pretrained(source)
    layers = params["layers"] | {"gate_proj": params["layers"]["gate_proj"] * 1.5}
    params = params | {"layers": layers}
    export.save_pretrained(tmp_path / "saved", decoder.spec, params, source)
    got = torch_logits(load_torch(tmp_path / "saved"))
    np.testing.assert_allclose(got, checkpoints.logits(decoder, params), atol=2e-5)
    assert np.abs(got - torch_logits(load_torch(source))).max() > 0.01


def test_a_failed_save_leaves_the_older_one(source, model, tmp_path):
    decoder, params, _ = model
    export.save_pretrained(tmp_path / "saved", decoder.spec, params, source)
    broken = {"embedding": params["embedding"], "layers": params["layers"]}
    with pytest.raises(KeyError, match="final_norm"):
        export.save_pretrained(tmp_path / "saved", decoder.spec, broken, source)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert_same_bytes(tmp_path / "saved", source)


def test_vocabulary_padding_is_kept(tmp_path):
    source = checkpoints.make(tmp_path / "source", "llama", vocab_size=factories.VOCAB_SIZE + 5)
    decoder, params = load.load_pretrained(source)
    export.export_merged(tmp_path / "out", decoder.spec, params, None, source)
    assert len(tensors(tmp_path / "out")["model.embed_tokens.weight"]) == factories.VOCAB_SIZE + 5


@pytest.fixture(scope="module")
def base_like(tmp_path_factory):
    """(directory, decoder, params, adapters, chat): a student that ends its turns, whose
    generation_config.json does not know it, as base checkpoints with a chat template come."""
    directory = tmp_path_factory.mktemp("base") / "student"
    shutil.copytree(config.ASSETS / "quickstart" / "student", directory)
    fields = {"bos_token_id": 2, "eos_token_id": 1, "top_k": 7}
    (directory / "generation_config.json").write_text(json.dumps(fields))
    decoder, params = load.load_pretrained(directory)
    adapters = {
        path: dataclasses.replace(adapter, scale=1e-3)
        for path, adapter in builders.adapters(decoder, rank=2).items()
    }
    return directory, decoder, params, adapters, load_chat(directory)


ASKED = [{"role": "user", "content": "sort: fbdac"}]


def generated(model, exported, **settings) -> list[int]:
    """What transformers writes with the tokenizer and the template of an export."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    rendered = tokenizer.apply_chat_template(
        ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**rendered, **settings)
    return out[0, rendered["input_ids"].shape[1] :].tolist()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_exports_stop_where_the_run_stops(base_like, tmp_path):
    directory, decoder, params, adapters, chat = base_like
    ending = export.Ending(chat.stop_ids, chat.pad_id)
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    export.export_merged(merged, decoder.spec, params, adapters, directory, ending=ending)
    export.export_adapter(adapter, decoder.spec, adapters, directory, ending=ending)
    for exported in (merged, adapter):
        told = json.loads((exported / "generation_config.json").read_text())
        wanted = {"bos_token_id": 2, "eos_token_id": [5, 1], "pad_token_id": 0, "top_k": 7}
        assert told == wanted
        assert load_chat(exported).stop_ids == chat.stop_ids
    (ours,) = sample(
        decoder,
        lora.merge(params, adapters),
        [chat.prompt_ids([Message(**ASKED[0])])],
        [0],
        SamplingParams(40, temperature=0.0, top_p=1.0),
        stop_ids=chat.stop_ids,
        batch_size=1,
        lengths=(32,),
    )
    assert ours.finished and 5 < len(ours.ids) < 10
    greedy = {"max_new_tokens": 40, "do_sample": False}
    assert generated(load_torch(merged), merged, **greedy) == ours.ids.tolist()
    model = peft.PeftModel.from_pretrained(load_torch(directory), adapter)
    assert len(generated(model, adapter, **greedy)) == 40  # by its base's generation_config.json
    own = transformers.GenerationConfig.from_pretrained(adapter, **greedy)
    assert generated(model, adapter, generation_config=own) == ours.ids.tolist()


def test_a_generation_config_that_is_no_object_is_named(base_like, tmp_path):
    directory, decoder, params, *_ = base_like
    source = shutil.copytree(directory, tmp_path / "source")
    (source / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config\.json must hold a JSON object"):
        export.export_merged(
            tmp_path / "out", decoder.spec, params, None, source, ending=export.Ending((5,), 3)
        )
    for damage in ("[" * 100_000, None):
        (source / "generation_config.json").unlink()
        if damage is None:
            (source / "generation_config.json").mkdir()
        else:
            (source / "generation_config.json").write_text(damage)
        with pytest.raises(UserError, match=r"does not parse: it nests|cannot be read: Is a dir"):
            load_chat(source)


@pytest.mark.parametrize(
    "fields, wanted",
    [
        (None, {"eos_token_id": [5, 1], "pad_token_id": 3}),
        ({"eos_token_id": 5, "pad_token_id": 0}, {"eos_token_id": [5, 1], "pad_token_id": 0}),
        ({"eos_token_id": [1, 5], "pad_token_id": 0, "a": 1}, None),  # the same stops: left alone
    ],
)
def test_a_generation_config_is_changed_only_where_it_must_be(base_like, tmp_path, fields, wanted):
    directory, decoder, params, *_ = base_like
    source = shutil.copytree(directory, tmp_path / "source")
    path = source / "generation_config.json"
    path.unlink() if fields is None else path.write_text(json.dumps(fields))
    ending = export.Ending((5, 1), 3)
    out = tmp_path / "out"
    export.export_merged(out, decoder.spec, params, None, source, ending=ending)
    said = (out / "generation_config.json").read_text()
    assert said == json.dumps(fields) if wanted is None else json.loads(said) == wanted
