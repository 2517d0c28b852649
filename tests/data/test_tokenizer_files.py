"""A tokenizer reads text as its tokenizer.json has it, whatever class transformers takes for it."""

import functools
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
FAST = "PreTrainedTokenizerFast"


def byte_level(*cuts, regex: bool = True, add_prefix_space: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=regex)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last]) if cuts else last
    made.decoder = decoders.ByteLevel()
    return trained(made, list(SPECIAL), pre_tokenizers.ByteLevel.alphabet())


def own_regex(cut: str = r"\p{N}{1,3}|\s+|[^\s\p{N}]+") -> Tokenizer:
    return byte_level(pre_tokenizers.Split(Regex(cut), "isolated"), regex=False)


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


def save(path, name: str | None, made: Tokenizer, model_type: str = "llama", **settings) -> None:
    """Writes a model directory's tokenizer, of the class `name`."""
    made.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": name} | named | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def check(path, made: Tokenizer, text: str = TEXT):
    """The tokenizer that is loaded, which reads text as the file does."""
    tokenizer = load_tokenizer(path)
    expected = made.encode(text, add_special_tokens=False).ids
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    return tokenizer


digits = functools.partial(byte_level, pre_tokenizers.Digits(individual_digits=True))
prefix_space = functools.partial(byte_level, add_prefix_space=True)
llama2_first = functools.partial(llama2, first_only=True)


@pytest.mark.parametrize(
    ("name", "model_type", "make", "settings", "warns"),
    [
        ("GPT2Tokenizer", "llama", digits, {"add_prefix_space": False}, True),
        ("GPT2Tokenizer", "llama", own_regex, {}, True),
        (FAST, "qwen2", own_regex, {}, True),
        (None, "qwen3", own_regex, {}, True),
        ("GPT2Tokenizer", "gemma3_text", own_regex, {}, True),
        ("LlamaTokenizer", "llama", llama2, {"legacy": False}, True),
        (FAST, "llama", own_regex, {}, False),
        ("GPT2Tokenizer", "llama", byte_level, {}, False),
        ("LlamaTokenizer", "llama", llama2_first, {"legacy": False}, False),
        ("GPT2Tokenizer", "llama", prefix_space, {"add_prefix_space": True}, False),
        # Without the file that transformers 4 made it of anew.
        ("LlamaTokenizer", "llama", llama2, {"legacy": False, "add_prefix_space": True}, None),
    ],
)
def test_the_file_is_taken_and_a_class_that_means_something_else_is_named(
    tmp_path, caplog, name, model_type, make, settings, warns
):
    made = make()
    save(tmp_path, name, made, model_type, **settings)
    with caplog.at_level(logging.WARNING, "absl"):
        tokenizer = check(tmp_path, made)
    messages = [record.getMessage() for record in caplog.records if record.name == "absl"]
    if warns is not None:
        assert len(messages) == warns
    for message in messages:
        assert message.startswith(f"{tmp_path}: transformers builds ") and "by the file" in message
        # Nor does a class bring special tokens of its own, for which no embedding has rows.
        assert tokenizer.get_vocab() == made.get_vocab()
        assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<s>", 2)


def test_a_file_that_its_class_takes_as_it_is_is_parsed_once(tmp_path, monkeypatch):
    """A second time takes a second, for a large vocabulary."""
    made = own_regex()
    save(tmp_path, FAST, made)
    monkeypatch.setattr(tokenizers, "Tokenizer", None)  # transformers has taken it already
    check(tmp_path, made)


def test_a_cut_that_a_small_vocabulary_hides_is_the_files(tmp_path, monkeypatch):
    cut = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    made = own_regex(cut)
    corpus = ["It was a day.\n\nThe sun shone.\n\nAnd so on, he said.\n\n"] * 50
    made.train_from_iterator(
        corpus, tokenizers.trainers.BpeTrainer(special_tokens=[*SPECIAL], show_progress=False)
    )
    save(tmp_path, "GPT2Tokenizer", made)
    check(tmp_path, made, "It was a day.\n\nThe sun")
    monkeypatch.setattr(tokenizer_files, "_PROBES", ("a",))  # nor does it need the right probe
    check(tmp_path, made, "It was a day.\n\nThe sun")


def test_every_added_token_is_tried(tmp_path):
    made = byte_level()
    made.add_tokens([AddedToken(f"<extra_{i}>", rstrip=i == 150) for i in range(200)])
    # So transformers is told of no token but this one, and its class knows no file's.
    one = {str(made.token_to_id("<extra_0>")): {"content": "<extra_0>", "special": True}}
    save(tmp_path, "GPT2Tokenizer", made, added_tokens_decoder=one)
    check(tmp_path, made, "a <extra_150>  b <extra_199>")


def test_special_tokens_that_a_class_names_are_those_that_the_file_has(tmp_path):
    made = own_regex()
    made.add_special_tokens(["<|endoftext|>"])
    save(tmp_path, "Qwen2Tokenizer", made, "qwen2")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>",) * 2
    assert tokenizer.get_vocab() == made.get_vocab()


def test_a_model_setting_that_no_probe_shows_is_the_files(tmp_path, caplog):
    state = json.loads(byte_level().to_str())
    state["model"] |= {"ignore_merges": True}
    state["model"]["vocab"]["zqzq"] = len(state["model"]["vocab"])  # which no merge reaches
    save(tmp_path, "GPT2Tokenizer", Tokenizer.from_str(json.dumps(state)))
    assert load_tokenizer(tmp_path).tokenize("zqzq") == ["zqzq"]
    assert not [record for record in caplog.records if record.name == "absl"]


SENTENCEPIECE = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00"


@pytest.mark.parametrize(
    ("name", "make", "settings", "model", "message"),
    [
        # How it was trained cannot be known where transformers 4 changed what it had read.
        ("GPT2Tokenizer", prefix_space, {}, None, "is null.*: set add_prefix_space to true"),
        (
            *("LlamaTokenizer", llama2, {"legacy": False, "add_prefix_space": True}),
            *(SENTENCEPIECE, "add_prefix_space is true.*: remove add_prefix_space"),
        ),
        ("LlamaTokenizer", None, {}, SENTENCEPIECE, "a sentencepiece file.*pip install sentence"),
        (
            "LlamaTokenizer",
            None,
            {},
            b"AA== 0\nAQ== 1\n",
            "tiktoken file, and no .*; put the token",
        ),
        (FAST, None, {}, None, "holds no tokenizer that can be read: "),
    ],
)
def test_what_cannot_be_read_or_known_is_refused_in_one_line(
    tmp_path, name, make, settings, model, message
):
    save(tmp_path, name, (make or llama2)(), **settings)
    if make is None:
        (tmp_path / "tokenizer.json").unlink()
    if model is not None:
        (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert make is not None or "\\n" not in str(error.value)


SETTINGS = "tokenizer_config.json"
WRONG = [
    *((SETTINGS, "bos_token", value) for value in (3, {}, {"content": None}, ["<s>"])),
    *((SETTINGS, "model_max_length", value) for value in ("512", [], True)),
    *((SETTINGS, "added_tokens_decoder", value) for value in (None, [], {"0": "<s>"})),
    (SETTINGS, "added_tokens_decoder", {"0": {"content": "<s>", "lstrip": "no"}}),
    *((SETTINGS, "chat_template", value) for value in (1, ["x"], {"a": 1}, [{"name": "a"}])),
    (SETTINGS, "extra_special_tokens", [1]),
    (SETTINGS, "padding_side", "up"),
    (SETTINGS, "tokenizer_class", 0),
    ("special_tokens_map.json", "unk_token", {}),  # a RecursionError at the first text
    ("added_tokens.json", "<s>", 1e12),
    *(("tokenizer.json", "added_tokens", value) for value in (None, {}, [{"id": 0}])),
    ("tokenizer.json", "added_tokens", [{"id": -1, "content": "<s>"}]),
    ("tokenizer.json", "truncation", "x"),  # what the tokenizers library says has line and column
    ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": 2**63}, "merges": []}),
    ("config.json", "model_type", []),
    (SETTINGS, None, []),
]


@pytest.mark.parametrize(("file", "key", "value"), WRONG)
def test_a_value_of_another_type_is_named_with_its_file(tmp_path, file, key, value):
    save(tmp_path, FAST, llama2())
    path = tmp_path / file
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value if key is None else fields | {key: value}))
    with pytest.raises(UserError, match=file) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    named = file in ("config.json", "tokenizer.json") and key != "added_tokens"
    assert key is None or named or f"{path}: {key} = " in str(error.value)


@pytest.mark.parametrize("damage", ["an id that is not the next", "an id twice"])
def test_an_added_token_that_gets_another_id_is_named(tmp_path, damage):
    save(tmp_path, FAST, llama2())
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text())
    if damage == "an id twice":
        state["model"]["vocab"]["</s>"] = 1
    else:
        state["added_tokens"].append(state["added_tokens"][2] | {"content": "<new>", "id": 9999})
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"added_tokens gives '<.*>' the id .*, and it becomes"):
        load_tokenizer(tmp_path)
