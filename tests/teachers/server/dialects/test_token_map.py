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


def fast(inner, decoder, special=SPECIAL):
    inner.decoder = decoder
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
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


MADE = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, stripped": lambda: byte_fallback(LLAMA2),
    "metaspace": lambda: byte_fallback(decoders.Metaspace(), byte_tokens=()),
    "plain": factories.tokenizer,
    "no decoder": lambda: fast(Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])), None),
}


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check(tokenizer):
    """Every id reads as the tokenizer reads it, and leads back to itself or nowhere."""
    tokens, names = TokenMap(tokenizer), {i: name for name, i in tokenizer.get_vocab().items()}
    before = tokenizer.get_vocab()[SPECIAL[0]]  # some decoders strip the start of a text
    for i in names:
        text = tokens.string(i)
        whole, alone = decoded(tokenizer, [before, i]), decoded(tokenizer, [before])
        if tokenizer.backend_tokenizer.decoder is None:  # then it puts spaces between tokens
            alone += " "
        assert whole == alone + text, (i, text)
        assert tokens.of_string(text) in (i, None) or BYTE_TOKEN.fullmatch(names[i])
        assert tokens.is_whole(i) == ("\ufffd" not in text)
    texts = collections.Counter(map(tokens.string, names))
    return tokens, [i for i in names if texts[tokens.string(i)] == 1]


@pytest.mark.parametrize("kind", MADE)
def test_every_id_reads_as_it_decodes_and_leads_back(kind):
    tokenizer = MADE[kind]()
    tokens, alone = check(tokenizer)
    for i in alone:
        if tokens.is_whole(i) and tokens.string(i):
            assert tokens.of_string(tokens.string(i)) == i
            assert tokens.of_bytes(tokens.string(i).encode()) == i
    assert tokens.of_string("<eos>") == tokenizer.get_vocab()["<eos>"]


def test_bytes_tell_more_than_text():
    tokenizer = byte_level()
    tokens, vocab = TokenMap(tokenizer), tokenizer.get_vocab()
    assert tokens.string(vocab["Ã"]) == tokens.string(vocab["©"]) == "\ufffd"
    assert tokens.of_bytes(b"\xc3") == vocab["Ã"]
    assert tokens.of_bytes(b"\xa9") == vocab["©"]
    assert tokens.of_bytes(b" ") == vocab["Ġ"]
    assert tokens.of_string(" the") == vocab["Ġthe"]
    assert tokens.of_string("two words") == vocab["two words"]


def test_text_that_names_no_token():
    tokens = TokenMap(byte_level())
    for text in ("\ufffd", "a\ufffd", "no such token", "", "\ud800"):
        assert tokens.of_string(text) is None
    assert tokens.of_bytes(b"") is None
    assert tokens.string(10**6) is None
    assert not tokens.is_whole(10**6)


def test_the_replacement_character_is_a_token_in_bytes_only():
    tokenizer = byte_fallback(pieces=("\ufffd",))
    tokens = TokenMap(tokenizer)
    assert tokens.of_bytes("\ufffd".encode()) == tokenizer.get_vocab()["\ufffd"]
    assert tokens.of_string("\ufffd") is None


def test_shared_text_names_no_token():
    tokenizer = byte_fallback(pieces=("a", "▁", " ", "▁a", " a"))
    tokens = TokenMap(tokenizer)
    assert tokens.of_string(" ") is tokens.of_string(" a") is None
    assert tokens.of_string("a") == tokenizer.get_vocab()["a"]


def test_a_byte_token_gives_way_to_the_token_of_its_character():
    tokenizer = byte_fallback()
    tokens, vocab = TokenMap(tokenizer), tokenizer.get_vocab()
    assert tokens.of_string("\n") == vocab["\n"]
    assert tokens.string(vocab["<0x0A>"]) == "\n"
    assert tokens.of_string("\t") == vocab["<0x09>"]  # which has no token of its own
    assert tokens.of_bytes(b"\xc3") == vocab["<0xC3>"]


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
    spell = bytes_spelled()
    vocab = {"".join(spell[byte] for byte in raw): i for i, raw in enumerate(sorted(tokens))}
    made = fast(Tokenizer(models.BPE(vocab=vocab, merges=[])), decoders.ByteLevel())
    found, _ = check(made)
    for i, raw in enumerate(sorted(tokens)):
        assert found.of_bytes(raw) == i


def bytes_spelled():
    """Byte -> its character, read off a tokenizer; those that no UTF-8 has are left to themselves
    by giving them the characters that are over, in order."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = {}
    for character in map(chr, (*range(0x800), *range(0x800, 0x10000, 0x40), 0x10000, 0x50000)):
        if "\ud800" <= character <= "\udfff":
            continue
        word = "".join(piece for piece, _ in cut.pre_tokenize_str(character))
        spelled |= dict(zip(character.encode(), word, strict=True))
    over = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(spelled.values()))
    return spelled | dict(zip(sorted(set(range(256)) - set(spelled)), over, strict=True))
