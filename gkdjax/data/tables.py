"""Rows of Parquet files and of Hugging Face datasets, both read as Arrow tables.

pyarrow and datasets are extras: they are imported where they are used, and asked for by name.
"""

import importlib
import pathlib
from collections.abc import Callable, Iterable, Iterator

from gkdjax.errors import UserError

_ROWS = 1024  # that are Python objects at once


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
        raise UserError(f"{where}: cannot be read as Parquet: {error}") from error


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
    saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
    if saved and config is not None:
        raise UserError(f"{where}: a dataset saved to disk has no configs; write NAME:SPLIT")
    try:
        if saved:
            loaded = _part_of(datasets, datasets.load_from_disk(str(path)), split)
        else:
            # With "./", or datasets might take the name for one on the hub.
            loaded = datasets.load_dataset(str(path.absolute()), config, split=split)
    except Exception as error:  # of several libraries, and of other ones with each release
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise UserError(f"{where}: cannot be read as a dataset: {error}{cause}") from error
    return _dataset_rows(datasets, loaded, path.absolute().name, split, where)


def hub_rows(
    name: str, config: str | None, split: str | None, where: str
) -> Iterator[tuple[str, dict]]:
    """Rows of a dataset of the Hugging Face hub, through its own cache; see `directory_rows`."""
    datasets = _extra("datasets", where)
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        # Only what datasets says about splits and configs is repeated: addresses and headers
        # can stand in the words of others, and with them the token.
        said = str(error) if type(error) is ValueError else type(error).__name__
        raise UserError(
            f"{where}: no file or directory here, and the hub did not give it: {said}. Check the"
            " spelling, the network and HF_HUB_OFFLINE; for a gated dataset set HF_TOKEN"
        ) from None
    return _dataset_rows(datasets, loaded, name, split, where)


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
    instruction = datasets.ReadInstruction.from_spec(split)
    parts = instruction.to_absolute({name: len(rows) for name, rows in saved.items()})
    return datasets.concatenate_datasets(
        [saved[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _dataset_rows(datasets, loaded, name: str, split: str | None, where: str):
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            splits = ", ".join(loaded)
            raise UserError(f"{where}: which split of {splits}? Write {name}:{next(iter(loaded))}")
        ((split, loaded),) = loaded.items()
    label = f"{name}:{split}" if split else name
    # As Arrow and not decoded: images and sounds beside the text are nothing that is read.
    return _rows(loaded.with_format("arrow").iter(batch_size=_ROWS), label)


def _rows(batches: Iterable, label: str) -> Iterator[tuple[str, dict]]:
    start = 0
    for batch in batches:
        names = batch.column_names
        twice = [name for name in names if names.count(name) > 1]
        if twice:  # a dict would keep the last and say nothing
            raise UserError(f"{label}: has the column {twice[0]!r} twice; keep one")
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:
            column, row = _undecodable(names, batch.num_rows, batch.column)
            raise UserError(f"{label}:{start + row}: {column} is not UTF-8: {error}") from error
        yield from ((f"{label}:{start + i}", row) for i, row in enumerate(rows))
        start += batch.num_rows


def _undecodable(names: list[str], rows: int, column: Callable) -> tuple[str, int]:
    for row in range(rows):
        for name in names:
            try:
                column(name)[row].as_py()
            except UnicodeDecodeError:
                return name, row
    raise AssertionError("every value decodes")
