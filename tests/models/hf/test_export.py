"""Exported model directories, read back by torch's transformers and byte by byte."""

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

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TERMS = ("LICENSE", "LICENCE.txt", "Llama3_license.md", "USE_POLICY.md", "Notice.txt")
TERMS += ("LICENSE-2.0",)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return checkpoints.make(tmp_path_factory.mktemp("source"), "gemma3")


@pytest.fixture(scope="module")
def model(source):
    """(decoder, params, adapters)."""
    decoder, params = load.load_pretrained(source)
    return decoder, params, builders.adapters(decoder, rank=4)


def save(directory, found: dict) -> None:
    safetensors.torch.save_file(found, pathlib.Path(directory) / WEIGHTS, {"format": "pt"})


def assert_same(params, wanted) -> None:
    jax.tree.map(np.testing.assert_array_equal, params, wanted)


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
    assert_same(again, lora.merge(params, adapters))


def buffers(found):
    kept = torch.ones(4, dtype=torch.float16)  # of another dtype and other numbers than ours
    return found | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": kept + 0 for i in range(3)}


def head_alone(found):
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in found.items()}


def head_in_float32(found):
    return found | {HEAD: found[EMBEDDING].float()}


def in_float32(part: str):
    return lambda found: {n: t.float() if part in n else t for n, t in found.items()}


def newer_names(found):
    old, new = "language_model.model.", "language_model."
    return {"model." + name.replace(old, new): tensor for name, tensor in found.items()}


def as_saved(found):
    return found


def only_indexed(found):
    """The index alone names the head, see below."""
    return found


SAVED = [("float32", "40KB"), ("bfloat16", "5GB"), ("float16", "40KB")]
FORMS = [
    *((kind, *saved, as_saved) for kind in KINDS for saved in SAVED),
    *(("gemma3", "bfloat16", "5GB", form) for form in (buffers, head_alone)),
    *(("llama", "bfloat16", "5GB", form) for form in (buffers, in_float32(".layers.1."))),
    ("llama", "bfloat16", "5GB", head_in_float32),
    *(("qwen2", "bfloat16", "5GB", form) for form in (head_alone, in_float32("norm"))),
    *(("qwen3", "bfloat16", "5GB", form) for form in (head_in_float32, only_indexed)),
    ("qwen3", "bfloat16", "5GB", in_float32(".layers.1.")),
    (MULTIMODAL, "bfloat16", "5GB", newer_names),
]


@pytest.mark.parametrize(("kind", "dtype", "max_shard_size", "form"), FORMS)
def test_untrained_weights_come_back_byte_for_byte(kind, dtype, max_shard_size, form, tmp_path):
    source = pathlib.Path(checkpoints.make(tmp_path / "source", kind, dtype, max_shard_size))
    before = torch_logits(load_torch(source))
    if form is as_saved:
        assert (len(list(source.glob("*.safetensors"))) > 2) == (max_shard_size == "40KB")
    else:
        save(source, form(tensors(source)))
    if form is only_indexed:
        where = dict.fromkeys([*tensors(source), HEAD], WEIGHTS)
        (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    np.testing.assert_array_equal(torch_logits(load_torch(source)), before)
    decoder, masters = load.load_pretrained(source, dtype="float32")
    np.testing.assert_allclose(checkpoints.logits(decoder, masters), before, atol=2e-5)
    decoder, base = load.load_pretrained(source)  # each leaf in its own dtype
    stored = {str(t.dtype)[6:] for name, t in tensors(source).items() if "q_proj.weight" in name}
    assert base["layers"]["q_proj"].dtype == ("float32" if len(stored) > 1 else stored.pop())
    for params in (masters, base):
        export.export_merged(tmp_path / "out", decoder.spec, params, None, source)
        assert_same_bytes(tmp_path / "out", source)


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_a_tied_models_second_table_is_the_trained_embedding(dtypes, tmp_path):
    embedding, head = (getattr(torch, dtype) for dtype in dtypes)
    source = pathlib.Path(checkpoints.make(tmp_path / "source", "llama"))
    found = tensors(source)
    table = found[EMBEDDING].to(embedding).to(head)  # what both can hold
    save(source, found | {EMBEDDING: table.to(embedding), HEAD: table.clone()})
    decoder, params = load.load_pretrained(source, dtype="float32")
    trained = params | {"embedding": params["embedding"] * 1.37}
    export.export_merged(tmp_path / "out", decoder.spec, trained, None, source)
    got = tensors(tmp_path / "out")
    assert (got[EMBEDDING].dtype, got[HEAD].dtype) == (embedding, head)
    assert torch.equal(got[EMBEDDING].float(), got[HEAD].float())
    assert (got[EMBEDDING].float() / table.float()).nanmedian() == pytest.approx(1.37, rel=0.01)
    load.load_pretrained(tmp_path / "out")


@pytest.mark.parametrize(("stored", "base"), [("bfloat16", None), ("float32", "bfloat16")])
def test_merged_weights_are_rounded_once_to_the_sources_dtype(model, tmp_path, stored, base):
    source = checkpoints.make(tmp_path / "source", "gemma3", stored)
    decoder, _, adapters = model
    low = load.load_pretrained(source, dtype=base)[1]
    export.export_merged(tmp_path / "merged", decoder.spec, low, adapters, source)
    got = tensors(tmp_path / "merged")
    assert {tensor.dtype for tensor in got.values()} == {getattr(torch, stored)}
    high = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    wanted = torch.tensor(np.asarray(lora.merge(high, adapters)["layers"]["q_proj"][1]).T)
    assert torch.equal(got[Q_PROJ], wanted.to(getattr(torch, stored)))


def test_tensors_outside_the_text_decoder_come_back_as_they_were(tmp_path):
    source = checkpoints.make(tmp_path / "source", MULTIMODAL)
    before = tensors(source) | {"vision_tower.embeddings.position_ids": torch.arange(4)}
    half = {n: t.half() if n.startswith("vision_tower.head") else t for n, t in before.items()}
    save(source, half)
    decoder, params = load.load_pretrained(source)
    trained = jax.tree.map(lambda leaf: leaf + 1.0, params)
    export.export_merged(tmp_path / "out", decoder.spec, trained, None, source)
    after = tensors(tmp_path / "out")
    assert after.keys() == half.keys()
    for name, tensor in half.items():
        assert torch.equal(after[name], tensor) != name.startswith("language_model."), name
        assert after[name].dtype == tensor.dtype


def test_files_beside_the_weights_come_along(tmp_path):
    source = pathlib.Path(checkpoints.make(tmp_path / "source", MULTIMODAL))
    (source / "additional_chat_templates").mkdir()
    others = ("README.md", "license_of_code.py", "model_card.txt", "training_args.bin")
    for name in (*TERMS, *others, "additional_chat_templates/tools.jinja"):
        (source / name).write_text(f"{name} of the source")
    decoder, params = load.load_pretrained(str(source))
    export.export_merged(tmp_path / "out", decoder.spec, params, None, str(source))
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    found = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in found}
    assert found.keys() == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "additional_chat_templates/tools.jinja", WEIGHTS),
        *("preprocessor_config.json", "processor_config.json", *TERMS),
    }
    assert all(found[name] == (source / name).read_bytes() for name in found if name != WEIGHTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    message = [{"role": "user", "content": "Hi"}]
    assert "<start_of_turn>user\nHi" in tokenizer.apply_chat_template(message, tokenize=False)


@pytest.mark.parametrize("kind", ["llama", MULTIMODAL])
def test_shards_are_bounded_indexed_and_loaded_by_transformers(kind, tmp_path):
    source = checkpoints.make(tmp_path / "source", kind, vocab_size=factories.VOCAB_SIZE + 5)
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
    assert_same(load.load_pretrained(str(out))[1], params)
    (out / "left_over").touch()
    export.export_merged(out, decoder.spec, params, None, source)  # replaces the first whole
    assert_same_bytes(out, source)
    assert not (out / "left_over").exists() and not (out / INDEX).exists()


def test_a_number_too_large_for_float16_is_named(tmp_path):
    source = checkpoints.make(tmp_path / "source", "llama", "float16")
    decoder, params = load.load_pretrained(source, dtype="float32")
    layers = params["layers"] | {"q_proj": params["layers"]["q_proj"].at[1, 0, 0].set(7e4)}
    changed = params | {"layers": layers}
    with pytest.raises(UserError, match=f"{Q_PROJ}.*65504.*bfloat16"):
        export.export_merged(tmp_path / "out", decoder.spec, changed, None, source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_source_itself_may_be_replaced_and_one_that_changed_is_refused(source, model, tmp_path):
    copy = pathlib.Path(shutil.copytree(source, tmp_path / "copy"))
    decoder, params, adapters = model
    export.export_merged(copy, decoder.spec, params, adapters, str(copy))
    assert_same(load.load_pretrained(str(copy))[1], lora.merge(params, adapters))
    assert (copy / "tokenizer.json").is_file()
    save(copy, {name: t for name, t in tensors(copy).items() if name != Q_PROJ})
    with pytest.raises(UserError, match=Q_PROJ):
        export.export_merged(tmp_path / "out", decoder.spec, params, None, str(copy))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize("kind", factories.FAMILIES)
def test_save_pretrained_is_byte_for_byte_what_was_loaded(kind, dtype, tied, tmp_path):
    source = checkpoints.make(tmp_path / "source", kind, dtype, tie_word_embeddings=tied)
    decoder, params = load.load_pretrained(source)
    export.save_pretrained(tmp_path / "saved", decoder.spec, params, source)
    assert_same_bytes(tmp_path / "saved", source)
    assert (HEAD in tensors(tmp_path / "saved")) == (not tied)
    export.save_pretrained(source, decoder.spec, params, source)  # the source itself
    assert_same_bytes(tmp_path / "saved", source)


def test_save_pretrained_has_the_dtype_of_the_parameters(source, tmp_path):
    decoder, params = load.load_pretrained(source, dtype="bfloat16")
    edited = pathlib.Path(shutil.copytree(source, tmp_path / "edited"))
    fields = json.loads((edited / "config.json").read_text())
    del fields["dtype"]
    (edited / "config.json").write_text(json.dumps(fields | {"torch_dtype": "float32"}))
    (edited / WEIGHTS).unlink()  # a fresh model has no source weights
    saved = tmp_path / "saved"
    export.save_pretrained(saved, decoder.spec, params, edited)
    assert json.loads((saved / "config.json").read_text()) == fields | {"dtype": "bfloat16"}
    wanted = {name: tensor.bfloat16() for name, tensor in tensors(source).items()}
    got = tensors(saved)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    with pytest.raises(KeyError, match="final_norm"):  # a failure leaves the older one
        broken = {"embedding": params["embedding"], "layers": params["layers"]}
        export.save_pretrained(saved, decoder.spec, broken, source)
    assert [path.name for path in tmp_path.iterdir() if path != edited] == ["saved"]
    assert tensors(saved).keys() == wanted.keys()


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


QUESTION = [{"role": "user", "content": "sort: fbdac"}]


def generated(model, exported, **settings) -> list[int]:
    """The ids that transformers writes with the tokenizer and the template of an export."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    rendered = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
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
        fields = json.loads((exported / "generation_config.json").read_text())
        wanted = {"bos_token_id": 2, "eos_token_id": [5, 1], "pad_token_id": 0, "top_k": 7}
        assert fields == wanted
        assert load_chat(exported).stop_ids == chat.stop_ids
    (ours,) = sample(
        decoder,
        lora.merge(params, adapters),
        [chat.prompt_ids([Message(**QUESTION[0])])],
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


def test_a_damaged_generation_config_is_named(base_like, tmp_path):
    directory, decoder, params, *_ = base_like
    source = pathlib.Path(shutil.copytree(directory, tmp_path / "source"))
    path = source / "generation_config.json"
    path.write_text("[]")
    ending = export.Ending((5,), 3)
    with pytest.raises(UserError, match=r"generation_config\.json must hold a JSON object"):
        export.export_merged(tmp_path / "out", decoder.spec, params, None, source, ending=ending)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="does not parse: it nests"):
        load_chat(source)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a dir"):
        load_chat(source)


@pytest.mark.parametrize(
    "fields, wanted",
    [
        (None, {"eos_token_id": [5, 1], "pad_token_id": 3}),
        ({"eos_token_id": 5, "pad_token_id": 0}, {"eos_token_id": [5, 1], "pad_token_id": 0}),
        ({"eos_token_id": [1, 5], "pad_token_id": 0, "a": 1}, None),  # the same: left alone
    ],
)
def test_a_generation_config_is_changed_only_where_it_must_be(base_like, tmp_path, fields, wanted):
    directory, decoder, params, *_ = base_like
    source = shutil.copytree(directory, tmp_path / "source")
    path, out = source / "generation_config.json", tmp_path / "out"
    path.unlink() if fields is None else path.write_text(json.dumps(fields))
    ending = export.Ending((5, 1), 3)
    export.export_merged(out, decoder.spec, params, None, source, ending=ending)
    text = (out / "generation_config.json").read_text()
    assert text == json.dumps(fields) if wanted is None else json.loads(text) == wanted
