"""A tokenizer reads text as its tokenizer.json has it, whatever class transformers takes for it."""

import json
import logging

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gkdjax.data import tokenizer_files
from gkdjax.data.tokenizer_files import load_tokenizer
from gkdjax.utils.errors import UserError

TEXT = "in 2023 there were\n\n  two of 12345 things </s>\nitems 1  2 caf\u00e9 cafe\u0301 Why</s>So"
SPECIAL = ("<unk>", "<s>", "</s>")


def byte_level(*cuts, regex: bool = True, add_prefix_space: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=regex)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last]) if cuts else last
    made.decoder = decoders.ByteLevel()
    return trained(made, list(SPECIAL), pre_tokenizers.ByteLevel.alphabet())


def own_regex() -> Tokenizer:
    cut = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated")
    return byte_level(cut, regex=False)


def digits() -> Tokenizer:
    return byte_level(pre_tokenizers.Digits(individual_digits=True))


def llama2(first_only: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if first_only:
        made.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    else:
        space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        made.normalizer = normalizers.Sequence(space)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return trained(made, [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))], [])


def trained(made: Tokenizer, special: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT * 3, "  \n\n 20 23 12 345 "] * 20, trainer)
    return made


def saved(path, model_type: str, name: str | None, made: Tokenizer, **settings):
    """A model directory's tokenizer, of the class `name`."""
    made.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": name} | named | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return made.encode(TEXT, add_special_tokens=False).ids


def ids_of(tokenizer) -> list[int]:
    return tokenizer(TEXT, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("model_type", "name", "make", "settings"),
    [
        ("llama", "GPT2Tokenizer", digits, {"add_prefix_space": False}),
        ("llama", "GPT2Tokenizer", own_regex, {}),
        ("qwen2", "PreTrainedTokenizerFast", own_regex, {}),
        ("qwen3", None, own_regex, {}),
        ("gemma3_text", "GPT2Tokenizer", own_regex, {}),
        ("llama", "LlamaTokenizer", llama2, {"legacy": False}),
    ],
)
def test_the_file_is_taken_where_the_class_means_something_else(
    tmp_path, caplog, model_type, name, make, settings
):
    made = make()
    right = saved(tmp_path, model_type, name, made, **settings)
    with caplog.at_level(logging.WARNING, "absl"):
        tokenizer = load_tokenizer(tmp_path)
    assert ids_of(tokenizer) == right
    # Nor does a class bring special tokens of its own, for which no embedding has rows.
    assert tokenizer.get_vocab() == made.get_vocab()
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<s>", 2)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"{tmp_path}: transformers builds ") and "by the file and " in said


@pytest.mark.parametrize(
    ("model_type", "name", "make", "settings"),
    [
        ("llama", "PreTrainedTokenizerFast", own_regex, {}),
        ("llama", "GPT2Tokenizer", byte_level, {}),
        ("llama", "LlamaTokenizer", lambda: llama2(first_only=True), {"legacy": False}),
    ],
)
def test_nothing_is_said_where_both_are_the_same(
    tmp_path, caplog, model_type, name, make, settings
):
    right = saved(tmp_path, model_type, name, make(), **settings)
    with caplog.at_level(logging.WARNING, "absl"):
        assert ids_of(load_tokenizer(tmp_path)) == right
    assert not [record for record in caplog.records if record.name == "absl"]


def test_a_file_that_its_class_takes_as_it_is_is_parsed_once(tmp_path, monkeypatch):
    """A second time takes a second, for a large vocabulary."""
    right = saved(tmp_path, "llama", "PreTrainedTokenizerFast", own_regex())
    monkeypatch.setattr(tokenizers, "Tokenizer", None)  # transformers has taken it already
    assert ids_of(load_tokenizer(tmp_path)) == right


def test_a_cut_that_a_small_vocabulary_hides_is_the_files(tmp_path, monkeypatch):
    cut = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    made = byte_level(pre_tokenizers.Split(Regex(cut), "isolated"), regex=False)
    corpus = ["It was a day.\n\nThe sun shone.\n\nAnd so on, he said.\n\n"] * 50
    made.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(show_progress=False))
    saved(tmp_path, "llama", "GPT2Tokenizer", made)
    text = "It was a day.\n\nThe sun"
    assert load_tokenizer(tmp_path).tokenize(text) == made.encode(text).tokens
    monkeypatch.setattr(tokenizer_files, "_PROBES", ("a",))  # nor does it need the right probe
    assert load_tokenizer(tmp_path).tokenize(text) == made.encode(text).tokens


def test_every_added_token_is_tried(tmp_path):
    made = byte_level()
    made.add_tokens([AddedToken(f"<extra_{i}>", rstrip=i == 150) for i in range(200)])
    saved(tmp_path, "llama", "GPT2Tokenizer", made)
    # So transformers is told of no token but this one, and its class knows no file's.
    path = tmp_path / "tokenizer_config.json"
    one = {str(made.token_to_id("<extra_0>")): {"content": "<extra_0>", "special": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": one}))
    text = "a <extra_150>  b <extra_199>"
    assert load_tokenizer(tmp_path).tokenize(text) == made.encode(text).tokens


def test_special_tokens_that_a_class_names_are_those_that_the_file_has(tmp_path):
    made = own_regex()
    made.add_special_tokens(["<|endoftext|>"])
    saved(tmp_path, "qwen2", "Qwen2Tokenizer", made)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>",) * 2
    assert tokenizer.get_vocab() == made.get_vocab()


def test_a_model_setting_that_no_probe_shows_is_the_files(tmp_path, caplog):
    made = byte_level()
    state = json.loads(made.to_str())
    state["model"] |= {"ignore_merges": True}
    state["model"]["vocab"]["zqzq"] = len(state["model"]["vocab"])  # which no merge reaches
    made = Tokenizer.from_str(json.dumps(state))
    saved(tmp_path, "llama", "GPT2Tokenizer", made)
    assert load_tokenizer(tmp_path).tokenize("zqzq") == ["zqzq"]
    assert not [record for record in caplog.records if record.name == "absl"]


def test_what_was_trained_with_is_not_guessed_where_transformers_4_changed_the_file(tmp_path):
    saved(tmp_path, "llama", "GPT2Tokenizer", byte_level(add_prefix_space=True))
    with pytest.raises(
        UserError, match=r"add_prefix_space is null.*: set add_prefix_space to true"
    ):
        load_tokenizer(tmp_path)
    right = saved(
        tmp_path, "llama", "GPT2Tokenizer", byte_level(add_prefix_space=True), add_prefix_space=True
    )
    assert ids_of(load_tokenizer(tmp_path)) == right
    right = saved(
        tmp_path, "llama", "LlamaTokenizer", llama2(), legacy=False, add_prefix_space=True
    )
    assert ids_of(load_tokenizer(tmp_path)) == right  # without the file that it is made of anew
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    with pytest.raises(UserError, match=r"add_prefix_space is true.*: remove add_prefix_space"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00",
            "a sentencepiece file.*pip install sentence",
        ),
        (b"AA== 0\nAQ== 1\n", "a tiktoken file, and no tokenizer.json; put the tokenizer.json of"),
    ],
)
def test_a_model_file_alone_is_named_for_what_it_is(tmp_path, content, said):
    saved(tmp_path, "llama", "LlamaTokenizer", llama2())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_what_transformers_says_in_many_lines_is_said_in_one(tmp_path):
    saved(tmp_path, "llama", "PreTrainedTokenizerFast", llama2())
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer that can be read: ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and "\\n" not in str(error.value)
