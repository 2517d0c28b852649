"""Shows what a Hugging Face model is, and whether it can be a student or a teacher here.

    python -m gkdjax.tools.import_hf --check MODEL

MODEL is a directory or a hub id. There is nothing to convert: a run reads it as it is.
"""

import argparse
import collections
import math
import sys
from collections.abc import Iterator

from gkdjax.data.chat_template import Chat, load_chat
from gkdjax.data.tokenizer_match import tokens_without_row
from gkdjax.models.decoder_config import DecoderConfig, RopeSpec, param_shapes
from gkdjax.models.hf import hub, model_config
from gkdjax.models.hf.load import check_numbers, check_tensors, tensor_places
from gkdjax.models.hf.tensor_files import TensorFiles
from gkdjax.utils.errors import GkdjaxError
from gkdjax.utils.text import size

Row = tuple[str, str]  # what, how much


def describe(model: str) -> Iterator[Row]:
    """Rows of the table, in order; what is wrong is raised where its row would stand.

    Args:
      model: a directory or a hub id.

    Raises:
      UserError: the model cannot be had, or cannot be used: the file, tensor or token is named.
    """
    directory = hub.local_directory(model)
    config, spec = model_config.load_config(directory), model_config.load_spec(directory)
    yield "model", str(directory)
    yield "family", f"{spec.family} (model_type {config['model_type']})"
    yield from _sizes(spec)
    unread = model_config.unread_keys(config)
    if unread:
        yield "not read", f"{', '.join(unread)} of config.json, which transformers passes over too"
    files = TensorFiles(directory)
    known = tensor_places(files, spec, config["model_type"])
    check_tensors(files, spec, known)
    check_numbers(files, known)
    yield from _weights(spec, files, known)
    chat = load_chat(str(directory))
    yield from _tokenizer(spec, chat)


def _sizes(spec: DecoderConfig) -> Iterator[Row]:
    local = spec.num_layers - sum(spec.is_global_L)
    window = f", {local} of them local with a window of {spec.window}" if local else ""
    yield "layers", f"{spec.num_layers}{window}"
    yield "width", f"{spec.width:,}"
    yield "heads", f"{spec.num_heads} of {spec.head_dim}, {spec.num_kv_heads} for keys and values"
    yield "ffn width", f"{spec.ffn_width:,}"
    yield "vocabulary", f"{spec.vocab_size:,} rows"
    yield "rope", _rope(spec.rope_global)
    if spec.rope_local is not None and local:
        yield "rope, local layers", _rope(spec.rope_local)
    yield "head", "tied to the embedding" if spec.tied_embedding else "of its own"


def _rope(rope: RopeSpec) -> str:
    scaling = "not scaled"
    if rope.linear_factor != 1.0:
        scaling = f"positions divided by {rope.linear_factor:g}"
    if rope.llama3 is not None:
        scaling = (
            f"llama3: slow frequencies divided by {rope.llama3.factor:g},"
            f" trained at {rope.llama3.original_length:,} positions"
        )
    return f"theta {rope.theta:,.0f}, {scaling}"


def _weights(spec: DecoderConfig, files: TensorFiles, known: dict) -> Iterator[Row]:
    parameters = sum(math.prod(shape) for shape in param_shapes(spec).values())
    yield "parameters", f"{parameters:,}"
    sizes, dtypes = {}, collections.Counter()
    for name in files.names:
        dtype, count = files.dtype(name), math.prod(files.shape(name))
        sizes[name] = count * dtype.itemsize
        dtypes[dtype.name] += count if name in known else 0
    own, others = ([n for n in files.names if (n in known) == mine] for mine in (True, False))
    shares = ", ".join(f"{name} ({n:,} numbers)" for name, n in dtypes.most_common() if n)
    yield "dtype", dtypes.most_common(1)[0][0] if shares.count("(") == 1 else shares
    yield "tensors", f"{len(own)}, {size(sum(sizes[name] for name in own))}, all accounted for"
    if others:
        of_them = size(sum(sizes[name] for name in others))
        yield "not of the text", f"{len(others)} tensors, {of_them}: not read, exported as they are"


def _tokenizer(spec: DecoderConfig, chat: Chat) -> Iterator[Row]:
    beyond = tokens_without_row(chat, spec.vocab_size)
    count = len(chat.tokenizer.get_vocab())
    padding = spec.vocab_size - (count - len(beyond))
    yield "tokenizer", f"{count:,} tokens, {padding:,} rows of padding"
    if beyond:
        named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:5])
        yield "", f"without a row, never use: {named}"
    yield "stop ids", chat.stop_tokens()
    yield "chat template", f"ends a turn with {chat.end_of_turn}"


def main(argv: list[str] | None = None) -> int:
    """The command -> exit code."""
    parser = argparse.ArgumentParser("import_hf", description=__doc__.splitlines()[0])
    parser.add_argument("--check", required=True, metavar="MODEL", help="A directory or a hub id.")
    given = parser.parse_args(argv)
    try:
        for what, value in describe(given.check):
            print(f"{what:20}{value}")
    except GkdjaxError as error:
        print(f"import_hf: {error}", file=sys.stderr)
        return error.exit_code
    print("fits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
