"""Tiny models and tokenizers for the tests, written to disk as Hugging Face directories.

`model_dir` is all that most tests need: random weights, norms included, at a scale where logits
have a standard deviation of about 1, so that a mistake in any part of the decoder shows in them.
"""

import pathlib

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models

from gkdjax.models import gemma3
from gkdjax.models.spec import DecoderSpec

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


def config(**overrides) -> transformers.Gemma3TextConfig:
    """A tiny Gemma 3 in which every number that could be confused with another one differs."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": rope_parameters(),
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
    }
    return transformers.Gemma3TextConfig(**(fields | overrides))


def rope_parameters(factor: float | None = None) -> dict:
    """The new form of a config's rope fields; `factor` scales the global layers."""
    scaling = {"rope_type": "default"} if factor is None else {"rope_type": "linear"}
    if factor is not None:
        scaling["factor"] = factor
    return {
        "full_attention": {"rope_theta": 1e6, **scaling},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }


def spec(**overrides) -> DecoderSpec:
    """The decoder's numbers of `config(**overrides)`."""
    return gemma3.decoder_spec(config(**overrides).to_dict())


def torch_model(seed: int = 0, **overrides) -> transformers.Gemma3ForCausalLM:
    """torch's Gemma 3 with random weights in float32; the oracle of the decoder's tests."""
    made = transformers.Gemma3ForCausalLM(
        config(attn_implementation="eager", dtype="float32", **overrides)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            # Kernels keep the scale of what passes; norms get weights too, as a loader that
            # forgets them, or their offset, must be caught.
            std = 0.3 if "norm" in name else weight.shape[-1] ** -0.5
            weight.copy_(std * torch.randn(weight.shape, generator=generator))
    return made.eval()


def model_dir(
    directory: str | pathlib.Path,
    seed: int = 0,
    dtype: str = "float32",
    chat_template: str = CHAT_TEMPLATE,
    **overrides,
) -> str:
    """Writes weights, config and tokenizer into `directory` -> its path as a string.

    `overrides` are fields of `config`; the weights depend on `seed` and shapes alone.
    """
    made = torch_model(seed, **overrides).to(getattr(torch, dtype))
    made.save_pretrained(directory)
    tokenizer(chat_template).save_pretrained(directory)
    return str(directory)
