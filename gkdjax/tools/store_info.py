"""Shows what a store of teachers' answers holds, and exports it.

    python -m gkdjax.tools.store_info STORE [--export=FILE.parquet]

STORE is config.teacher.store of a run, which may be writing to it; here it is only read.
"""

import argparse
import datetime
import itertools
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from gkdjax import tools
from gkdjax.teachers.server.store.answers import AnswerStore, Holding, Stored
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import replacing
from gkdjax.utils.text import table

_ROWS = 256  # of a row group; all of them are in memory at once
_HEADER = (
    *("model", "fingerprint", "tokenizer", "kind", "answers", "tokens", "bytes", "a token"),
    *("first", "last"),
)


def describe(store: AnswerStore) -> str:
    """A table of the answers by teacher and kind, and the size of the files."""
    held = store.summary()
    rows = [
        (
            *(holding.model, holding.fingerprint[:12], holding.tokenizer[:12], holding.kind or "-"),
            *_sizes([holding]),
            *map(_date, (holding.first, holding.last)),
        )
        for holding in held
    ]
    rows.append(("total", "", "", "", *_sizes(held), "", ""))
    return f"{table(_HEADER, rows)}\n\n{store.num_bytes():,} bytes on disk"


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
    """Writes all answers to a Parquet file, a row each -> their number.

    Lists of a row have one entry per target; those of `top_ids` and `top_logprobs` one for each of
    the best K that is present. Logprobs are in nats, times in UTC.

    Raises:
      UserError: the file exists already or cannot be written, or an answer is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "--export needs pyarrow, which is not installed: pip install -e '.[datasets]'"
        ) from error
    if path.exists():
        raise UserError(f"{path} is there already; remove it, or name another file")
    ids, logprobs = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema(
        {
            **dict.fromkeys(("key", "model", "fingerprint", "kind"), pyarrow.string()),
            "created": pyarrow.timestamp("s", tz="UTC"),
            **dict.fromkeys(("finished", "lost"), pyarrow.bool_()),
            "target_ids": ids,
            "target_logprobs": logprobs,
            "top_ids": pyarrow.list_(ids),
            "top_logprobs": pyarrow.list_(logprobs),
            "tail_logprobs": logprobs,
        }
    )
    answers, count = store.all(), 0
    with replacing(path) as part, pyarrow.parquet.ParquetWriter(part, schema) as writer:
        while stored := list(itertools.islice(answers, _ROWS)):
            # Read again each time: a run may have added one with the answers.
            models = {teacher.fingerprint: teacher.model for teacher in store.teachers()}
            rows = [_row(one, models[one.fingerprint]) for one in stored]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))
            count += len(rows)
    return count


def _row(stored: Stored, model: str) -> dict:
    answer = stored.answer
    present_nK = answer.top_logprobs > -np.inf
    return {
        "key": stored.key,
        "model": model,
        "fingerprint": stored.fingerprint,
        "kind": stored.kind,
        "created": stored.created,
        "finished": answer.finished,
        "lost": answer.lost,
        "target_ids": answer.target_ids,
        "target_logprobs": answer.target_logprob,
        "top_ids": [ids[kept] for ids, kept in zip(answer.top_ids, present_nK, strict=True)],
        "top_logprobs": [x[kept] for x, kept in zip(answer.top_logprobs, present_nK, strict=True)],
        "tail_logprobs": answer.tail_logprob,
    }


def _show(flags: argparse.Namespace) -> None:
    with AnswerStore(flags.store, read_only=True) as store:
        print(describe(store))
        if flags.export is not None:
            print(f"{export(store, flags.export):,} answers written to {flags.export}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("store_info", description=__doc__.splitlines()[0])
    parser.add_argument("store", metavar="STORE", help="The file of config.teacher.store.")
    parser.add_argument(
        "--export", metavar="FILE.parquet", type=pathlib.Path, help="A file to write."
    )
    return tools.run(parser, _show, argv)


if __name__ == "__main__":
    sys.exit(main())
