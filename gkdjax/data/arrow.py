"""Rows of Parquet files and of Hugging Face datasets, both read as Arrow tables.

A column whose values are of several types is one of JSON texts (arrow.json), and `datasets` writes
a string as it stands if it reads as JSON, and with quotes if not. So strings, lists and objects are
decoded, and a value that may be a number or the text of one stays `Ambiguous`, and is refused where
it is read. Objects in a table have all fields of all rows: null ones are left out.
"""

import contextlib
import importlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from absl import logging

from gkdjax.data.row_schema import Ambiguous
from gkdjax.utils.errors import UserError, one_line

_ROWS = 1024  # that are Python objects at once
_MOST_QUOTED = 64  # consecutive strings in quotes that nobody has written so
_JSON = (".json", ".jsonl", ".ndjson")


def parquet_rows(source: str, where: str) -> Iterator[tuple[str, dict]]:
    """("rows.parquet:17", row) for each row of a Parquet file."""
    arrow, parquet = _extra("pyarrow", where), _extra("pyarrow.parquet", where)
    if not os.path.exists(source):  # pyarrow's own message for it is long
        raise UserError(f"{where}: No such file or directory")
    try:
        with parquet.ParquetFile(source) as file:
            batches = file.iter_batches(batch_size=_ROWS)
            yield from _rows(batches, pathlib.Path(source).name)
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{where}: cannot be read as Parquet: {one_line(error)}") from error


def json_files(directory: str, config: str | None, where: str) -> dict[str, list[str]] | None:
    """Split -> its files, as `datasets` finds them, of a directory of plain JSON; None: another.

    That is a dataset saved to disk, other files, or metadata by which JSON is to be changed.
    """
    datasets = _extra("datasets", where)
    if _is_saved(directory):
        return None
    # A cache would bring what it once made of these files, and a relative path may be a hub id.
    with _reading(where), tempfile.TemporaryDirectory() as cache:
        path = os.path.abspath(directory)
        builder = datasets.load_dataset_builder(path, config, cache_dir=cache)
    own = builder.config
    if type(builder).__module__ != "datasets.packaged_modules.json.json":
        return None
    plain = own.field is None and own.encoding == "utf-8" and builder.info.features is None
    files = {str(split): list(map(str, listed)) for split, listed in own.data_files.items()}
    of_text = all(file.endswith(_JSON) for listed in files.values() for file in listed)
    return files if plain and of_text else None


def split_parts(split: str, lengths: Mapping[str, int], where: str) -> list[tuple[str, int, int]]:
    """(name, first row, row after the last) of each part of a split as "train[:500]+test"."""
    datasets = _extra("datasets", where)
    with _reading(where):
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(part.splitname, part.from_, part.to) for part in parts]


def only_split(splits: Sequence[str], name: str, where: str) -> str:
    """The one split of a dataset; UserError if there are several."""
    if len(splits) > 1:
        raise UserError(f"{where}: which split of {', '.join(splits)}? Write {name}:{splits[0]}")
    return splits[0]


def dataset_rows(
    name: str, config: str | None, split: str | None, where: str
) -> Iterator[tuple[str, dict]]:
    """("name:split:17", row) for each row of a directory or of a dataset of the hub.

    Without a config or a split, such as "train[:500]", it is the only one. `where` starts errors.
    """
    datasets = _extra("datasets", where)
    is_directory, is_saved = os.path.isdir(name), _is_saved(name)
    if is_saved and config is not None:
        raise UserError(f"{where}: a dataset saved to disk has no configs; write NAME:SPLIT")
    if is_directory:
        with _reading(where):
            if is_saved:
                loaded = _part_of(datasets, datasets.load_from_disk(name), split, where)
            else:
                loaded = _loaded(datasets, os.path.abspath(name), config, split)
        name = pathlib.Path(name).absolute().name
    else:
        try:
            loaded = _loaded(datasets, name, config, split)
        except Exception as error:
            # Messages of other libraries can hold addresses and headers, and with them the token.
            reason = str(error) if type(error) is ValueError else type(error).__name__
            raise UserError(
                f"{where}: no file or directory here, and the hub did not give it: {reason}. Check"
                " the spelling, the network and HF_HUB_OFFLINE; for a gated dataset set HF_TOKEN"
            ) from None
    if isinstance(loaded, datasets.DatasetDict):
        split = only_split([*loaded], name, where)
        loaded = loaded[split]
    # As Arrow and not decoded: nothing reads images and sounds beside the text.
    batches = loaded.with_format("arrow").iter(batch_size=_ROWS)
    of_json = loaded.info.builder_name == "json"
    return _rows(batches, f"{name}:{split}" if split else name, of_json)


def _loaded(datasets, name: str, config: str | None, split: str | None):
    """The dataset; cells of CSV are their text: pandas would change 01, None and NA."""
    loaded = datasets.load_dataset(name, config, split=split)
    part = next(iter(loaded.values())) if isinstance(loaded, dict) else loaded
    if part.info.builder_name != "csv":
        return loaded
    text = datasets.Features({c: datasets.Value("string") for c in part.column_names})
    how = {"features": text, "keep_default_na": False, "na_values": [""]}
    return datasets.load_dataset(name, config, split=split, **how)


def _part_of(datasets, saved, split: str | None, where: str):
    """The split of a dataset that was saved to disk, as `load_dataset` would cut it."""
    if split is None:
        return saved
    if not isinstance(saved, datasets.DatasetDict):
        saved = {str(saved.split or "train"): saved}  # load_dataset's name for that of a file
    parts = split_parts(split, {name: len(rows) for name, rows in saved.items()}, where)
    return datasets.concatenate_datasets(
        [saved[name].select(range(start, end)) for name, start, end in parts]
    )


def _is_saved(directory: str) -> bool:
    marks = ("dataset_dict.json", "state.json")
    return any(os.path.exists(os.path.join(directory, mark)) for mark in marks)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of several libraries, and of other ones with each release
        cause = f": {error.__cause__}" if error.__cause__ else ""
        reason = " ".join(f"{error}{cause}".split())
        raise UserError(f"{where}: cannot be read as a dataset: {reason}") from error


def _extra(module: str, where: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = f"needs {module.partition('.')[0]}: pip install -e '.[datasets]'"
        raise UserError(f"{where}: {install}") from error


def _rows(batches: Iterable, label: str, of_json: bool = False) -> Iterator[tuple[str, dict]]:
    start, decoders = 0, None
    for batch in batches:
        names = batch.column_names
        twice = [name for name in names if names.count(name) > 1]
        if twice:  # a dict would silently keep the last
            raise UserError(f"{label}: has the column {twice[0]!r} twice; keep one")
        if decoders is None:  # once: they count what they see
            decoders = [_decoder(field, label if of_json else None) for field in batch.schema]
        columns = [_values(batch, i, decode, label, start) for i, decode in enumerate(decoders)]
        for i, values in enumerate(zip(*columns, strict=True)):
            yield f"{label}:{start + i}", dict(zip(names, values, strict=True))
        start += batch.num_rows


def _values(batch, place: int, decode: Callable | None, label: str, start: int) -> list:
    """A column as Python objects."""
    column = batch.column(place)
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):  # not UTF-8; a date beyond Python's
        for row, value in enumerate(column, start):
            try:
                value.as_py()
            except (ValueError, OverflowError) as error:
                is_text, name = isinstance(error, UnicodeDecodeError), batch.column_names[place]
                what = "is not UTF-8" if is_text else "cannot be read"
                raise UserError(f"{label}:{row}: {name} {what}: {error}") from error
        raise
    return values if decode is None else [None if v is None else decode(v) for v in values]


def _decoder(field, dataset: str | None) -> Callable | None:
    """A function of the values of an Arrow field that are not null; None: they stay.

    `dataset` is the name of one that was made from JSON: see `_watch`.
    """
    types, of = _extra("pyarrow.types", field.name), field.type
    named = [getattr(of, "extension_name", None)]
    named.append((field.metadata or {}).get(b"ARROW:extension:name"))  # unknown to pyarrow
    if "arrow.json" in named or b"arrow.json" in named:
        return _json_texts(field.name)
    if types.is_struct(of):
        inner = [
            (part.name, _decoder(part, dataset)) for part in map(of.field, range(of.num_fields))
        ]
        return lambda value: {
            name: value[name] if decode is None else decode(value[name])
            for name, decode in inner
            if value[name] is not None
        }
    if types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of):
        decode = _decoder(of.value_field, dataset)
        if decode is not None:
            return lambda value: [None if one is None else decode(one) for one in value]
    if dataset is not None and (types.is_string(of) or types.is_large_string(of)):
        return _watch(dataset, field.name)
    return None


def _json_texts(column: str) -> Callable[[str], object]:
    """Decodes JSON texts, and warns once that quotes around all of a text are lost."""
    warned = False

    def decode(stored: str) -> object:
        nonlocal warned
        value = _json_value(stored)
        if isinstance(value, str) and not warned:
            warned = True
            logging.warning(
                "%r is a column of type arrow.json: a text that stood in quotes of its own is read"
                " without them; where there are such, name the JSON file of the rows",
                column,
            )
        return value

    return decode


def _watch(dataset: str, column: str) -> Callable[[str], str]:
    """Lets strings pass, unless many in succession are JSON texts of strings.

    Where a late value of a JSON file is no string, `datasets` writes that whole part of the column,
    some megabytes, as JSON text, and calls it a column of strings all the same.
    """
    quoted = 0

    def check(value: str) -> str:
        nonlocal quoted
        if value[:1] not in '"[{-0123456789tfn' or _json_value(value) == value:
            quoted = 0
        elif value[0] == '"':  # numbers and the like between them change nothing
            quoted += 1
        if quoted == _MOST_QUOTED:
            raise UserError(
                f"{dataset}: {quoted} values of {column!r} on end are JSON text in quotes: a later"
                " one is no string; download its JSON files, and name their directory"
            )
        return value

    return check


def _json_value(stored: str) -> object:
    """A string, list or object as it was; a value that may be text stays `Ambiguous`."""
    try:
        value = json.loads(stored)
    except json.JSONDecodeError:
        return stored  # text that was left as it is
    except (ValueError, RecursionError):  # too many digits, too deep
        return Ambiguous(stored, None)
    return value if isinstance(value, str | list | dict) else Ambiguous(stored, value)
