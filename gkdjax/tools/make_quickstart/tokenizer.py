"""A small tokenizer with a Gemma-like chat template: one token a character, one a role name."""

import json
import pathlib
import string
import tempfile

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.hf import export

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_ROLES = ("system", "user", "model")
_CHARACTERS = ("\n", " ", *string.digits, *string.ascii_letters, *string.punctuation)
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *_ROLES, *_CHARACTERS))}

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def build() -> transformers.PreTrainedTokenizerFast:
    core = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    # Each match is a piece of its own; a role name is one token, as in Gemma's vocabulary.
    pieces = tokenizers.Regex("|".join(_ROLES) + r"|[\s\S]")
    core.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", VOCABULARY["<bos>"])]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_model(
    directory: pathlib.Path, spec: DecoderConfig, params: dict, config: dict, chat
) -> None:
    """A model directory as transformers writes it; generation stops at the end of a turn."""
    with tempfile.TemporaryDirectory() as source:
        (pathlib.Path(source) / "config.json").write_text(json.dumps(config))
        chat.save_pretrained(source)
        _use_old_names(pathlib.Path(source) / "tokenizer_config.json")
        transformers.GenerationConfig(
            pad_token_id=VOCABULARY["<pad>"],
            bos_token_id=VOCABULARY["<bos>"],
            eos_token_id=[VOCABULARY["<eos>"], VOCABULARY["<end_of_turn>"]],
        ).save_pretrained(source)
        export.save_pretrained(str(directory), spec, params, source)


def _use_old_names(path: pathlib.Path) -> None:
    """Names that transformers 4 reads too; 5 writes its own and reads both."""
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.pop("backend")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
