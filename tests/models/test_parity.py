"""The decoder against torch in float32, for every family; wrong on purpose, it must fail."""

import dataclasses
import functools
import json
import pathlib

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
    TOLERANCE,
    decoder_logits,
    distance,
    pair,
    rows,
    torch_logits,
)

LONG = 2500
LONG_TOLERANCE = 3e-4  # torch's own distance from float64 there
ODD = {"head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 45}
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": [GLOBAL, LOCAL, LOCAL],
    "max_window_layers": 1,
}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}
LLAMA3 = {"rope_parameters": factories.LLAMA3_ROPE}
SILU_FAMILIES = ("llama", "qwen2", "qwen3")

# Family, what a case changes in `factories.config`, and how long its rows are.
CASES = {
    "gemma3": ("gemma3", {}, 24),
    "gemma3, window longer than the sequence": ("gemma3", {"sliding_window": 64}, 24),
    "gemma3, window a little shorter": ("gemma3", {"sliding_window": 13}, 24),
    "gemma3, window of one": ("gemma3", {"sliding_window": 1}, 24),
    "gemma3, linear rope": ("gemma3", {"rope_parameters": factories.rope_parameters(8.0)}, 24),
    "gemma3, final softcap": ("gemma3", {"final_logit_softcapping": 1.5}, 24),
    "gemma3, odd heads": ("gemma3", ODD, 24),
    "gemma3, all global": ("gemma3", {"layer_types": [GLOBAL] * 3}, 24),
    "gemma3, all local": ("gemma3", {"layer_types": [LOCAL] * 3}, 24),
    "gemma3, one layer": ("gemma3", {"layer_types": [LOCAL], "num_hidden_layers": 1}, 24),
    "gemma3, untied": ("gemma3", {"tie_word_embeddings": False}, 24),
    "gemma3, larger eps": ("gemma3", {"rms_norm_eps": 0.1}, 24),
    "gemma3, 2,500 tokens": (
        "gemma3",
        {"sliding_window": 512, "rope_parameters": factories.rope_parameters(8.0)},
        LONG,
    ),
    "qwen3": ("qwen3", {}, 24),
    "qwen3, window": ("qwen3", SLIDING, 24),
    "qwen3, linear rope": ("qwen3", LINEAR, 24),
    "qwen3, odd heads": ("qwen3", ODD, 24),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False}, 24),
    "qwen3, 2,500 tokens": ("qwen3", {}, LONG),
    "qwen2": ("qwen2", {}, 24),
    "qwen2, window": ("qwen2", SLIDING, 24),
    "qwen2, linear rope": ("qwen2", LINEAR, 24),
    "qwen2, odd heads": ("qwen2", ODD, 24),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False}, 24),
    "qwen2, 2,500 tokens": ("qwen2", {}, LONG),
    "llama": ("llama", {}, 24),
    "llama, llama3 rope": ("llama", LLAMA3, 24),
    "llama, linear rope": ("llama", LINEAR, 24),
    "llama, odd heads": ("llama", ODD, 24),
    "llama, untied": ("llama", {"tie_word_embeddings": False}, 24),
    **{f"{family}, swish": (family, {"hidden_act": "swish"}, 24) for family in SILU_FAMILIES},
    "llama, 2,500 tokens": ("llama", LLAMA3, LONG),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(case) -> (torch model, decoder, params), both of the same weights on disk."""

    @functools.cache
    def models(case):
        family, overrides, _ = CASES[case]
        return pair(tmp_path_factory.mktemp("model"), family, **overrides)

    return models


def batch(case: str, side: str) -> tuple[np.ndarray, np.ndarray]:
    length = CASES[case][2]
    lengths = (length - 300,) if length == LONG else (length, length - 3, length // 2)
    return rows(length, lengths, side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_torch(load, case, side):
    model, decoder, params = load(case)
    tokens_BT, mask_BT = batch(case, side)
    wanted = torch_logits(model, tokens_BT, mask_BT)
    if case != "gemma3, final softcap":
        assert 0.7 < wanted[mask_BT].std() < 1.5  # otherwise the tolerance means nothing
    got = decoder_logits(decoder, params, tokens_BT, mask_BT)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()  # padding too
    tolerance = LONG_TOLERANCE if CASES[case][2] == LONG else TOLERANCE
    assert distance(got, wanted, mask_BT) <= tolerance


@pytest.mark.parametrize("form", ["old", "new"])
@pytest.mark.parametrize("family", SILU_FAMILIES)
def test_a_length_beside_the_rope_object_is_the_one_that_counts(tmp_path, family, form):
    factories.model_dir(tmp_path, family=family, **LLAMA3)
    path: pathlib.Path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"original_max_position_embeddings": 16}
    if form == "old":
        config["rope_scaling"] = config.pop("rope_parameters")
        config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
    path.write_text(json.dumps(config))
    decoder, params = hf_load.load_pretrained(tmp_path)
    wanted = checkpoints.torch_logits(checkpoints.load_torch(tmp_path))
    assert np.abs(checkpoints.logits(decoder, params) - wanted).max() <= TOLERANCE
    assert decoder.spec.rope_global.llama3.original_length == 16


SCALED = "gemma3, linear rope"
SCALED_LLAMA = "llama, llama3 rope"
WRONG = {
    "window one too long": ("gemma3", {"window": 6}),
    "window one too short": ("gemma3", {"window": 4}),
    "head_dim as the query scale": ("gemma3", {"query_scale": 16**-0.5}),
    "norm without its offset": ("gemma3", {"norm_offset": 0.0}),
    "embedding unscaled": ("gemma3", {"embedding_scale": 1.0}),
    "local and global exchanged": ("gemma3", {"is_global_L": (True, False, True)}),
    "global layers at the local theta": ("gemma3", {"rope_global": RopeSpec(1e4)}),
    "rope scaling missing": (SCALED, {"rope_global": RopeSpec(1e6)}),
    "rope scaling on local layers too": (SCALED, {"rope_local": RopeSpec(1e4, 8.0)}),
    "softcap missing": ("gemma3, final softcap", {"final_softcap": None}),
    "eps of another family": ("gemma3, larger eps", {"norm_eps": 1e-6}),
    "qwen3: window one too long": ("qwen3, window", {"window": 8}),
    "qwen3: no norm of queries and keys": ("qwen3", {"qk_norm": False}),
    "qwen3: norm with Gemma's offset": ("qwen3", {"norm_offset": 1.0}),
    "qwen3: wrong scale": ("qwen3", {"query_scale": 48**-0.5}),
    "qwen3: rope scaling missing": ("qwen3, linear rope", {"rope_global": RopeSpec(1e6)}),
    "qwen2: no bias": ("qwen2", {"qkv_bias": False}),
    "qwen2: window one too short": ("qwen2, window", {"window": 6}),
    "llama: rope scaling missing": (SCALED_LLAMA, {"rope_global": RopeSpec(5e5)}),
    "llama: linear rope scaling": (SCALED_LLAMA, {"rope_global": RopeSpec(5e5, 8.0)}),
    "llama: frequencies cut elsewhere": (
        SCALED_LLAMA,
        {"rope_global": RopeSpec(5e5, llama3=Llama3Scaling(8.0, 1.0, 4.0, 128))},
    ),
    "llama: wrong activation": ("llama", {"activation": "gelu_tanh"}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_catches(load, wrong):
    case, changed = WRONG[wrong]
    model, decoder, params = load(case)
    spec = dataclasses.replace(decoder.spec, **changed)
    assert spec != decoder.spec
    tokens_BT, mask_BT = batch(case, "left")
    got = decoder_logits(Decoder(spec), params, tokens_BT, mask_BT)
    assert distance(got, torch_logits(model, tokens_BT, mask_BT), mask_BT) > 1000 * TOLERANCE


def test_the_comparison_catches_a_window_that_is_off_by_one_at_2500_tokens(load):
    case = "gemma3, 2,500 tokens"
    model, decoder, params = load(case)
    wrong = Decoder(dataclasses.replace(decoder.spec, window=513))
    tokens_BT, mask_BT = batch(case, "left")
    got = decoder_logits(wrong, params, tokens_BT, mask_BT)
    assert distance(got, torch_logits(model, tokens_BT, mask_BT), mask_BT) > 10 * LONG_TOLERANCE
