"""The decoder against torch in float32, for every family; wrong on purpose, it must fail."""

import dataclasses
import json

import checkpoints
import factories
import numpy as np
import pytest

from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import Llama3Scaling, RopeSpec
from gkdjax.models.hf import load as hf_load
from tests.models.model_cases import (
    GLOBAL,
    LOCAL,
    SLIDING,
    TOLERANCE,
    decoder_logits,
    distance,
    pairs_of,
    rows,
    torch_logits,
)

LONG_TOLERANCE = 3e-4  # at 2,500 tokens: torch's own distance from float64 there
ODD = {"head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 45}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}
LLAMA3 = {"rope_parameters": factories.LLAMA3_ROPE}
GEMMA_LINEAR = {"rope_parameters": factories.rope_parameters(8.0)}
UNTIED = {"tie_word_embeddings": False}
SWISH = {"hidden_act": "swish"}

# Name -> family, and what the case changes in `factories.config`: each option at least once.
CASES = {
    "gemma3": ("gemma3", {}),
    "gemma3, long window, softcap": (
        "gemma3",
        {"sliding_window": 64, "final_logit_softcapping": 1.5},
    ),
    "gemma3, window a little shorter, odd heads": ("gemma3", ODD | {"sliding_window": 13}),
    "gemma3, all local, window of one": (
        "gemma3",
        {"layer_types": [LOCAL] * 3, "sliding_window": 1},
    ),
    "gemma3, linear rope, large eps": ("gemma3", GEMMA_LINEAR | {"rms_norm_eps": 0.1}),
    "gemma3, all global, untied": ("gemma3", UNTIED | {"layer_types": [GLOBAL] * 3}),
    "gemma3, one layer": ("gemma3", {"layer_types": [LOCAL], "num_hidden_layers": 1}),
    "gemma3, 2,500 tokens": ("gemma3", GEMMA_LINEAR | {"sliding_window": 512}),
    "qwen3": ("qwen3", {}),
    "qwen3, window, untied": ("qwen3", SLIDING | UNTIED),
    "qwen3, linear rope, odd heads, swish": ("qwen3", LINEAR | ODD | SWISH),
    "qwen2": ("qwen2", {}),
    "qwen2, window, untied": ("qwen2", SLIDING | UNTIED),
    "qwen2, linear rope, odd heads, swish": ("qwen2", LINEAR | ODD | SWISH),
    "llama": ("llama", {}),
    "llama, llama3 rope, untied": ("llama", LLAMA3 | UNTIED),
    "llama, linear rope, odd heads, swish": ("llama", LINEAR | ODD | SWISH),
    "llama, 2,500 tokens": ("llama", LLAMA3),
}
load = pairs_of(CASES)


def batch(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the left and, in every other case, on the right."""
    side = ("left", "right")[list(CASES).index(case) % 2]
    return rows(2500, (2200,), side) if "2,500" in case else rows(24, (24, 21, 12), side)


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_torch(load, case):
    model, decoder, params = load(case)
    tokens_BT, mask_BT = batch(case)
    wanted = torch_logits(model, tokens_BT, mask_BT)
    if "softcap" not in case:
        assert 0.7 < wanted[mask_BT].std() < 1.5  # otherwise the tolerance means nothing
    got = decoder_logits(decoder, params, tokens_BT, mask_BT)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()  # padding too
    assert distance(got, wanted, mask_BT) <= (LONG_TOLERANCE if "2,500" in case else TOLERANCE)


@pytest.mark.parametrize(("family", "old"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_a_length_beside_the_rope_object_is_the_one_that_counts(tmp_path, family, old):
    factories.model_dir(tmp_path, family=family, **LLAMA3)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"original_max_position_embeddings": 16}
    if old:
        config["rope_scaling"] = config.pop("rope_parameters")
        config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
    path.write_text(json.dumps(config))
    decoder, params = hf_load.load_pretrained(tmp_path)
    wanted = checkpoints.torch_logits(checkpoints.load_torch(tmp_path))
    assert np.abs(checkpoints.logits(decoder, params) - wanted).max() <= TOLERANCE
    assert decoder.spec.rope_global.llama3.original_length == 16


SCALED, LLAMA_SCALED = "gemma3, linear rope, large eps", "llama, llama3 rope, untied"
CUT_ELSEWHERE = RopeSpec(5e5, llama3=Llama3Scaling(8.0, 1.0, 4.0, 128))
WRONG = [
    ("gemma3", {"window": 6}),
    ("gemma3", {"window": 4}),
    ("gemma3", {"query_scale": 16**-0.5}),
    ("gemma3", {"norm_offset": 0.0}),
    ("gemma3", {"embedding_scale": 1.0}),
    ("gemma3", {"is_global_L": (True, False, True)}),
    ("gemma3", {"rope_global": RopeSpec(1e4)}),
    (SCALED, {"rope_global": RopeSpec(1e6)}),
    (SCALED, {"rope_local": RopeSpec(1e4, 8.0)}),
    (SCALED, {"norm_eps": 1e-6}),
    ("gemma3, long window, softcap", {"final_softcap": None}),
    ("gemma3, 2,500 tokens", {"window": 513}),
    ("qwen3, window, untied", {"window": 8}),
    ("qwen3", {"qk_norm": False}),
    ("qwen2", {"qkv_bias": False}),
    (LLAMA_SCALED, {"rope_global": RopeSpec(5e5, 8.0)}),
    (LLAMA_SCALED, {"rope_global": CUT_ELSEWHERE}),
    ("llama", {"activation": "gelu_tanh"}),
]


@pytest.mark.parametrize(("case", "changed"), WRONG)
def test_the_comparison_catches(load, case, changed):
    model, decoder, params = load(case)
    spec = dataclasses.replace(decoder.spec, **changed)
    assert spec != decoder.spec
    tokens_BT, mask_BT = batch(case)
    got = decoder_logits(Decoder(spec), params, tokens_BT, mask_BT)
    least = 10 * LONG_TOLERANCE if "2,500" in case else 1000 * TOLERANCE
    assert distance(got, torch_logits(model, tokens_BT, mask_BT), mask_BT) > least
