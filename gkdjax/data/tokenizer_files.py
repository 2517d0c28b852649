"""Loads a model directory's tokenizer, as its tokenizer.json has it.

`AutoTokenizer` takes vocabulary and merges from tokenizer.json, but for most classes it builds the
normaliser and the pre-tokeniser from the class. Where class and file differ, text silently gets
other ids. So what transformers built is compared with the file.
"""

import json
import pathlib
from collections.abc import Callable, Iterable

import tokenizers
import transformers
from absl import logging

from gkdjax.data.row_schema import shown_value
from gkdjax.utils import files
from gkdjax.utils.errors import UserError, one_line

# Digits, runs of spaces, line breaks, composed and decomposed letters, many scripts, parts of
# emoji, other white space, code, and what tokenizers themselves write for spaces and bytes.
_PROBES = (
    "in 2023 there were\n\n  two of 12345 things \nitems 1  2   3.14, 1,000,000 x86 3rd",
    "  two spaces first, one last ",
    "\n\n\n line breaks\r\n\r\n \n  \n\ttabs\t\t between\n",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m A\u030angstro\u0308m \u1e9b\u0323 \ufb01ne \u212b",
    "\uff21\uff11 \u2460 \u00bd \u00b2 \u2126 \u1112\u1161\u11ab \u0e2a\u0e27\u0e31\u0e2a\u0e14",
    "Don't, we'll, I'M, they'RE, it's; \u2018Twas \u201cquoted\u201d \u2014 e.g. U.S.A.'s co-op",
    "три слова 你好,世界。 こんにちは 한국어 مرحبا नमस्ते ١٢٣ १२ ελληνικά",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \u2764\ufe0f",
    "\u00a0nbsp \u3000wide \u200bzero \u2028line \u00ad soft \ufeffbom \x00\x07\x7f",
    "def f(x_1, y2):\n    return {'a': x_1 ** 2}  # 100%\n\n\tif a==b!=c: a->b\\n\n```json\n[[1]]",
    "HTTPServer camelCase snake_case ALLCAPS aaaaaaaaaaaaaaaaaaaa !!!??? ...... ------- ==== ",
    "\u2581already \u2581\u2581marked \u0120 \u010a <0x0A> ##piece </w> @@",
    "a day.\n\nThe sun, he said>\nx\n\n\nY",
    *(" ", "a", " a", "\n"),
)
_FILE = "tokenizer.json"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
_NEAR = 24  # characters that are shown on either side of a difference
_AT_ONCE = 64  # added tokens in one probe; some files have thousands
_SETTINGS = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "dropout")


def _all(check: Callable, kind: type = list | dict) -> Callable[[object], bool]:
    """Whether a value is of `kind`, and all that it holds passes `check`."""

    def are_valid(value) -> bool:
        held = value.values() if isinstance(value, dict) else value
        return isinstance(value, kind) and all(map(check, held))

    return are_valid


def _or_null(check: Callable) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_id(value) -> bool:
    return type(value) is int and 0 <= value < 2**31


_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
_ADDED = {
    **{"content": _is_text, "id": _is_id},
    **dict.fromkeys(_FLAGS, lambda value: isinstance(value, bool)),
}


def _is_added(value) -> bool:
    return (
        isinstance(value, dict)
        and "content" in value
        and all(_ADDED[key](part) for key, part in value.items() if key in _ADDED)
    )


def _is_token(value) -> bool:
    return _is_text(value) or _is_added(value)


def _is_named(value) -> bool:
    return isinstance(value, dict) and all(_is_text(value.get(key)) for key in ("name", "template"))


# Keys that transformers reads without a look at their types -> (the check, what they must be).
_FORMS: dict[str, tuple[Callable[[object], bool], str]] = {
    "tokenizer_class": (_or_null(_is_text), "the name of a class"),
    "model_max_length": (_or_null(lambda v: type(v) in (int, float)), "a number"),
    "padding_side": (lambda v: v in ("left", "right"), "left or right"),
    "added_tokens": (_all(_is_added, list), "a list of objects with content and id"),
    "added_tokens_decoder": (_all(_is_added, dict), "an object of ids with objects with content"),
    **dict.fromkeys(
        [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")],
        (_or_null(_is_token), "a token's text, or an object with its content"),
    ),
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens"),
        (_or_null(_all(_is_token)), "a list or an object of tokens"),
    ),
    "chat_template": (
        lambda v: _or_null(_is_text)(v) or _all(_is_text, dict)(v) or _all(_is_named, list)(v),
        "a text, or a list of objects with name and template",
    ),
}


def load_tokenizer(directory: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Returns what transformers builds, if it reads text as tokenizer.json does; else the file.

    The file counts as what the model was trained with: transformers 4 took it whole, whatever the
    class, and whoever saves a tokenizer writes into it what was in use. The exception is
    `add_prefix_space` in tokenizer_config.json, by which transformers 4 changed what it had read.

    Raises:
      UserError: no such directory, no fast tokenizer in it, or one that does not tell what the
        model was trained with.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise UserError(f"{directory}: no such model directory")
    ids = _check_files(root)
    tokenizer = _as_the_file(root)
    for token, wanted in ids.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != wanted:  # the tokenizers library gives it another one, and logs that in Rust
            raise UserError(
                f"{root / _FILE}: added_tokens gives {token!r} the id {wanted}, and it becomes"
                f" {found}: the vocabulary lacks it, or has it or the id twice; get the file again"
            )
    return tokenizer


def _check_files(root: pathlib.Path) -> dict[str, int]:
    """Checks the types of what transformers reads -> the ids of tokenizer.json's added tokens.

    transformers takes them as they are: a wrong one is an AttributeError, now or at the first text.
    """
    for path in (root / name for name in (*_BESIDE, _FILE)):
        fields = files.read_json(path) or {}
        for key, (is_valid, wanted) in _FORMS.items():
            if key in fields and not is_valid(fields[key]):
                raise UserError(f"{path}: {key} = {shown_value(fields[key])} must be {wanted}")
    ids = {token["content"]: token.get("id") for token in fields.get("added_tokens") or ()}
    added = root / "added_tokens.json"
    for token, number in (files.read_json(added) or {}).items():
        if not _is_id(number):
            raise UserError(f"{added}: {token} = {shown_value(number)} must be an id")
    return ids


def _as_the_file(root: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    built = _build(transformers.AutoTokenizer, root)
    if not built.is_fast:
        raise UserError(f"{root}: needs a tokenizer.json (a fast tokenizer, with offsets)")
    path = root / _FILE
    if not path.is_file() or type(built) is transformers.PreTrainedTokenizerFast:
        return built  # this class takes the file as it is: it need not be parsed again
    file = tokenizers.Tokenizer.from_file(str(path))
    if not _difference(file, built.backend_tokenizer) and (
        _settings(file) == _settings(built.backend_tokenizer)
    ):
        return built
    own = _build(transformers.PreTrainedTokenizerFast, root)
    # A class may name special tokens that no file names: those that this file has are the model's.
    named = {k: t for k, t in built.special_tokens_map.items() if isinstance(t, str)}
    own.add_special_tokens(
        {k: t for k, t in named.items() if getattr(own, k) is None and file.token_to_id(t)}
    )
    found = _difference(own.backend_tokenizer, built.backend_tokenizer)
    if found:
        _refuse_doubtful(root, file, found)
        logging.warning(
            "%s: transformers builds %s from the class and not from tokenizer.json, and so %s."
            " This run reads text by tokenizer.json, as transformers 4 did and with it whoever"
            " trained the model; what loads it by AutoTokenizer, a server too, may read otherwise",
            *(root, type(built).__name__, found),
        )
    return own


def _build(kind: type, root: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    try:
        built = kind.from_pretrained(str(root), local_files_only=True, trust_remote_code=False)
        built(_PROBES[0])  # some faults show only in a text
        return built
    except Exception as error:  # of transformers, of tokenizers, and KeyError for half a file
        model = root / "tokenizer.model"
        # For tokenizer.model alone, transformers only says that tiktoken is missing.
        if model.is_file() and not (root / _FILE).exists():
            cause = _model_file_alone(model)
        else:
            cause = _damaged_file(root) or f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{root}: holds no tokenizer that can be read: {cause}") from error


def _damaged_file(root: pathlib.Path) -> str:
    """Finds the file that is to blame, which transformers does not name, and says why; or ""."""
    readers = {
        _FILE: tokenizers.Tokenizer.from_file,
        "config.json": transformers.AutoConfig.from_pretrained,
        "chat_template.jinja": lambda path: pathlib.Path(path).read_text(encoding="utf-8"),
    }
    for name, read in readers.items():
        try:
            if (root / name).exists():
                read(str(root / name))
        except Exception as error:
            return f"{name}: {one_line(error)}"
    return ""


def _model_file_alone(path: pathlib.Path) -> str:
    # tiktoken has lines of a token in base64 and its rank; sentencepiece a binary message.
    with path.open("rb") as file:
        token, _, rank = file.readline(4096).strip().partition(b" ")
    kind = "tiktoken" if rank.isdigit() and token.isascii() else "sentencepiece"
    remedy = "put the tokenizer.json of the same model there"
    if kind == "sentencepiece":
        remedy += (
            ", or make it: pip install sentencepiece, then AutoTokenizer.from_pretrained(DIR)"
            ".save_pretrained(DIR) with the release of transformers that the model was trained with"
        )
    return f"it has tokenizer.model, a {kind} file, and no tokenizer.json; {remedy}"


def text_difference(
    a: tokenizers.Tokenizer, b: tokenizers.Tokenizer, a_name: str, b_name: str, more: Iterable = ()
) -> str:
    """Describes the first text to which two tokenizers give other ids; "": none was found.

    `more` texts are tried beside those that all tokenizers are tried with.
    """
    for each in (a, b):
        each.no_truncation()
        each.no_padding()
    for probe in (*_PROBES, *more):
        x, y = (each.encode(probe, add_special_tokens=False) for each in (a, b))
        if x.ids != y.ids:
            longest = max(len(x.ids), len(y.ids))
            i = next(i for i in range(longest) if x.ids[i : i + 1] != y.ids[i : i + 1])
            at = (x if i < len(x.ids) else y).offsets[i][0]
            text = probe[max(0, at - _NEAR) : at + _NEAR]
            shown = [each.tokens[i : i + 6] for each in (x, y)]
            return f"{text!r} goes on with {shown[0]} by {a_name} and {shown[1]} by {b_name}"
    return ""


def _difference(file: tokenizers.Tokenizer, other: tokenizers.Tokenizer) -> str:
    """Describes the first text that gets other ids, or else that is decoded otherwise; or ""."""
    added = [token.content for token in file.get_added_tokens_decoder().values()]
    probes = (  # each token before a word, after one, between spaces, and at the end of a line
        "".join(f"{t}1 {t} b{t}\n" for t in added[start : start + _AT_ONCE])
        for start in range(0, len(added), _AT_ONCE)
    )
    found = text_difference(file, other, "the file", "the class", probes)
    if found:
        return found
    for probe in _PROBES:
        ids = file.encode(probe, add_special_tokens=False).ids
        a, b = (each.decode(ids) for each in (file, other))
        if a != b:
            return f"ids are read back as {a!r} by the file and as {b!r} by the class"
    return ""


def _settings(tokenizer: tokenizers.Tokenizer) -> list:
    """Settings that no probe may show: a cut that words hide, or tokens that no merge reaches."""
    model = [type(tokenizer.model), *(getattr(tokenizer.model, k, None) for k in _SETTINGS)]
    parts = tokenizer.normalizer, tokenizer.pre_tokenizer
    return model + [
        part if part is None else _plain(json.loads(part.__getstate__())) for part in parts
    ]


def _plain(state: dict) -> object:
    """A part's settings without what only offsets depend on; a list of one part is that part."""
    parts = [state[k] for k in ("normalizers", "pretokenizers") if k in state]
    if not parts:
        return {key: value for key, value in state.items() if key != "trim_offsets"}
    inner = [_plain(each) for each in parts[0]]
    return (inner or [None])[0] if len(inner) < 2 else inner


def _refuse_doubtful(root: pathlib.Path, file: tokenizers.Tokenizer, found: str) -> None:
    """Raises UserError where transformers 4 did not take the file unchanged either."""
    path = root / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    wanted = config.get("add_prefix_space")
    cut = json.loads(file.pre_tokenizer.__getstate__()) if file.pre_tokenizer else {}
    # It wrote add_prefix_space into the pre-tokeniser, and made Llama's from tokenizer.model.
    if "add_prefix_space" in cut and cut["add_prefix_space"] != bool(wanted):
        own = json.dumps(cut["add_prefix_space"])
        remedy = f"set add_prefix_space to {own}, as tokenizer.json has it, or change it there"
    elif (
        str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
        and (root / "tokenizer.model").is_file()
        and wanted is not None
    ):
        remedy = (
            "remove add_prefix_space to read text by tokenizer.json, or save the tokenizer with the"
            " release of transformers that the model was trained with"
        )
    else:
        return
    raise UserError(
        f"{path}: add_prefix_space is {json.dumps(wanted)}, with which neither transformers 4 nor 5"
        f" takes tokenizer.json as it is: {found}. How the model was trained cannot be known:"
        f" {remedy}"
    )
