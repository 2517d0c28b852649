"""What config.json says that no weights need to be read for: models that are refused, and why."""

import json

import factories
import pytest

from gkdjax.models.hf import model_config
from gkdjax.utils.errors import UserError

SUPPORTED = "gemma3, gemma3_text, llama, qwen2, qwen3"
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
OWN_CODE = {"AutoModelForCausalLM": "modeling.Model"}


@pytest.fixture
def directory(tmp_path):
    """Writes fields over those of a sound config.json, and into tokenizer_config.json."""

    def write(changed: dict, family: str = "llama", tokenizer: dict | None = None):
        config = factories.config(family).to_dict()
        for file, fields in {"config": config | changed, "tokenizer_config": tokenizer}.items():
            if fields is not None:
                (tmp_path / f"{file}.json").write_text(json.dumps(fields))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"model_type": "mamba"}, rf"model_type 'mamba' is not supported; supported: {SUPPORTED}$"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'"),
        ({"architectures": ["LlamaModel"]}, rf"'LlamaModel' .* of model_type {SUPPORTED} is"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "'Gemma3ForConditionalGeneration'"),
        (GPTQ, r"quantised \(quantization_config\.quant_method 'gptq'\)"),
        ({"text_config": GPTQ}, "quant_method 'gptq'"),
        ({"compression_config": {"quant_method": "x"}}, r"compression_config\.quant_method 'x'"),
        ({"architectures": 3}, r"architectures = 3 must be a list of names"),
        ({"quantization": {"bits": 4}}, r"quantised by MLX \(quantization = .*--dequantize"),
        ({"architectures": "LlamaModel"}, "'LlamaModel' is not supported"),
        ({"auto_map": OWN_CODE}, r"config\.json: auto_map .* code from a checkpoint is never run"),
    ],
)
def test_what_is_not_supported_is_named(directory, changed, wanted):
    with pytest.raises(UserError, match=wanted) as caught:
        model_config.load_config(directory(changed))
    assert str(directory(changed) / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads = 0 must be a whole number above 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 must be a multiple of .* = 3"),
        ({"head_dim": 15}, "even rotary dimension"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide' must be a whole number above 0"),
        ({"mlp_bias": 3}, "'mlp_bias': TypeError: .* expected bool, got int"),  # one line
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "config.json: "),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
            "the rope factor must be positive, not 0",
        ),
    ],
)
def test_numbers_that_cannot_be_are_an_error_of_the_users(directory, changed, wanted):
    with pytest.raises(UserError, match=wanted):
        model_config.load_spec(directory(changed))


def test_code_for_the_tokenizer_is_refused_too(directory):
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}}
    with pytest.raises(UserError, match=r"tokenizer_config\.json: auto_map"):
        model_config.load_config(directory({}, tokenizer=tokenizer))


def test_a_damaged_tokenizer_config_is_named(directory):
    made = directory({})
    (made / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json does not parse"):
        model_config.load_config(made)


@pytest.mark.parametrize("text", ['{"model_type": "ll', "[" * 100_000, f'{{"a": {"9" * 5000}}}'])
def test_a_config_that_does_not_parse_is_named(directory, text):
    made = directory({})
    (made / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json does not parse: .*") as caught:
        model_config.load_spec(made)
    assert "sys." not in str(caught.value)  # a remedy for who writes the program


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("llama", {"architectures": ["LlamaForCausalLM"]}),
        ("llama", {"architectures": None}),
        ("llama", {"quantization_config": None, "auto_map": {}}),
        ("gemma3", {"architectures": ["Gemma3ForCausalLM"]}),
    ],
)
def test_what_is_supported_passes(directory, family, changed):
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert model_config.load_spec(directory(changed, family, tokenizer)) == factories.spec(family)
