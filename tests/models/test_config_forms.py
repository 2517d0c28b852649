"""What each family's module makes of a config.json: old and new forms, and what it refuses."""

import factories
import pytest

from gkdjax.models.decoder_config import Llama3Scaling, RopeSpec
from gkdjax.models.families import gemma3, registry
from tests.models.model_cases import GLOBAL, LOCAL

NEW_FORM = {
    "model_type": "gemma3_text",
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
}
OLD_FORM = NEW_FORM | {
    "rope_theta": 5e5,
    "rope_local_base_freq": 2e4,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "sliding_window_pattern": 3,
}


def test_old_and_new_config_forms_give_one_spec():
    new = NEW_FORM | {
        "rope_parameters": {
            GLOBAL: {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
            LOCAL: {"rope_theta": 2e4, "rope_type": "default"},
        },
        "layer_types": [GLOBAL if (i + 1) % 3 == 0 else LOCAL for i in range(8)],
    }
    spec = gemma3.decoder_spec(new)
    assert spec == gemma3.decoder_spec(OLD_FORM)
    assert spec.rope_global == RopeSpec(5e5, 4.0)
    assert spec.rope_local == RopeSpec(2e4)
    assert spec.is_global_L == (False, False, True) * 2 + (False, False)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"hidden_activation": "relu"}, "relu"),
        ({"layer_types": [LOCAL] * 7 + ["chunked_attention"]}, "chunked_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ],
)
def test_a_config_that_the_decoder_does_not_compute_is_refused(changed, named):
    with pytest.raises(ValueError, match=named):
        gemma3.decoder_spec(OLD_FORM | changed)


LLAMA3_SCALING = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_llama_3_scaling_in_its_old_form(spelling):
    old = {
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3_SCALING | {spelling: "llama3"},
    }
    rope = registry.MODEL_TYPES["llama"].decoder_spec(old).rope_global
    assert rope == RopeSpec(5e5, llama3=Llama3Scaling(32.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize(
    ("family", "changed", "named"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"hidden_act": "relu"}, "relu"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("qwen3", {"layer_types": [GLOBAL, LOCAL, "chunked_attention"]}, "chunked_attention"),
        ("qwen2", {"hidden_act": "relu"}, "relu"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("qwen2", {"rope_parameters": {"rope_type": "mrope"}}, "rope_type 'mrope' is not"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
    ],
)
def test_what_a_family_does_not_compute_is_refused(family, changed, named):
    given = factories.config(family).to_dict() | changed
    if "rope_parameters" in changed:
        given["rope_parameters"] = {"rope_theta": 1e4} | changed["rope_parameters"]
    with pytest.raises(ValueError, match=named):
        registry.MODEL_TYPES[family].decoder_spec(given)


def test_a_window_that_is_switched_off_is_none():
    given = factories.config("qwen3").to_dict()
    given |= {"use_sliding_window": False, "sliding_window": 7, "layer_types": None}
    spec = registry.MODEL_TYPES["qwen3"].decoder_spec(given)
    assert spec.is_global_L == (True, True, True)
    assert spec.window is None
