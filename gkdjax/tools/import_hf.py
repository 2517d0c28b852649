"""Shows what a Hugging Face model is, and whether it can be a student or a teacher here.

    python -m gkdjax.tools.import_hf --check MODEL

MODEL is a directory or a hub id. Nothing has to be converted: a run reads it as it is.
"""

import argparse
import collections
import math
import sys
from collections.abc import Iterator

from gkdjax import tools
from gkdjax.data.chat_template import load_chat
from gkdjax.data.tokenizer_match import tokens_without_row
from gkdjax.models.decoder_config import DecoderConfig, RopeSpec, param_shapes
from gkdjax.models.hf import hub, load, model_config
from gkdjax.models.hf.tensor_files import TensorFiles
from gkdjax.utils.text import size

Row = tuple[str, str]  # name, value


def describe(model: str) -> Iterator[Row]:
    """Yields the rows of the table; an error is raised where its row would stand.

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
    places = load.tensor_places(files, spec, config["model_type"])
    load.check_tensors(files, spec, places)
    load.check_numbers(files, places)
    yield from _weights(spec, files, places)
    chat = load_chat(str(directory))
    beyond = tokens_without_row(chat, spec.vocab_size)
    count = len(chat.tokenizer.get_vocab())
    padding = spec.vocab_size - (count - len(beyond))
    yield "tokenizer", f"{count:,} tokens, {padding:,} rows of padding"
    if beyond:
        named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:5])
        yield "", f"without a row, never use: {named}"
    yield "stop ids", chat.stop_tokens()
    yield "chat template", f"ends a turn with {chat.end_of_turn}"


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


def _weights(spec: DecoderConfig, files: TensorFiles, places: load.Places) -> Iterator[Row]:
    yield "parameters", f"{sum(map(math.prod, param_shapes(spec).values())):,}"
    numbers, sizes = collections.Counter(), {True: [], False: []}  # of the text decoder or not
    for name in files.names:
        dtype, count = files.dtype(name), math.prod(files.shape(name))
        sizes[name in places].append(count * dtype.itemsize)
        if name in places:
            numbers[dtype.name] += count
    shares = ", ".join(f"{name} ({count:,} numbers)" for name, count in numbers.most_common())
    yield "dtype", shares if len(numbers) > 1 else next(iter(numbers))
    own, others = sizes[True], sizes[False]
    yield "tensors", f"{len(own)}, {size(sum(own))}, all accounted for"
    if others:
        total = size(sum(others))
        yield "not of the text", f"{len(others)} tensors, {total}: not read, exported as they are"


def _check(flags: argparse.Namespace) -> None:
    for name, value in describe(flags.check):
        print(f"{name:20}{value}")
    print("fits")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("import_hf", description=__doc__.splitlines()[0])
    parser.add_argument("--check", required=True, metavar="MODEL", help="A directory or a hub id.")
    return tools.run(parser, _check, argv)


if __name__ == "__main__":
    sys.exit(main())
