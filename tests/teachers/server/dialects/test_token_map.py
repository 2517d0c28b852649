"""From text and bytes back to ids, for each kind of tokenizer, against the tokenizer itself."""

import collections
import re

import factories
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gkdjax.teachers.server.dialects.token_map import TokenMap
from gkdjax.utils.errors import UserError

BYTE_TOKEN = re.compile("<0x..>")
SPECIAL = ("<eos>", "<turn|>")
TEXT = ["the cat's café — naïve 狐狸 🦊🦊", "x = 1\n\n\tprint(x)  # ▁ Ġ", "the the cat cat 狐狸"]


def fast(inner, decoder):
    inner.decoder = decoder
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def byte_level():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXT, trainer)
    made = fast(inner, decoders.ByteLevel())
    made.add_tokens(["<think>", "two words", "é"])  # the last is spelled as the byte 0xE9 is
    return made


_PARTS = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
GEMMA = decoders.Sequence([*_PARTS])
LLAMA2 = decoders.Sequence([*_PARTS, decoders.Strip(" ", 1, 0)])
PIECES = ("▁", "t", "h", "e", "▁t", "▁the", "the", "\n", "\n\n", "é", "狐", "<0x0A", "▁▁", "a▁b")


def byte_fallback(decoder=GEMMA, pieces=PIECES, byte_tokens=range(256)):
    names = [f"<0x{byte:02X}>" for byte in byte_tokens]
    vocab = {token: i for i, token in enumerate(dict.fromkeys((*names, *pieces)))}
    return fast(Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True)), decoder)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check(tokenizer) -> TokenMap:
    """Every id reads as the tokenizer reads it, and leads back to itself or nowhere."""
    tokens, names = TokenMap(tokenizer), {i: name for name, i in tokenizer.get_vocab().items()}
    before = tokenizer.get_vocab()[SPECIAL[0]]  # some decoders strip the start of a text
    counts = collections.Counter(map(tokens.string, names))
    for i, name in names.items():
        text = tokens.string(i)
        whole, alone = decoded(tokenizer, [before, i]), decoded(tokenizer, [before])
        if tokenizer.backend_tokenizer.decoder is None:  # then it puts spaces between tokens
            alone += " "
        assert whole == alone + text, (i, text)
        assert tokens.is_whole(i) == ("\ufffd" not in text)
        found = tokens.id_of(text)
        assert found in (i, None) or BYTE_TOKEN.fullmatch(name)
        if counts[text] == 1 and tokens.is_whole(i) and text:
            assert found == tokens.id_of(text.encode()) == i
    assert tokens.id_of(SPECIAL[0]) == before
    return tokens


@pytest.mark.parametrize(
    "make",
    [
        byte_level,
        byte_fallback,
        lambda: byte_fallback(LLAMA2),
        lambda: byte_fallback(decoders.Metaspace(), byte_tokens=()),
        factories.tokenizer,
        lambda: fast(Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])), None),
    ],
    ids=["byte level", "byte fallback", "stripped", "metaspace", "plain", "no decoder"],
)
def test_every_id_reads_as_it_decodes_and_leads_back(make):
    check(make())


LEVEL, FALLBACK = byte_level(), byte_fallback()
SHARED = byte_fallback(pieces=("a", "▁", " ", "▁a", " a", "\ufffd"))


@pytest.mark.parametrize(
    ("tokenizer", "text", "token"),
    [
        (LEVEL, b"\xc3", "Ã"),
        (LEVEL, b"\xa9", "©"),
        (LEVEL, b" ", "Ġ"),
        (LEVEL, " the", "Ġthe"),
        (LEVEL, "two words", "two words"),
        *(
            (LEVEL, text, None)
            for text in ("\ufffd", "a\ufffd", "no such token", "\ud800", "", b"")
        ),
        # a byte token gives way to the token of its character
        (FALLBACK, "\n", "\n"),
        (FALLBACK, "\t", "<0x09>"),
        (FALLBACK, b"\xc3", "<0xC3>"),
        # shared text names none, and the replacement character is a token in bytes only
        *((SHARED, text, None) for text in (" ", " a", "\ufffd")),
        (SHARED, "a", "a"),
        (SHARED, "\ufffd".encode(), "\ufffd"),
    ],
)
def test_which_token_text_and_bytes_name(tokenizer, text, token):
    tokens = TokenMap(tokenizer)
    assert tokens.id_of(text) == (None if token is None else tokenizer.get_vocab()[token])


def test_parts_of_characters_and_ids_that_are_none():
    tokens, vocab = TokenMap(LEVEL), LEVEL.get_vocab()
    assert tokens.string(vocab["Ã"]) == tokens.string(vocab["©"]) == "\ufffd"
    assert tokens.string(10**6) is None and not tokens.is_whole(10**6)
    assert TokenMap(FALLBACK).string(FALLBACK.get_vocab()["<0x0A>"]) == "\n"


@pytest.mark.parametrize(
    "decoder",
    [decoders.WordPiece(), decoders.Sequence([decoders.Replace("a", "b"), decoders.CTC()])],
)
def test_a_decoder_that_looks_at_neighbours_is_refused(decoder):
    with pytest.raises(UserError, match=r"WordPiece|CTC"):
        TokenMap(byte_fallback(decoder))


PIECE = st.text("ab▁é\n<0x>狐 ", min_size=1, max_size=6)


@settings(deadline=None, max_examples=30)
@given(st.lists(PIECE, unique=True), st.sets(st.integers(0, 255)))
def test_any_byte_fallback_vocabulary(pieces, byte_tokens):
    check(byte_fallback(pieces=tuple(pieces), byte_tokens=sorted(byte_tokens)))


@settings(deadline=None, max_examples=30)
@given(st.sets(st.binary(min_size=1, max_size=4), min_size=1, max_size=20))
def test_any_byte_level_vocabulary(tokens):
    """The bytes that UTF-8 has are spelled by a tokenizer, the others in order."""
    cut, spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), {}
    for character in map(
        chr, (*range(0x800), *range(0x800, 0xD800, 0x40), 0xE000, 0x10000, 0x50000)
    ):
        word = "".join(piece for piece, _ in cut.pre_tokenize_str(character))
        spelled |= dict(zip(character.encode(), word, strict=True))
    over = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(spelled.values()))
    spelled |= dict(zip(sorted(set(range(256)) - set(spelled)), over, strict=True))
    vocab = {"".join(spelled[byte] for byte in raw): i for i, raw in enumerate(sorted(tokens))}
    found = check(fast(Tokenizer(models.BPE(vocab=vocab, merges=[])), decoders.ByteLevel()))
    assert [found.id_of(raw) for raw in sorted(tokens)] == list(range(len(tokens)))
