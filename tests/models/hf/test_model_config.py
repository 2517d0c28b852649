"""config.json: what would be computed otherwise is refused, and what changes nothing is ignored."""

import json
import pathlib
import re

import factories
import pytest
import torch
import transformers

from gkdjax.models.families import registry
from gkdjax.models.hf import model_config
from gkdjax.utils.errors import UserError

FAMILIES = tuple(factories.FAMILIES)
TRANSFORMERS = pathlib.Path(transformers.__file__).parent
SUPPORTED = "gemma3, gemma3_text, llama, qwen2, qwen3"
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
LLAMA3_ROPE = factories.LLAMA3_ROPE
LINEAR = {"type": "linear", "factor": 2.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}


@pytest.fixture
def directory(tmp_path):
    """Writes a sound config.json with fields changed, or one of a multimodal model around it."""

    def write(family: str = "llama", tokenizer: dict | None = None, **changed) -> pathlib.Path:
        config = factories.config(family).to_dict()
        if family == "gemma3" and "text_config" in changed:
            text = config | changed.pop("text_config")
            config = {"model_type": "gemma3", "text_config": text}
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        if tokenizer is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        return tmp_path

    return write


# What transformers' models, masks and caches, or other programs, take from any config.
CHANGING = [
    {"is_causal": False},
    {"is_causal": None},  # transformers: `not None`, so all tokens see each other
    {"use_bidirectional_attention": True},
    {"per_layer_config": {"0": {"intermediate_size": 8}}},
    {"per_layer_config": "x"},
    {"per_layer_config": 3},
    {"attention_chunk_size": 8},
    {"kv_sharing_modes": ["reuse"] * 3},
    {"logit_scale": 0.5},
    {"attn_logit_softcapping": 30.0},
    {"partial_rotary_factor": 0.5},
    {"is_encoder_decoder": True},
    {"chunk_size_feed_forward": 2},
]


@pytest.mark.parametrize("changed", CHANGING, ids=lambda c: "{}={}".format(*next(iter(c.items()))))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_the_computation_is_refused_by_name(directory, family, changed):
    ((key, value),) = changed.items()
    if (family, key) == ("gemma3", "partial_rotary_factor"):
        pytest.skip("transformers' Gemma 3 does not read it there")
    named = rf"(?i)config\.json: .*{key}\b.*{re.escape(str(value))}"
    with pytest.raises(UserError, match=named) as e:
        model_config.load_spec(directory(family, **changed))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", [False, None])
def test_what_is_refused_as_not_causal_is_not_causal_in_torch(value):
    model = factories.torch_model(family="llama")
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(model(long).logits[:, :3], model(short).logits, atol=1e-5)
        model.config.is_causal = value
        assert not torch.allclose(model(long).logits[:, :3], model(short).logits, atol=1e-2)


REFUSED = [
    ("gemma3", {"text_config": {"is_causal": False}}, r"text_config\.is_causal = False changes"),
    ("gemma3", {"text_config": {}, "is_causal": False}, r"json: is_causal = False changes what"),
    # A window that only the cache of Llama has.
    ("llama", {"sliding_window": 7}, "sliding_window = "),
    ("llama", {"layer_types": ["sliding_attention"]}, "layer_types = "),
    ("llama", {"model_type": "mamba"}, f"'mamba' is not supported; supported: {SUPPORTED}$"),
    ("llama", {"model_type": []}, "supported: gemma3, .*qwen3"),
    ("llama", {"model_type": None}, "model_type None.*supported: gemma3, .*qwen3"),
    ("llama", {"architectures": ["LlamaModel"]}, rf"'LlamaModel' .* of model_type {SUPPORTED} is"),
    ("llama", {"architectures": "LlamaModel"}, "'LlamaModel' is not supported"),
    ("llama", {"architectures": ["Gemma3ForConditionalGeneration"]}, "'Gemma3ForConditional"),
    ("llama", {"architectures": 3}, "architectures = 3 must be a list of names"),
    ("llama", GPTQ, r"quantised \(quantization_config\.quant_method 'gptq'\)"),
    ("llama", {"text_config": GPTQ}, "quant_method 'gptq'"),
    ("llama", {"compression_config": {"quant_method": "x"}}, r"_config\.quant_method 'x'"),
    ("llama", {"quantization": {"bits": 4}}, r"quantised by MLX \(quantization = .*--dequantize"),
    ("llama", {"auto_map": {"A": "b.C"}}, r"config\.json: auto_map .* is never run"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0 must be a whole number above"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads = 4 must be a multiple of .* = 3"),
    ("llama", {"head_dim": 15}, "even rotary dimension"),
    ("llama", {"hidden_size": "wide"}, "hidden_size = 'wide' must be a whole number above 0"),
    ("llama", {"mlp_bias": 3}, "'mlp_bias': TypeError: .* expected bool, got int"),  # one line
    (
        "llama",
        {"rope_parameters": {"rope_theta": None}},
        r"rope_parameters\.rope_theta = None must",
    ),
    (
        "llama",
        {"rope_parameters": {"factor": 2.0}},
        "rope_parameters has a factor and no rope_type",
    ),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.*'factor'"),
    ("llama", {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "not below high_freq"),
    ("llama", {"rope_theta": None, "rope_parameters": None, "rope_scaling": LINEAR}, "rope_theta"),
    ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000 must be at most 10000"),
    ("qwen2", {"num_attention_heads": 2**30}, "num_attention_heads exceeds hidden_size = 64"),
    ("gemma3", {"sliding_window": 2**40}, "sliding_window = .* whole number"),
    (
        "llama",
        {"rope_parameters": LINEAR_ROPE},
        r"rope_parameters\.factor = 0 must be a number above 0",
    ),
    ("gemma3", {"hidden_size": 49}, r"config\.json.*49"),
    ("gemma3", {"num_hidden_layers": 4}, r"config\.json"),  # layer types of another depth
    ("gemma3", {"layer_types": ["spiral_attention"] * 3}, r"config\.json.*spiral_attention"),
    ("gemma3", {"attention_bias": True}, r"config\.json.*attention_bias"),
]


@pytest.mark.parametrize(("family", "changed", "wanted"), REFUSED)
def test_what_cannot_be_computed_is_named(directory, family, changed, wanted):
    with pytest.raises(UserError, match=wanted) as caught:
        model_config.load_spec(directory(family, **changed))
    assert str(directory(family) / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text", "wanted"),
    [
        ("config.json", '{"model_type": "ll', "does not parse"),
        ("config.json", '{\n"a": 1,\n', "does not parse: .*line 3"),
        ("config.json", "[" * 100_000, "does not parse"),
        ("config.json", f'{{"a": {"9" * 5000}}}', "does not parse"),
        ("config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", "{", "does not parse"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}', "auto_map"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(directory, file, text, wanted):
    made = directory()
    (made / file).write_text(text)
    with pytest.raises(UserError, match=rf"{re.escape(file)}:? {wanted}") as caught:
        model_config.load_spec(made)
    assert "sys." not in str(caught.value)  # Python's advice to programmers


JUNK = {
    **{"_name_or_path": "somebody/some-model", "_attn_implementation_autoset": True},
    **{"unsloth_version": "2025.3.19", "unsloth_fixed": True},
    **{"transformers.js_config": {"dtype": "q4"}, "transformers_version": "4.40.0"},
    **{"architectures": None, "bos_token_id": [1, 2], "eos_token_id": [128001, 128008, 128009]},
    **{"pad_token_id": -1, "decoder_start_token_id": None, "cache_implementation": "hybrid"},
    **{"torch_dtype": "bfloat16", "torchscript": False, "temperature": 0.6, "top_k": 50},
    **{"do_sample": True, "use_cache": False, "initializer_range": 0.041666666666666664},
    **{"attention_dropout": 0.1, "pretraining_tp": 2, "is_llama_config": True},
    **{"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1},
    **{"pruned_heads": {}, "is_decoder": False, "is_encoder_decoder": False},
    **{"chunk_size_feed_forward": 0, "quantization_config": None, "auto_map": {}},
    **{"is_causal": True, "per_layer_config": None, "logit_scale": 1.0},
}
# What people's files hold beside the sizes, from several of them.
PUBLISHED = [
    # TinyLlama, Llama 2
    {"pretraining_tp": 1, "rope_scaling": None, "rope_theta": 1e4, "attention_bias": False},
    # SmolLM2
    {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": {"b": 1}}},
    # Qwen 2.5, and what R1's students have of it
    {"use_mrope": False, "use_sliding_window": False, "max_window_layers": 28},
    # Mistral's habit
    {"sliding_window": None, "tokenizer_class": "LlamaTokenizer", "mlp_bias": False},
    # a dump of transformers 4
    {
        **{"add_cross_attention": False, "cross_attention_hidden_size": None, "prefix": None},
        **{"bad_words_ids": None, "finetuning_task": None, "tf_legacy_loss": False, "top_p": 1.0},
        **{"use_bfloat16": False, "tie_encoder_decoder": False, "output_attentions": False},
        **{"exponential_decay_length_penalty": None, "repetition_penalty": 1.0, "num_beams": 1},
    },
]
HARMLESS = [
    *((family, JUNK) for family in FAMILIES),
    *((family, more) for family in ("llama", "qwen2", "qwen3") for more in PUBLISHED),
    ("llama", {"sliding_window": 4096, "layer_types": ["full_attention"] * 3}),
    ("llama", {"architectures": ["LlamaForCausalLM"], "partial_rotary_factor": 1.0}),
    ("gemma3", {"architectures": ["Gemma3ForCausalLM"]}),
]


@pytest.mark.parametrize(("family", "more"), HARMLESS)
def test_what_changes_nothing_is_ignored(directory, family, more):
    path = directory(family, tokenizer={"tokenizer_class": "PreTrainedTokenizerFast"}, **more)
    spec = model_config.load_spec(path)
    if "rope_theta" not in more:
        assert spec == factories.spec(family)
    assert model_config.unread_keys(model_config.load_config(path)) == []


def test_set_keys_that_nothing_reads_are_listed(directory):
    path = directory("llama", rope_interleaved=True, nothing=None, off=False, hidden_size=48)
    assert model_config.load_spec(path) == factories.spec("llama")
    assert model_config.unread_keys(model_config.load_config(path)) == ["rope_interleaved"]
    path = directory("gemma3", text_config={"more": [3]})
    assert model_config.load_spec(path) == factories.spec()
    assert model_config.unread_keys(model_config.load_config(path)) == ["text_config.more"]


@pytest.mark.parametrize("model_type", registry.MODEL_TYPES)
def test_every_key_of_transformers_classes_is_classified(model_type):
    """A release that gives a class one more field has it looked at, not ignored."""
    family = registry.MODEL_TYPES[model_type]
    checked_against_its_default = {"chunk_size_feed_forward", "is_encoder_decoder"}
    *_, text = family.CONFIGS[model_type]
    keys = {key for key in vars(text()) if not model_config._is_harmless(key)}
    assert keys - family.KEYS == checked_against_its_default


def test_what_transformers_reads_of_any_config_is_classified():
    """Looks for `getattr(config, "key", default)` in the code that every model runs through.

    In the configs' own classes it is `getattr(self, ...)`, `hasattr(self, ...)`, or an argument.
    """
    other = {  # of other kinds of models, of calls, or of how a program runs
        *("head_dim", "hidden_size", "num_attention_heads", "num_key_value_heads", "sep_token_id"),
        *("vocab_size", "rope_parameters", "max_position_embeddings", "backbone_config"),
        *("number_of_conv_states", "mtp_layer_types", "mlp_layer_types", "mtp_mlp_layer_types"),
        *("num_mtp_layers", "mtp_per_layer_config", "qk_head_dim", "tie_last_hidden_states"),
        *("text_config", "compile_config", "transformers_weights", "fusion_config", "dtype"),
        *("distributed_config", "initializer_range", "tie_word_embeddings", "_attn_implementation"),
        *("_experts_implementation", "gradient_checkpointing", "return_dict", "output_attentions"),
        *("output_hidden_states", "quantization_config", "_eos_token_tensor", "_mask_length"),
        *("num_heads", "embed_dim", "num_hidden_layers", "validate", "num_labels"),
        # of how a file is found or written
        *("commit_message", "repo_id", "token", "revision", "local_files_only", "cache_dir"),
        *("force_download", "proxies", "trust_remote_code", "subfolder", "gguf_file"),
        "return_unused_kwargs",
    }
    shared = ("masking_utils", "cache_utils", "modeling_utils", "modeling_rope_utils")
    families = ("gemma3", "llama", "qwen2", "qwen3")
    files = [TRANSFORMERS / f"{name}.py" for name in (*shared, "configuration_utils")]
    files += [TRANSFORMERS / "generation/utils.py"]
    files += [TRANSFORMERS / f"models/{name}/modeling_{name}.py" for name in families]
    classes = [TRANSFORMERS / f"models/{name}/configuration_{name}.py" for name in families]
    classes += [TRANSFORMERS / "configuration_utils.py", TRANSFORMERS / "modeling_rope_utils.py"]
    of_self = r'(?:(?:get|has)attr\(self, |kwargs\.(?:get|pop)\()"(\w+)"'
    found = {
        key
        for pattern, sources in ((r'getattr\([\w.]*config, "(\w+)"', files), (of_self, classes))
        for file in sources
        for key in re.findall(pattern, file.read_text())
    }
    assert {"is_causal", "sliding_window", "attention_chunk_size"} <= found
    assert {"original_max_position_embeddings", "rope_local_base_freq"} <= found
    read = {key for family in registry.MODEL_TYPES.values() for key in family.KEYS}
    unknown = found - other - set(model_config._READ_ANYWAY) - read
    assert {key for key in unknown if not model_config._is_harmless(key)} == set()


ODD = [True, -1, 0, 2.5, "x", [], {}, [3], {"a": 1}, 10**30, 10**400, None]
ODD += [float("inf"), float("nan"), 1e39, 1e-39]


@pytest.mark.parametrize("model_type", registry.MODEL_TYPES)
def test_odd_values_of_any_key_are_the_users_error_in_one_line(tmp_path, model_type):
    family = registry.MODEL_TYPES[model_type]
    sound = factories.config(family.__name__.rpartition(".")[2]).to_dict()
    path, rope = tmp_path / "config.json", factories.LLAMA3_ROPE
    keys = family.KEYS | {"architectures", "dtype", "id2label", "per_layer_config", "text_config"}
    changes = [(key, {key: value}) for key in sorted(keys) for value in ODD]
    changes += [(key, {"rope_scaling": rope | {key: value}}) for key in rope for value in ODD]
    for key, changed in changes:
        config = sound | changed
        if model_type == "gemma3":
            config = {"model_type": "gemma3", "text_config": config}
        path.write_text(json.dumps(config))
        try:
            spec = model_config.load_spec(tmp_path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error) and key in str(error)
        else:
            assert spec.width in (48, 64) and spec.num_layers == 3, changed
