"""The numbers of published models (config.json without what is at its default), and refusals."""

import json
import math

import factories
import pytest
import transformers

from gkdjax.models.decoder_config import Llama3Scaling, RopeSpec, param_shapes
from gkdjax.models.families import registry
from gkdjax.models.hf import model_config
from tests.models.model_cases import GLOBAL, LOCAL

GEMMA_TEXT = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "vocab_size": 262144,
}
QWEN = {
    "model_type": "qwen3",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA = {
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
UNTIED = {"tie_word_embeddings": False}


def sizes(width: int, ffn: int, layers: int, heads: int | None = None, **more) -> dict:
    fields = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers, **more}
    return fields if heads is None else fields | {"num_attention_heads": heads}


def gemma_4b_up(*numbers: int, **more) -> dict:
    """The published files say of the text decoder only what differs from the library's defaults."""
    text = sizes(*numbers, model_type="gemma3_text", sliding_window=1024, **more)
    return {
        "model_type": "gemma3",
        "text_config": text | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }


def llama_scaling(factor: float, key: str = "rope_type") -> dict:
    fields = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, key: "llama3"}
    return {"rope_scaling": fields | {"factor": factor, "original_max_position_embeddings": 8192}}


LLAMA_32, LLAMA_31 = LLAMA | llama_scaling(32.0), LLAMA | UNTIED | llama_scaling(8.0, "type")
OF_27B = {"num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168}
# Name -> (config.json, parameters of the text decoder).
PUBLISHED = {
    "gemma-3-270m": (GEMMA_TEXT | sizes(640, 2048, 18, _sliding_window_pattern=6), 268_098_176),
    "gemma-3-1b": (GEMMA_TEXT | sizes(1152, 6912, 26, sliding_window_pattern=6), 999_885_952),
    "gemma-3-4b": (gemma_4b_up(2560, 10240, 34), 3_880_263_168),
    "gemma-3-27b": (gemma_4b_up(5376, 21504, 62, 32, **OF_27B), 27_009_346_304),
    "qwen3-0.6b": (QWEN | sizes(1024, 3072, 28, 16), 596_049_920),
    "qwen3-8b": (QWEN | sizes(4096, 12288, 36, 32) | UNTIED, 8_190_735_360),
    "qwen3-32b": (QWEN | sizes(5120, 25600, 64, 64) | UNTIED, 32_762_123_264),
    "llama-3.2-1b": (LLAMA_32 | sizes(2048, 8192, 16, 32, head_dim=64), 1_235_814_400),
    "llama-3.1-8b": (LLAMA_31 | sizes(4096, 14336, 32, 32), 8_030_261_248),
}


@pytest.fixture
def spec_of(tmp_path):
    def load(config: dict):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model_config.load_spec(tmp_path)

    return load


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs_and_the_form_that_transformers_writes_today(spec_of, model):
    old, parameters = PUBLISHED[model]
    spec = spec_of(old)
    assert sum(math.prod(shape) for shape in param_shapes(spec).values()) == parameters
    assert spec.tied_embedding == (old.get("tie_word_embeddings") is not False)
    assert spec.context_length == old.get("max_position_embeddings", 131_072)
    shorter, inner = {"max_position_embeddings": 77}, old.get("text_config")
    changed = shorter if inner is None else {"text_config": inner | shorter}
    assert spec_of(old | changed).context_length == 77
    kind = dict(old)
    made = transformers.CONFIG_MAPPING[kind.pop("model_type")].from_dict(kind)
    new = json.loads(made.to_json_string(use_diff=False))
    text = new.get("text_config") or new
    assert "rope_parameters" in text and "rope_theta" not in text
    assert spec_of(new) == spec


@pytest.mark.parametrize(
    ("model", "global_layers", "window", "scalar"),
    [("270m", 3, 512, 256), ("1b", 4, 512, 256), ("4b", 5, 1024, 256), ("27b", 10, 1024, 168)],
)
def test_gemma_windows_and_scales(spec_of, model, global_layers, window, scalar):
    spec = spec_of(PUBLISHED[f"gemma-3-{model}"][0])
    assert (sum(spec.is_global_L), spec.window) == (global_layers, window)
    assert spec.is_global_L[:6] == (False,) * 5 + (True,)
    assert spec.vocab_size == (262208 if window == 1024 else 262144)
    assert spec.rope_local == RopeSpec(1e4)
    assert spec.rope_global == RopeSpec(1e6, linear_factor=8.0 if window == 1024 else 1.0)
    assert (spec.query_scale, spec.head_dim) == (scalar**-0.5, 128 if model == "27b" else 256)
    assert (spec.embedding_scale, spec.norm_offset) == (spec.width**0.5, 1.0)


def test_llama_scaling_in_both_spellings(spec_of):
    for model, factor, C in (("3.2-1b", 32.0, 64), ("3.1-8b", 8.0, 128)):
        spec = spec_of(PUBLISHED[f"llama-{model}"][0])
        assert spec.rope_global == RopeSpec(5e5, llama3=Llama3Scaling(factor, 1.0, 4.0, 8192))
        assert (spec.head_dim, spec.query_scale) == (C, C**-0.5)


def test_a_window_of_qwen_that_is_used_and_that_is_not(spec_of):
    for changed in ({}, {"sliding_window": 7}, {"sliding_window": 7, "layer_types": None}):
        spec = spec_of(PUBLISHED["qwen3-8b"][0] | changed)
        assert (spec.window, spec.is_global_L) == (None, (True,) * 36)
        assert spec.rope_global == RopeSpec(1e6) and spec.qk_norm
    used = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}
    spec = spec_of(PUBLISHED["qwen3-8b"][0] | used)
    assert (spec.window, spec.is_global_L) == (4096, (True,) * 28 + (False,) * 8)


@pytest.mark.parametrize(
    ("family", "changed", "named"),
    [
        ("gemma3", {"attention_bias": True}, "attention_bias"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"hidden_activation": "relu"}, "relu"),
        ("gemma3", {"layer_types": [LOCAL] * 17 + ["chunked_attention"]}, "chunked_attention"),
        ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (
            *("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
            "partial_rotary_factor=0.5",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"hidden_act": "relu"}, "relu"),
        ("qwen3", {"layer_types": [GLOBAL, LOCAL, "chunked_attention"]}, "chunked_attention"),
        ("qwen2", {"hidden_act": "relu"}, "relu"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("qwen2", {"rope_parameters": {"rope_type": "mrope"}}, "rope_type 'mrope' is not"),
    ],
)
def test_what_a_family_does_not_compute_is_refused(family, changed, named):
    old = PUBLISHED["gemma-3-270m"][0]
    given = (old if family == "gemma3" else factories.config(family).to_dict()) | changed
    if "rope_parameters" in changed:
        given["rope_parameters"] = {"rope_theta": 1e4} | changed["rope_parameters"]
    with pytest.raises(ValueError, match=named):
        registry.MODEL_TYPES[given["model_type"]].decoder_spec(given)
