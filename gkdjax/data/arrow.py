"""Rows of Parquet files and of Hugging Face datasets, both read as Arrow tables.

pyarrow and datasets are extras: they are imported where they are used, and asked for by name.

A column whose values are of several types is one of JSON texts (arrow.json), and `datasets` writes
a string as it stands if it reads as JSON, and with quotes if not. So strings, lists and objects are
decoded, and what may be a number or the text of one stays `Ambiguous`, and is refused where it is
read. A text in quotes of its own looks like one without them, and is read so: the log says it.
Objects in a table have all fields of all rows: those that are null are left out.
"""

import importlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from absl import logging

from gkdjax.data.row_schema import Ambiguous
from gkdjax.utils.errors import UserError, one_line

_ROWS = 1024  # that are Python objects at once
_QUOTED = 64  # strings in quotes, one after the other, that nobody has written so
_JSON = (".json", ".jsonl", ".ndjson")


def parquet_rows(source: str, where: str) -> Iterator[tuple[str, dict]]:
    """("rows.parquet:17", row) for each row of a Parquet file.

    Raises:
      UserError: no such file, none that pyarrow reads, a string that is not UTF-8, or no pyarrow.
    """
    arrow = _extra("pyarrow", where)
    parquet = _extra("pyarrow.parquet", where)
    path = pathlib.Path(source)
    if not path.exists():  # pyarrow's own words for it are many
        raise UserError(f"{where}: No such file or directory")
    try:
        with parquet.ParquetFile(path) as file:
            yield from _rows(file.iter_batches(batch_size=_ROWS), path.name)
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{where}: cannot be read as Parquet: {one_line(error)}") from error


def json_files(path: pathlib.Path, config: str | None, where: str) -> dict[str, list[str]] | None:
    """Split -> its files, of a directory that is JSON and nothing else, as `datasets` finds them.

    None if it is none: a dataset saved to disk, files of another kind, or metadata that say how the
    files are to be changed.
    """
    datasets = _extra("datasets", where)
    if _is_saved(path):
        return None
    try:
        # A cache would bring what it once made of these files. With "./", or datasets might take
        # the name for one on the hub.
        with tempfile.TemporaryDirectory() as cache:
            builder = datasets.load_dataset_builder(str(path.absolute()), config, cache_dir=cache)
    except Exception as error:  # of several libraries, and of other ones with each release
        raise _unreadable(where, error) from error
    own = builder.config
    if type(builder).__module__ != "datasets.packaged_modules.json.json":
        return None
    plain = own.field is None and own.encoding == "utf-8" and builder.info.features is None
    files = {str(split): list(map(str, listed)) for split, listed in own.data_files.items()}
    of_text = all(file.endswith(_JSON) for listed in files.values() for file in listed)
    return files if plain and of_text else None


def parts_of(split: str, lengths: Mapping[str, int], where: str) -> Sequence[tuple[str, int, int]]:
    """Of a split as "train[:500]+test": (name, first row, row after the last) of each part."""
    datasets = _extra("datasets", where)
    try:
        return _parts_of(datasets, split, lengths)
    except UserError:  # of the rows, which are read to be counted
        raise
    except Exception as error:
        raise _unreadable(where, error) from error


def directory_rows(
    path: pathlib.Path, config: str | None, split: str | None, where: str
) -> Iterator[tuple[str, dict]]:
    """Rows of a directory: one of `save_to_disk`, or whatever `datasets.load_dataset` reads.

    Args:
      path: the directory.
      config: None: the only one.
      split: as "train[:500]"; None: the only one.
      where: starts the errors.

    Raises:
      UserError: no such split or config, several and none named, a damaged file, or no datasets.
    """
    datasets = _extra("datasets", where)
    saved = _is_saved(path)
    if saved and config is not None:
        raise UserError(f"{where}: a dataset saved to disk has no configs; write NAME:SPLIT")
    try:
        if saved:
            loaded = _part_of(datasets, datasets.load_from_disk(str(path)), split)
        else:
            loaded = _loaded(datasets, str(path.absolute()), config, split)
    except Exception as error:
        raise _unreadable(where, error) from error
    return _dataset_rows(datasets, loaded, path.absolute().name, split, where)


def hub_rows(
    name: str, config: str | None, split: str | None, where: str
) -> Iterator[tuple[str, dict]]:
    """Rows of a dataset of the Hugging Face hub, through its own cache; see `directory_rows`."""
    datasets = _extra("datasets", where)
    try:
        loaded = _loaded(datasets, name, config, split)
    except Exception as error:
        # Only what datasets says about splits and configs is repeated: addresses and headers
        # can stand in the words of others, and with them the token.
        said = str(error) if type(error) is ValueError else type(error).__name__
        raise UserError(
            f"{where}: no file or directory here, and the hub did not give it: {said}. Check the"
            " spelling, the network and HF_HUB_OFFLINE; for a gated dataset set HF_TOKEN"
        ) from None
    return _dataset_rows(datasets, loaded, name, split, where)


def _loaded(datasets, name: str, config: str | None, split: str | None):
    """What `load_dataset` makes of it; of CSV, every cell that is not empty as its text.

    pandas would make 1 of 01, and nothing of the words None, NA, null and nan.
    """
    loaded = datasets.load_dataset(name, config, split=split)
    parts = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    if parts[0].info.builder_name != "csv":
        return loaded
    text = datasets.Features({c: datasets.Value("string") for c in parts[0].column_names})
    how = {"features": text, "keep_default_na": False, "na_values": [""]}
    return datasets.load_dataset(name, config, split=split, **how)


def _is_saved(path: pathlib.Path) -> bool:
    return any((path / name).exists() for name in ("dataset_dict.json", "state.json"))


def _unreadable(where: str, error: Exception) -> UserError:
    cause = f": {error.__cause__}" if error.__cause__ else ""
    told = " ".join(f"{error}{cause}".split())
    return UserError(f"{where}: cannot be read as a dataset: {told}")


def _extra(module: str, where: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{where}: needs {module.partition('.')[0]}, which is not installed: pip install"
            " -e '.[datasets]'"
        ) from error


def _part_of(datasets, saved, split: str | None):
    """The split of a dataset that was saved to disk, as `load_dataset` would cut it."""
    if split is None:
        return saved
    if not isinstance(saved, datasets.DatasetDict):
        saved = {str(saved.split or "train"): saved}  # load_dataset's name for the one of a file
    parts = _parts_of(datasets, split, {name: len(rows) for name, rows in saved.items()})
    return datasets.concatenate_datasets(
        [saved[name].select(range(start, end)) for name, start, end in parts]
    )


def _parts_of(datasets, split: str, lengths: Mapping[str, int]) -> list[tuple[str, int, int]]:
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(part.splitname, part.from_, part.to) for part in parts]


def _dataset_rows(datasets, loaded, name: str, split: str | None, where: str):
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            splits = ", ".join(loaded)
            raise UserError(f"{where}: which split of {splits}? Write {name}:{next(iter(loaded))}")
        ((split, loaded),) = loaded.items()
    label = f"{name}:{split}" if split else name
    # As Arrow and not decoded: images and sounds beside the text are nothing that is read.
    of_json = loaded.info.builder_name == "json"
    return _rows(loaded.with_format("arrow").iter(batch_size=_ROWS), label, of_json)


def _rows(batches: Iterable, label: str, of_json: bool = False) -> Iterator[tuple[str, dict]]:
    start, decoders = 0, None
    for batch in batches:
        names = batch.column_names
        twice = [name for name in names if names.count(name) > 1]
        if twice:  # a dict would keep the last and say nothing
            raise UserError(f"{label}: has the column {twice[0]!r} twice; keep one")
        if decoders is None:  # once, they keep an eye on what they see
            watched = label if of_json else None
            decoders = [_decoder(batch.schema.field(i), watched) for i in range(len(names))]
        columns = [_values(batch, i, decode, label, start) for i, decode in enumerate(decoders)]
        for i, values in enumerate(zip(*columns, strict=True)):
            yield f"{label}:{start + i}", dict(zip(names, values, strict=True))
        start += batch.num_rows


def _values(batch, place: int, decode: Callable | None, label: str, start: int) -> list:
    """A column as Python objects."""
    field, column = batch.schema.field(place), batch.column(place)
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError) as error:  # not UTF-8; a date beyond Python's
        row = next(row for row in range(len(column)) if not _decodes(column[row]))
        what = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise UserError(f"{label}:{start + row}: {field.name} {what}: {error}") from error
    return values if decode is None else [None if v is None else decode(v) for v in values]


def _decodes(value) -> bool:
    try:
        value.as_py()
    except (ValueError, OverflowError):
        return False
    return True


def _decoder(field, watched: str | None) -> Callable | None:
    """A function of the values of an Arrow field that are not null; None: they stay.

    Strings of the dataset `watched` are looked at: see `_Watch`.
    """
    types, of = _extra("pyarrow.types", field.name), field.type
    marks = field.metadata or {}  # where pyarrow does not know the type
    named = getattr(of, "extension_name", "") or ""
    if named == "arrow.json" or marks.get(b"ARROW:extension:name") == b"arrow.json":
        return _JsonText(field.name)
    if types.is_struct(of):
        parts = [of.field(i) for i in range(of.num_fields)]
        inner = [(part.name, _decoder(part, watched)) for part in parts]
        return lambda value: {
            name: value[name] if decode is None else decode(value[name])
            for name, decode in inner
            if value[name] is not None
        }
    if types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of):
        decode = _decoder(of.value_field, watched)
        if decode is not None:
            return lambda value: [None if one is None else decode(one) for one in value]
    if watched is not None and (types.is_string(of) or types.is_large_string(of)):
        return _Watch(watched, field.name)
    return None


class _JsonText:
    """Decodes JSON texts, and says once that quotes around all of a text are lost."""

    def __init__(self, name: str):
        self._name, self._told = name, False

    def __call__(self, stored: str) -> object:
        value = _json_value(stored)
        if isinstance(value, str) and not self._told:
            self._told = True
            logging.warning(
                "%r is a column of type arrow.json, which stores some strings in quotes: a text"
                " that stood in quotes of its own is read without them; where there are such, name"
                " the JSON file that the rows were in",
                self._name,
            )
        return value


class _Watch:
    """Lets strings pass, unless many on end are JSON texts of strings.

    Where a late value of a JSON file is no string, `datasets` writes that whole part of the column,
    some megabytes, as JSON text, and calls it a column of strings all the same.
    """

    def __init__(self, dataset: str, name: str):
        self._dataset, self._name, self._quoted = dataset, name, 0

    def __call__(self, value: str) -> str:
        plain = value[:1] not in '"[{-0123456789tfn' or _json_value(value) == value
        if plain:
            self._quoted = 0
        elif value[0] == '"':  # numbers and the like between them change nothing
            self._quoted += 1
        if self._quoted == _QUOTED:
            raise UserError(
                f"{self._dataset}: {_QUOTED} values of {self._name!r} on end are JSON text in"
                " quotes: datasets writes strings so where a later one of its JSON file is no"
                " string; download the files, and name their directory"
            )
        return value


def _json_value(stored: str) -> object:
    """A string, list or object as it was; what may be text or not stays `Ambiguous`."""
    try:
        value = json.loads(stored)
    except json.JSONDecodeError:
        return stored  # text that was left as it is
    except (ValueError, RecursionError):  # too many digits, too deep
        return Ambiguous(stored, None)
    return value if isinstance(value, str | list | dict) else Ambiguous(stored, value)
