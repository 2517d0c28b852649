"""A byte-level tokenizer with merges across line breaks and spaces, and several chat templates."""

import functools

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gkdjax.data.chat_template import load_chat

_SPECIAL = (
    *("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

# As Llama 3 and Qwen cut: a full stop takes the line breaks after it, and line breaks go together.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_GEMMA = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
  {%- set head = messages[0]['content'] + '\\n\\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}
  {%- set head = '' -%}{%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate') -}}
  {%- endif -%}
  {%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
  {{- '<start_of_turn>' + role + '\\n' + (head if loop.first else '') -}}
  {{- m['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

_CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
  {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
  {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' -}}
  {{- m['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""

_LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set head = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
  {%- set rest = messages[1:] -%}
{%- else -%}
  {%- set head = '' -%}{%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if m['role'] == 'user' -%}
    {{- bos_token + '[INST] ' + (head if loop.first else '') + m['content'].strip() + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + m['content'].strip() + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}"""

# An empty block of thinking before what is answered, and before the last answer only.
_THOUGHT = "'<think>\\n\\n</think>\\n\\n'"
_APART = _CHATML.replace(
    "m['role'] + '\\n' +",
    f"m['role'] + '\\n' + ({_THOUGHT} if loop.last and m['role'] == 'assistant' else '') +",
).replace("assistant\\n' -}}", f"assistant\\n' + {_THOUGHT} -}}}}")

# By name. The first seven are whole families; of the rest each is wrong in one way.
_TEMPLATES = {
    "gemma": _GEMMA,
    "chatml": _CHATML,
    "llama3": _LLAMA3,
    "llama2": _LLAMA2,
    "last apart": _APART,
    "closes": _CHATML + "{%- if not add_generation_prompt -%}{{- eos_token -}}{%- endif -%}",
    "marks": _LLAMA3.replace(
        "{{- m['content'] | trim + '<|eot_id|>' -}}",
        "{%- if m['role'] == 'assistant' -%}{%- generation -%}"
        "{{- m['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}{%- else -%}"
        "{{- m['content'] | trim + '<|eot_id|>' -}}{%- endif -%}",
    ),
    "refuses system": "{%- if messages[0]['role'] == 'system' -%}"
    "{{- raise_exception('System role not supported') -}}{%- endif -%}" + _GEMMA,
    "drops system": _LLAMA3.replace("in messages -%}", "in messages if m['role'] != 'system' -%}"),
    "thinks": _CHATML.replace(
        "m['role'] + '\\n' +",
        "m['role'] + '\\n' + ('<think>\\n\\n</think>\\n\\n' if loop.last and "
        "m['role'] == 'assistant' else '') +",
    ),
    # Qwen 3's way: an empty block of thinking where it is off, and before the last answer.
    "may think": _CHATML.replace(
        "m['role'] + '\\n' +",
        "m['role'] + '\\n' + ('<think>\\n\\n</think>\\n\\n' if loop.last and "
        "m['role'] == 'assistant' else '') +",
    )
    + "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}",
    "dated": "{{- '<|im_start|>system\\n' + (date_string if date_string is defined else "
    "strftime_now('%d %b %Y')) + '<|im_end|>\\n' -}}" + _CHATML,
    "shouts": _LLAMA3.replace("| trim", "| upper"),
    "replaces": _LLAMA3.replace("| trim", "| replace('Ho', 'Hum')"),
    "twice": _LLAMA3.replace("m['content'] | trim", "m['content'] + m['content']"),
    "only last ends": _LLAMA3.replace(
        "| trim + '<|eot_id|>'",
        "| trim + ('<|eot_id|>' if loop.last or m['role'] != 'assistant' else '\\n')",
    ),
    "no end": _CHATML.replace("<|im_end|>", ""),
    "bare": "{%- for m in messages -%}{{- m['content'] + eos_token -}}{%- endfor -%}",
    "broken": "{{- raise_exception('no') -}}",
    "empty": "",
}
FAMILIES = ("gemma", "chatml", "llama3", "llama2", "last apart", "closes", "marks")


@functools.cache
def _core() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["the user asks: what?\n\n\n  The model says, yes.\n\n\n  assistant system user model"]
    core.train_from_iterator(corpus * 20, trainer)
    # As Gemma's: a bos of the tokenizer's own, which must not come before the template's.
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    return core


def _tokenizer(chat_template: str) -> transformers.PreTrainedTokenizerFast:
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_core(), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    made.chat_template = chat_template
    return made


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory):
    """chat_dir(template's name, or its text) -> a directory with a tokenizer of its own."""

    def save(template: str) -> str:
        directory = tmp_path_factory.mktemp("chat")
        text = _TEMPLATES.get(template, template)
        _tokenizer(text).save_pretrained(directory)
        return str(directory)

    return save


@pytest.fixture(scope="session")
def chat_of(chat_dir):
    """chat_of(template's name) -> its Chat; the same one every time."""
    return functools.cache(lambda template: load_chat(chat_dir(template)))


@pytest.fixture(scope="session", params=FAMILIES)
def chat(request, chat_of):
    """A Chat of each family."""
    return chat_of(request.param)
