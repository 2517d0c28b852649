"""A model directory's tokenizer, as its tokenizer.json has it.

`AutoTokenizer` takes vocabulary and merges from tokenizer.json, and for most classes builds from
the class what normalises and cuts the text. Where class and file do not mean the same, text gets
other ids, without a word. So what it built is compared with the file.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator

import tokenizers
import transformers
from absl import logging

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
_NEAR = 24  # characters shown on either side of a difference
_SHOWN = 6  # tokens shown
_AT_ONCE = 64  # added tokens in one probe; some files have thousands
_SETTINGS = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "dropout")


def load_tokenizer(directory: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """What transformers builds, if it reads text as tokenizer.json does; else the file itself.

    The file is taken to be what the model was trained with: transformers 4 read it whole, whatever
    the class, and whoever saves a tokenizer writes into it what was in use. That is not so where
    tokenizer_config.json has `add_prefix_space`, by which transformers 4 changed what it had read.

    Raises:
      UserError: no such directory, no fast tokenizer in it, or one of which it cannot be known what
        the model was trained with.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise UserError(f"{directory}: no such model directory")
    built = _built(transformers.AutoTokenizer, root)
    if not built.is_fast:
        raise UserError(f"{directory}: needs a tokenizer.json (a fast tokenizer, with offsets)")
    path = root / "tokenizer.json"
    if not path.is_file() or type(built) is transformers.PreTrainedTokenizerFast:
        return built  # the class that takes the file as it is: it need not be parsed once more
    file = tokenizers.Tokenizer.from_file(str(path))
    if not _difference(file, built.backend_tokenizer) and (
        _settings(file) == _settings(built.backend_tokenizer)
    ):
        return built
    own = _built(transformers.PreTrainedTokenizerFast, root)
    # A class names special tokens that no file names: those that this file has are the model's.
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


def _built(how: type, root: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    try:
        return how.from_pretrained(str(root), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of transformers, of tokenizers, and KeyError for half a file
        raise UserError(
            f"{root}: holds no tokenizer that can be read: {_cause(root, error)}"
        ) from error


def _cause(root: pathlib.Path, error: Exception) -> str:
    """What transformers says; of tokenizer.model alone it says that tiktoken is missing."""
    model = root / "tokenizer.model"
    if (root / "tokenizer.json").exists() or not model.is_file():
        return f"{type(error).__name__}: {one_line(error)}"
    kind = "tiktoken" if _is_tiktoken(model) else "sentencepiece"
    remedy = "put the tokenizer.json of the same model there"
    if kind == "sentencepiece":
        remedy += (
            ", or make it: pip install sentencepiece, then AutoTokenizer.from_pretrained(DIR)"
            ".save_pretrained(DIR) with the release of transformers that the model was trained with"
        )
    return f"it has tokenizer.model, a {kind} file, and no tokenizer.json; {remedy}"


def _is_tiktoken(path: pathlib.Path) -> bool:
    """Lines of a token in base64 and its rank; sentencepiece's are a binary message."""
    with path.open("rb") as file:
        token, _, rank = file.readline(4096).strip().partition(b" ")
    return rank.isdigit() and token.isascii()


def text_difference(
    a: tokenizers.Tokenizer, b: tokenizers.Tokenizer, of_a: str, of_b: str, more: Iterable[str] = ()
) -> str:
    """The first text to which two tokenizers give other ids, for people; "": none was found.

    Args:
      a, b: both have the same vocabulary where the texts are.
      of_a, of_b: what they are, as "the file".
      more: texts beside those that are tried of all tokenizers.
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
            shown = [each.tokens[i : i + _SHOWN] for each in (x, y)]
            return f"{text!r} goes on with {shown[0]} by {of_a} and {shown[1]} by {of_b}"
    return ""


def _difference(file: tokenizers.Tokenizer, other: tokenizers.Tokenizer) -> str:
    """The first text that the two give other ids, or else that they read back otherwise; ""."""
    found = text_difference(file, other, "the file", "the class", _of_added_tokens(file))
    if found:
        return found
    for probe in _PROBES:
        ids = file.encode(probe, add_special_tokens=False).ids
        a, b = (each.decode(ids) for each in (file, other))
        if a != b:
            return f"ids are read back as {a!r} by the file and as {b!r} by the class"
    return ""


def _of_added_tokens(file: tokenizers.Tokenizer) -> Iterator[str]:
    """Each before a word, after one, between spaces, and at the end of a line."""
    added = [token.content for token in file.get_added_tokens_decoder().values()]
    for start in range(0, len(added), _AT_ONCE):
        yield "".join(f"{t}1 {t} b{t}\n" for t in added[start : start + _AT_ONCE])


def _settings(tokenizer: tokenizers.Tokenizer) -> list:
    """What no probe may show: a cut that the vocabulary hides, tokens that no merge reaches."""
    model = [type(tokenizer.model), *(getattr(tokenizer.model, k, None) for k in _SETTINGS)]
    return [*model, _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)]


def _state(part) -> object:
    """How a part that normalises or cuts is set; None: there is none.

    Not what only offsets depend on, and a list of one is the one.
    """
    if part is None:
        return None

    def plain(state: dict) -> object:
        parts = [state[k] for k in ("normalizers", "pretokenizers") if k in state]
        if parts:
            inner = [plain(each) for each in parts[0]]
            return (inner or [None])[0] if len(inner) < 2 else inner
        return {key: value for key, value in state.items() if key != "trim_offsets"}

    return plain(json.loads(part.__getstate__()))


def _refuse_doubtful(root: pathlib.Path, file: tokenizers.Tokenizer, found: str) -> None:
    """Raises UserError where transformers 4 did not take the file as it is either."""
    path = root / "tokenizer_config.json"
    config = {"add_prefix_space": None, "tokenizer_class": None}
    config |= json.loads(path.read_text()) if path.is_file() else {}
    asked, name = config["add_prefix_space"], str(config["tokenizer_class"]).removesuffix("Fast")
    cut = json.loads(file.pre_tokenizer.__getstate__()) if file.pre_tokenizer else {}
    # It wrote add_prefix_space into what cuts the text, and made Llama's anew of tokenizer.model.
    overrides = "add_prefix_space" in cut and cut["add_prefix_space"] != bool(asked)
    converts = name == "LlamaTokenizer" and (root / "tokenizer.model").is_file()
    if overrides:
        said = json.dumps(cut["add_prefix_space"])
        remedy = f"set add_prefix_space to {said}, as tokenizer.json has it, or change it there"
    elif converts and asked is not None:
        remedy = (
            "remove add_prefix_space to read text by tokenizer.json, or save the tokenizer with the"
            " release of transformers that the model was trained with"
        )
    else:
        return
    raise UserError(
        f"{path}: add_prefix_space is {json.dumps(asked)}, with which neither transformers 4 nor 5"
        f" takes tokenizer.json as it is: {found}. How the model was trained cannot be known:"
        f" {remedy}"
    )
