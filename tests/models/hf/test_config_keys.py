"""Keys of config.json: what would be computed otherwise is refused, junk is passed over."""

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


@pytest.fixture
def directory(tmp_path):
    """Writes a sound config.json of a family with fields changed, or of a multimodal one."""

    def write(family: str, **changed) -> pathlib.Path:
        config = factories.config(family).to_dict()
        if "text_config" in changed:
            config = {"model_type": "gemma3", "text_config": config | changed["text_config"]}
        else:
            config |= changed
        (tmp_path / "config.json").write_text(json.dumps(config))
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


def test_it_is_found_inside_of_a_multimodal_config_too(directory):
    with pytest.raises(UserError, match=r"text_config\.is_causal = False changes what"):
        model_config.load_spec(directory("gemma3", text_config={"is_causal": False}))
    path = directory("gemma3", text_config={})
    assert model_config.load_spec(path) == factories.spec()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(UserError, match=r"json: is_causal = False changes what"):
        model_config.load_spec(path)


@pytest.mark.parametrize("changed", [{"sliding_window": 7}, {"layer_types": ["sliding_attention"]}])
def test_a_window_that_only_the_cache_of_llama_has_is_refused(directory, changed):
    with pytest.raises(UserError, match=f"{next(iter(changed))} = "):
        model_config.load_spec(directory("llama", **changed))
    assert model_config.load_spec(
        directory("llama", sliding_window=4096, layer_types=["full_attention"] * 3)
    ) == factories.spec("llama")


@pytest.mark.parametrize("value", [False, None])
def test_what_is_refused_as_not_causal_is_not_causal_in_torch(value):
    model = factories.torch_model(family="llama")
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(model(long).logits[:, :3], model(short).logits, atol=1e-5)
        model.config.is_causal = value
        assert not torch.allclose(model(long).logits[:, :3], model(short).logits, atol=1e-2)


JUNK = {
    "_name_or_path": "somebody/some-model",
    "_attn_implementation_autoset": True,
    "unsloth_version": "2025.3.19",
    "unsloth_fixed": True,
    "transformers.js_config": {"dtype": "q4"},
    "transformers_version": "4.40.0",
    "architectures": None,
    "bos_token_id": [1, 2],
    "eos_token_id": [128001, 128008, 128009],
    "pad_token_id": -1,
    "decoder_start_token_id": None,
    "cache_implementation": "hybrid",
    "torch_dtype": "bfloat16",
    "torchscript": False,
    "temperature": 0.6,
    "top_k": 50,
    "do_sample": True,
    "use_cache": False,
    "initializer_range": 0.041666666666666664,
    "attention_dropout": 0.1,
    "pretraining_tp": 2,
    "is_llama_config": True,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "num_labels": 1,
    "pruned_heads": {},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "quantization_config": None,
    "is_causal": True,
    "per_layer_config": None,
    "logit_scale": 1.0,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing_is_passed_over(directory, family):
    path = directory(family, **JUNK)
    assert model_config.load_spec(path) == factories.spec(family)
    assert model_config.unread_keys(model_config.load_config(path)) == []


# What people's files hold beside the sizes, from several of them.
PUBLISHED = [
    # TinyLlama, Llama 2
    {"pretraining_tp": 1, "rope_scaling": None, "rope_theta": 1e4, "attention_bias": False},
    # SmolLM2
    {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
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


@pytest.mark.parametrize("more", PUBLISHED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_published_files_hold_is_not_refused(directory, family, more):
    path = directory(family, **more)
    assert model_config.load_spec(path).family == family
    assert model_config.unread_keys(model_config.load_config(path)) == []


def test_what_nobody_reads_is_told(directory):
    path = directory("llama", rope_interleaved=True, nothing=None, off=False, hidden_size=48)
    assert model_config.load_spec(path) == factories.spec("llama")
    assert model_config.unread_keys(model_config.load_config(path)) == ["rope_interleaved"]
    path = directory("gemma3", text_config={"more": [3]})
    assert model_config.unread_keys(model_config.load_config(path)) == ["text_config.more"]


@pytest.mark.parametrize("model_type", registry.MODEL_TYPES)
def test_every_key_of_transformers_classes_is_classified(model_type):
    """A release that gives a class one more field has it looked at, not passed over."""
    family = registry.MODEL_TYPES[model_type]
    checked_against_its_default = {"chunk_size_feed_forward", "is_encoder_decoder"}
    *_, text = family.CONFIGS[model_type]
    keys = {key for key in vars(text()) if not model_config._is_harmless(key)}
    assert keys - family.KEYS == checked_against_its_default


def test_what_transformers_reads_of_any_config_is_classified():
    """`getattr(config, "key", default)` in the code that every model runs through.

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
    }
    files = [TRANSFORMERS / f"{name}.py" for name in ("masking_utils", "cache_utils")]
    files += [TRANSFORMERS / f"{name}.py" for name in ("modeling_utils", "modeling_rope_utils")]
    files += [TRANSFORMERS / "configuration_utils.py", TRANSFORMERS / "generation/utils.py"]
    families_of = {"gemma3", "llama", "qwen2", "qwen3"}
    classes = [TRANSFORMERS / f"models/{name}/configuration_{name}.py" for name in families_of]
    classes += [TRANSFORMERS / "configuration_utils.py", TRANSFORMERS / "modeling_rope_utils.py"]
    files += [TRANSFORMERS / f"models/{name}/modeling_{name}.py" for name in families_of]
    found = {
        key
        for file in files
        for key in re.findall(r'getattr\([\w.]*config, "(\w+)"', file.read_text())
    }
    assert {"is_causal", "sliding_window", "attention_chunk_size"} <= found
    assert found <= other | set(model_config._READ_ANYWAY)
    of_self = r'(?:(?:get|has)attr\(self, |kwargs\.(?:get|pop)\()"(\w+)"'
    found = {key for file in classes for key in re.findall(of_self, file.read_text())}
    assert {"original_max_position_embeddings", "rope_local_base_freq"} <= found
    read = {key for family in registry.MODEL_TYPES.values() for key in family.KEYS}
    of_calls = {  # of how a file is found or written
        *("commit_message", "repo_id", "token", "revision", "local_files_only", "cache_dir"),
        *("force_download", "proxies", "trust_remote_code", "subfolder", "gguf_file"),
        "return_unused_kwargs",
    }
    unknown = found - other - set(model_config._READ_ANYWAY) - read - of_calls
    assert {key for key in unknown if not model_config._is_harmless(key)} == set()


ODD = [
    True,
    -1,
    0,
    2.5,
    "x",
    [],
    {},
    [3],
    {"a": 1},
    10**30,
    10**400,
    float("inf"),
    float("nan"),
    None,
]


@pytest.mark.parametrize("model_type", registry.MODEL_TYPES)
def test_odd_values_of_any_key_are_the_users_error_in_one_line(tmp_path, model_type):
    family = registry.MODEL_TYPES[model_type]
    sound = factories.config(family.__name__.rpartition(".")[2]).to_dict()
    path = tmp_path / "config.json"
    rope_keys = ("rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor")
    rope_of = {
        key: {"rope_scaling": {"type": "llama3", "factor": 2.0} | {key: None}} for key in rope_keys
    }
    for key in sorted(family.KEYS | {"architectures", "per_layer_config", "text_config", *rope_of}):
        for value in ODD:
            changed = {key: value}
            if key in rope_of and key not in family.KEYS:
                changed = {"rope_scaling": rope_of[key]["rope_scaling"] | changed}
            config = sound | changed
            if model_type == "gemma3":
                config = {"model_type": "gemma3", "text_config": config}
            path.write_text(json.dumps(config))
            try:
                spec = model_config.load_spec(tmp_path)
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error)
            else:
                assert spec.width == 48 or spec.width == 64
                assert spec.num_layers == 3, (key, value)
