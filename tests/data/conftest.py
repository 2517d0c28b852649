"""A byte-level tokenizer with merges across line breaks and spaces, with any chat template."""

import functools

import chat_templates as templates
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


@functools.cache
def _core() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
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


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory):
    """chat_dir(template's name, or its text) -> a directory with a tokenizer of its own."""

    def save(template: str) -> str:
        directory = tmp_path_factory.mktemp("chat")
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=_core(), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
        )
        made.chat_template = (templates.FAMILIES | templates.OTHERS).get(template, template)
        made.save_pretrained(directory)
        return str(directory)

    return save


@pytest.fixture(scope="session")
def chat_of(chat_dir):
    """chat_of(template's name, or its text) -> its Chat; the same one every time."""
    return functools.cache(lambda template: load_chat(chat_dir(template)))


@pytest.fixture(scope="session", params=templates.FAMILIES)
def chat(request, chat_of):
    """A Chat of each family."""
    return chat_of(request.param)
