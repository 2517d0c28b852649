"""Shows what a store of teachers' answers holds, and exports it.

    python -m gkdjax.tools.store_info STORE [--export=FILE.parquet]

STORE is what a run has as config.teacher.store. It is only read; a run may be writing to it.
"""

import argparse
import datetime
import importlib
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from gkdjax.teachers.server.store.answers import AnswerStore, Holding, Stored
from gkdjax.utils.errors import GkdjaxError, UserError
from gkdjax.utils.files import replacing
from gkdjax.utils.text import table

_ROWS = 256  # of a row group; all of them are in memory at once
_HEADER = (
    *("model", "fingerprint", "tokenizer", "kind", "answers", "tokens", "bytes", "a token"),
    *("first", "last"),
)


def describe(store: AnswerStore) -> str:
    """A table of what it holds by teacher and kind, and the size of its files."""
    held = store.summary()
    rows = [_row(holding) for holding in held]
    rows.append(("total", "", "", "", *_sizes(held), "", ""))
    return f"{table(_HEADER, rows)}\n\n{store.num_bytes():,} bytes on disk"


def _row(holding: Holding) -> tuple[str, ...]:
    return (
        *(holding.model, holding.fingerprint[:12], holding.tokenizer[:12], holding.kind or "-"),
        *_sizes([holding]),
        *(_date(holding.first), _date(holding.last)),
    )


def _sizes(held: Sequence[Holding]) -> tuple[str, str, str, str]:
    answers, tokens, num_bytes = (
        sum(getattr(holding, name) for holding in held)
        for name in ("answers", "tokens", "num_bytes")
    )
    a_token = f"{num_bytes / tokens:.1f}" if tokens else "-"
    return f"{answers:,}", f"{tokens:,}", f"{num_bytes:,}", a_token


def _date(seconds: int | None) -> str:
    if seconds is None:
        return "-"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def export(store: AnswerStore, path: pathlib.Path) -> int:
    """Writes all answers to a Parquet file, a row each -> how many there are.

    Lists of a row have one entry a target, and those of `top_ids` and `top_logprobs` one for each
    of the best K that is there. Logprobs are in nats, times in UTC.

    Raises:
      UserError: the file is there already or cannot be written, or an answer is damaged.
    """
    arrow, parquet = _extra("pyarrow"), _extra("pyarrow.parquet")
    if path.exists():
        raise UserError(f"{path} is there already; remove it, or name another file")
    answers, count = store.all(), 0
    try:
        with replacing(path) as part, parquet.ParquetWriter(part, _schema(arrow)) as writer:
            while rows := list(itertools.islice(answers, _ROWS)):
                # Read again each time: a run may have added one with the answers.
                models = {teacher.fingerprint: teacher.model for teacher in store.teachers()}
                batch = arrow.record_batch(list(_columns(arrow, rows, models)), _schema(arrow))
                writer.write_batch(batch)
                count += len(rows)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    return count


def _schema(arrow):
    ids, logprobs = arrow.list_(arrow.int32()), arrow.list_(arrow.float32())
    return arrow.schema(
        {
            **dict.fromkeys(("key", "model", "fingerprint", "kind"), arrow.string()),
            "created": arrow.timestamp("s", tz="UTC"),
            **dict.fromkeys(("finished", "lost"), arrow.bool_()),
            "target_ids": ids,
            "target_logprobs": logprobs,
            "top_ids": arrow.list_(ids),
            "top_logprobs": arrow.list_(logprobs),
            "tail_logprobs": logprobs,
        }
    )


def _columns(arrow, rows: Sequence[Stored], models: dict[str, str]) -> Iterator:
    """In the order of the schema."""
    answers = [row.answer for row in rows]
    yield [row.key for row in rows]
    yield [models[row.fingerprint] for row in rows]
    yield [row.fingerprint for row in rows]
    yield [row.kind for row in rows]
    yield [row.created for row in rows]
    yield [answer.finished for answer in answers]
    yield [answer.lost for answer in answers]

    def lists(lengths, values):
        offsets = np.cumsum([0, *lengths], dtype=np.int32)
        return arrow.ListArray.from_arrays(arrow.array(offsets), values)

    def a_target(values):
        return lists([len(answer.target_ids) for answer in answers], values)

    there = [answer.top_logprobs > -np.inf for answer in answers]
    counts = np.concatenate([there_nK.sum(axis=1) for there_nK in there])

    def top(name):
        parts = [getattr(answer, name)[kept] for answer, kept in zip(answers, there, strict=True)]
        return a_target(lists(counts, arrow.array(np.concatenate(parts))))

    def one(name):
        return a_target(arrow.array(np.concatenate([getattr(answer, name) for answer in answers])))

    yield one("target_ids")
    yield one("target_logprob")
    yield top("top_ids")
    yield top("top_logprobs")
    yield one("tail_logprob")


def _extra(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            "--export needs pyarrow, which is not installed: pip install -e '.[datasets]'"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """The command -> exit code."""
    parser = argparse.ArgumentParser("store_info", description=__doc__.splitlines()[0])
    parser.add_argument("store", metavar="STORE", help="The file of config.teacher.store.")
    parser.add_argument(
        "--export", metavar="FILE.parquet", type=pathlib.Path, help="A file to write."
    )
    given = parser.parse_args(argv)
    try:
        with AnswerStore(given.store, read_only=True) as store:
            print(describe(store))
            if given.export is not None:
                print(f"{export(store, given.export):,} answers written to {given.export}")
    except GkdjaxError as error:
        print(f"store_info: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
