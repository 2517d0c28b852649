"""config.json as published, of every size of the families: the right spec and parameter count."""

import json
import math

import pytest
import transformers

from gkdjax.models.decoder_config import Llama3Scaling, RopeSpec, param_shapes
from gkdjax.models.hf import model_config

GEMMA_TEXT = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "vocab_size": 262144,
}
QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
UNTIED = {"tie_word_embeddings": False}


def sizes(width: int, ffn: int, layers: int, heads: int | None = None, **more) -> dict:
    fields = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers, **more}
    return fields if heads is None else fields | {"num_attention_heads": heads}


def gemma_4b_up(width: int, ffn: int, layers: int, heads: int | None = None, **more) -> dict:
    """The published files say of the text decoder only what differs from the library's defaults."""
    text = sizes(width, ffn, layers, heads, model_type="gemma3_text", sliding_window=1024, **more)
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": text | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }


def llama_scaling(factor: float, key: str = "rope_type") -> dict:
    fields = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, key: "llama3"}
    return {"rope_scaling": fields | {"factor": factor, "original_max_position_embeddings": 8192}}


# Name -> (config.json, parameters of the text decoder).
PUBLISHED = {
    "gemma-3-270m": (GEMMA_TEXT | sizes(640, 2048, 18, _sliding_window_pattern=6), 268_098_176),
    "gemma-3-1b": (GEMMA_TEXT | sizes(1152, 6912, 26, sliding_window_pattern=6), 999_885_952),
    "gemma-3-4b": (gemma_4b_up(2560, 10240, 34), 3_880_263_168),
    "gemma-3-12b": (gemma_4b_up(3840, 15360, 48, 16, num_key_value_heads=8), 11_766_034_176),
    "gemma-3-27b": (
        gemma_4b_up(
            *(5376, 21504, 62, 32), num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168
        ),
        27_009_346_304,
    ),
    "qwen3-0.6b": (QWEN | sizes(1024, 3072, 28, 16), 596_049_920),
    "qwen3-1.7b": (QWEN | sizes(2048, 6144, 28, 16), 1_720_574_976),
    "qwen3-4b": (QWEN | sizes(2560, 9728, 36, 32), 4_022_468_096),
    "qwen3-8b": (QWEN | sizes(4096, 12288, 36, 32) | UNTIED, 8_190_735_360),
    "qwen3-14b": (QWEN | sizes(5120, 17408, 40, 40) | UNTIED, 14_768_307_200),
    "qwen3-32b": (QWEN | sizes(5120, 25600, 64, 64) | UNTIED, 32_762_123_264),
    "llama-3.2-1b": (
        LLAMA | sizes(2048, 8192, 16, 32, head_dim=64, **llama_scaling(32.0)),
        1_235_814_400,
    ),
    "llama-3.2-3b": (
        LLAMA | sizes(3072, 8192, 28, 24, head_dim=128, **llama_scaling(32.0)),
        3_212_749_824,
    ),
    "llama-3.1-8b": (
        LLAMA | sizes(4096, 14336, 32, 32, **llama_scaling(8.0)) | UNTIED,
        8_030_261_248,
    ),
}


@pytest.fixture
def spec_of(tmp_path):
    def load(config: dict):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model_config.load_spec(tmp_path)

    return load


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_size_has_its_parameters(spec_of, model):
    config, wanted = PUBLISHED[model]
    spec = spec_of(config)
    assert sum(math.prod(shape) for shape in param_shapes(spec).values()) == wanted
    assert spec.tied_embedding == (config.get("tie_word_embeddings") is not False)


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_form_that_transformers_writes_today_gives_the_same_spec(spec_of, model):
    old, _ = PUBLISHED[model]
    kind = dict(old)
    made = transformers.CONFIG_MAPPING[kind.pop("model_type")].from_dict(kind)
    new = json.loads(made.to_json_string(use_diff=False))
    text = new.get("text_config") or new
    assert "rope_parameters" in text and "rope_theta" not in text
    assert spec_of(new) == spec_of(old)


@pytest.mark.parametrize(
    ("model", "global_layers"),
    [("270m", 3), ("1b", 4), ("4b", 5), ("12b", 8), ("27b", 10)],
)
def test_gemma_windows_and_scales(spec_of, model, global_layers):
    spec = spec_of(PUBLISHED[f"gemma-3-{model}"][0])
    multimodal = model not in ("270m", "1b")
    assert sum(spec.is_global_L) == global_layers
    assert spec.is_global_L[:6] == (False,) * 5 + (True,)
    assert spec.window == (1024 if multimodal else 512)
    assert spec.vocab_size == (262208 if multimodal else 262144)
    assert spec.rope_local == RopeSpec(1e4)
    assert spec.rope_global == RopeSpec(1e6, linear_factor=8.0 if multimodal else 1.0)
    assert spec.query_scale == (168 if model == "27b" else 256) ** -0.5
    assert spec.head_dim == (128 if model == "27b" else 256)
    assert spec.embedding_scale == spec.width**0.5 and spec.norm_offset == 1.0


@pytest.mark.parametrize("window", [None, 4096])
def test_a_window_that_qwen_does_not_use_is_none(spec_of, window):
    spec = spec_of(PUBLISHED["qwen3-8b"][0] | {"sliding_window": window})
    assert (spec.window, all(spec.is_global_L)) == (None, True)
    assert spec.rope_global == RopeSpec(1e6) and spec.qk_norm


def test_a_window_that_qwen_uses_starts_where_it_says(spec_of):
    used = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}
    spec = spec_of(PUBLISHED["qwen3-8b"][0] | used)
    assert (spec.window, spec.is_global_L) == (4096, (True,) * 28 + (False,) * 8)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize(("model", "factor"), [("3.2-1b", 32.0), ("3.1-8b", 8.0)])
def test_llama_scaling_in_both_spellings(spec_of, model, factor, key):
    config = PUBLISHED[f"llama-{model}"][0] | llama_scaling(factor, key)
    spec = spec_of(config)
    assert spec.rope_global == RopeSpec(5e5, llama3=Llama3Scaling(factor, 1.0, 4.0, 8192))
    assert spec.head_dim == (128 if model == "3.1-8b" else 64)
    assert spec.query_scale == spec.head_dim**-0.5


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("gemma-3-270m", 32768),
        ("gemma-3-4b", 131072),
        ("qwen3-8b", 40960),
        ("llama-3.1-8b", 131072),
    ],
)
def test_what_a_model_can_read_is_its_configs(spec_of, model, wanted):
    """Of a multimodal model it stands with the text decoder, or is left to transformers."""
    config = PUBLISHED[model][0]
    assert spec_of(config).context_length == wanted
    inner = config.get("text_config")
    shorter = {"max_position_embeddings": 77}
    changed = shorter if inner is None else {"text_config": inner | shorter}
    assert spec_of(config | changed).context_length == 77
