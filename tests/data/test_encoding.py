"""Text that is encoded in pieces has the ids and characters of the whole text."""

import random

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from gkdjax.data import encoding
from gkdjax.data.chat_template import load_chat
from gkdjax.data.encoding import Encoder
from gkdjax.types import Message

_TEMPLATE = "<s><|user|><|bot|><|end|>\n"
_TOKENS = ("<s>", "<|user|>", "<|bot|>", "<|end|>")
_WORDS = (
    "a",
    " b",
    "  ",
    "\n",
    "the end",
    "É",
    "e\u0301",
    "🙂",
    ".",
    "<|",
    "|>",
    "<|en",
    "▁",
    "12",
)
_CHARACTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def _bytes(**how) -> Tokenizer:
    """A byte-level tokenizer whose merges go over spaces and line breaks."""
    merges = [("Ġ", "b"), ("Ċ", "Ġ"), ("t", "h"), ("th", "e"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("1", "2")]
    tokens = [*_CHARACTERS, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, **how))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def _trimming() -> Tokenizer:
    made = _bytes()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=True)
    return made


def _words(pre_tokenizer, normalizer=None) -> Tokenizer:
    vocab = ["<unk>", *_CHARACTERS, "▁", "▁a", "▁b", "▁the", "▁end", "é", "\n", " "]
    made = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, [("▁", "a")], unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def _blank_as_word() -> Tokenizer:
    parts = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFKC()
    return _words(pre_tokenizers.Split(Regex("\n"), "isolated"), normalizers.Sequence([*parts]))


_KINDS = {
    "bytes": _bytes,
    "trimming": _trimming,
    "first word": lambda: _words(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "every word": lambda: _words(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "normalised": _blank_as_word,
}


def _tokenizer(kind: str, *more: AddedToken, **flags):
    inner = _KINDS[kind]()
    inner.add_tokens([AddedToken(token, special=True, **flags) for token in _TOKENS])
    inner.add_tokens([*more])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def _texts(count: int = 60):
    rng, parts = random.Random(0), (*_WORDS, *_TOKENS)
    return ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(count)]


def _assert_as_whole(tokenizer, encode) -> None:
    for text in _texts():
        ids, at = encode(text)
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert (ids.tolist(), at.tolist()) == (
            whole["input_ids"],
            [*map(list, whole["offset_mapping"])],
        )
        assert (ids.dtype, at.dtype, at.shape) == (np.int32, np.int64, (len(ids), 2))


def _pieces(encode, text: str) -> list[str]:
    return [] if encode._cut is None else encode._cut.findall(text)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("flags", [{}, {"rstrip": True}])
def test_pieces_are_encoded_as_in_the_whole_text(kind, flags):
    tokenizer = _tokenizer(kind, **flags)
    encode = Encoder(tokenizer, _TEMPLATE)
    assert _pieces(encode, _TEMPLATE) == [*_TOKENS]
    _assert_as_whole(tokenizer, encode)


@pytest.mark.parametrize(
    ("more", "flags", "cuts"),
    [
        ([], {"lstrip": True}, []),
        ([], {"single_word": True}, []),
        ([], {"normalized": True}, []),
        ([AddedToken("b", single_word=True, normalized=False)], {}, []),
        ([AddedToken("<|end|>\n", normalized=False)], {}, ["<s>", "<|user|>", "<|bot|>"]),
        ([AddedToken(".<", normalized=False)], {}, []),
        ([AddedToken(".<|e", normalized=False)], {}, ["<s>", "<|user|>", "<|bot|>"]),
        ([AddedToken("  ", normalized=False)], {}, [*_TOKENS]),
    ],
)
def test_text_is_cut_only_at_tokens_that_nothing_beside_them_can_hide(more, flags, cuts):
    tokenizer = _tokenizer("bytes", *more, **flags)
    encode = Encoder(tokenizer, _TEMPLATE)
    assert _pieces(encode, _TEMPLATE) == cuts
    _assert_as_whole(tokenizer, encode)


def test_tokens_outside_the_template_do_not_cut_and_are_not_compared(monkeypatch):
    """Some tokenizers have thousands: comparing each with each would take seconds."""
    asked, is_hidden = [], encoding._is_hidden
    monkeypatch.setattr(encoding, "_is_hidden", lambda t, ts: asked.append(t) or is_hidden(t, ts))
    encode = Encoder(_tokenizer("bytes"), "<|user|>")
    assert _pieces(encode, _TEMPLATE) == asked == ["<s>", "<|user|>"]  # the first is named


def test_a_tokenizer_that_cuts_at_random_encodes_whole_texts(monkeypatch):
    monkeypatch.setitem(_KINDS, "bytes", lambda: _bytes(dropout=0.5))
    assert Encoder(_tokenizer("bytes"), _TEMPLATE)._cut is None


def test_pieces_that_do_not_fit_together_are_found_out(monkeypatch):
    """No tokenizer is known to do this; should one, it is read whole."""
    apart = Encoder._apart
    monkeypatch.setattr(Encoder, "_apart", lambda self, piece: apart(self, piece.strip()))
    tokenizer = _tokenizer("bytes")
    encode = Encoder(tokenizer, _TEMPLATE)
    assert encode._cut is None
    _assert_as_whole(tokenizer, encode)


def test_a_conversation_with_all_its_prompts_is_encoded_once(chat_dir, monkeypatch):
    encoded, apart = [], Encoder._apart
    monkeypatch.setattr(Encoder, "_apart", lambda s, p: encoded.append(p) or apart(s, p))
    chat = load_chat(chat_dir("chatml"))
    before = tuple(Message(role, f"{role} 1") for role in ("system", "user", "assistant"))
    talk = tuple(Message(r, f"{r} {n}") for n in (2, 3) for r in ("user", "assistant"))
    chat.tokenize("")
    encoded.clear()
    for messages in (before + talk, talk):
        targets = [m.role == "assistant" and m in talk for m in messages]
        chat.render(messages, tuple(targets), "a row")
        chat.prompt_ids(messages[:-1], "a row")
    for message in before + talk:
        assert sum(message.content in piece for piece in encoded) == 1
