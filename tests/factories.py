"""Tiny models and tokenizers for the tests, written to disk as Hugging Face directories.

`model_dir` is all that most tests need: random weights, norms included, at a scale where logits
have a standard deviation of about 1, so that a mistake in any part of the decoder shows in them.
"""

import pathlib

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families import registry

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCAB_SIZE = 128  # the tokenizer has fewer: checkpoints pad their embedding

# Gemma's habit: no system turn, the system message stands at the head of the first user turn.
CHAT_TEMPLATE = """\
{{ bos_token }}\
{%- set ns = namespace(head='', rest=messages) -%}\
{%- if messages[0]['role'] == 'system' -%}\
{%- set ns.head = messages[0]['content'] + '\n\n' -%}{%- set ns.rest = messages[1:] -%}\
{%- endif -%}\
{%- for m in ns.rest -%}\
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}\
{{ '<start_of_turn>' + role + '\n' + (ns.head if loop.first else '') + m['content'] | trim }}\
{{ '<end_of_turn>\n' }}\
{%- endfor -%}\
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

# Gemma 2's habit: a system message is refused.
CHAT_TEMPLATE_WITHOUT_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{ raise_exception('System role not supported') }}{%- endif -%}" + CHAT_TEMPLATE
)


def tokenizer(chat_template: str = CHAT_TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """One token per printable ASCII character, newline and Gemma's special tokens."""
    vocab = {token: i for i, token in enumerate((*SPECIALS, *CHARACTERS))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    made.chat_template = chat_template
    return made


# What differs from `config`'s shared fields, by family; a number never equals one beside it.
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_QWEN = {"hidden_act": "silu", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
FAMILIES = {
    "gemma3": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {"query_pre_attn_scalar": 24, "sliding_window": 5, "layer_types": _SLIDING},
    ),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, _QWEN),
    "qwen2": (
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        _QWEN | {"head_dim": None, "hidden_size": 64},
    ),
    "llama": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"hidden_act": "silu", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ),
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(family: str = "gemma3", **overrides) -> transformers.PretrainedConfig:
    """A tiny model in which every number that could be confused with another one differs."""
    cls, _, own = FAMILIES[family]
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "rope_parameters": rope_parameters(),
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
    }
    fields |= own | overrides
    return cls(**{name: value for name, value in fields.items() if value is not None})


def rope_parameters(factor: float | None = None) -> dict:
    """The new form of Gemma 3's rope fields; `factor` scales the global layers."""
    scaling = {"rope_type": "default"} if factor is None else {"rope_type": "linear"}
    if factor is not None:
        scaling["factor"] = factor
    return {
        "full_attention": {"rope_theta": 1e6, **scaling},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }


def spec(family: str = "gemma3", **overrides) -> DecoderConfig:
    """The decoder's numbers of `config(family, **overrides)`."""
    given = config(family, **overrides).to_dict()
    return registry.MODEL_TYPES[given["model_type"]].decoder_spec(given)


def torch_model(seed: int = 0, family: str = "gemma3", **overrides):
    """torch's model with random weights in float32; the oracle of the decoder's tests."""
    _, cls, _ = FAMILIES[family]
    made = cls(config(family, attn_implementation="eager", dtype="float32", **overrides))
    randomise(made, seed)
    return made.eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Kernels keep the scale of what passes; norms and biases get weights too, as a loader that
    forgets them, or a norm's offset, must be caught."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            std = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(std * torch.randn(weight.shape, generator=generator))
            if "norm" in name and not model.config.model_type.startswith("gemma3"):
                weight += 1.0  # Gemma adds the 1 itself


def model_dir(
    directory: str | pathlib.Path,
    seed: int = 0,
    dtype: str = "float32",
    family: str = "gemma3",
    chat_template: str = CHAT_TEMPLATE,
    **overrides,
) -> str:
    """Writes weights, config and tokenizer into `directory` -> its path as a string.

    `overrides` are fields of the family's `config`; the weights depend on `seed` and shapes alone.
    """
    made = torch_model(seed, family, **overrides).to(getattr(torch, dtype))
    made.save_pretrained(directory)
    tokenizer(chat_template).save_pretrained(directory)
    return str(directory)
