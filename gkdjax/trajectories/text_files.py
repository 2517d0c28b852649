"""Responses on disk: a JSON line each, for people to read and for runs to go on from.

A line has

  row, number      which response of which row of the data: its name, 0.. of trajectory.per_prompt
  writer, step     whose it is ("student", or the teacher's description), and the optimizer step
                   for which it was written, 0 for text written before the first one
  prompt_digest    of the token ids that the writer read
  prefix_digest, prefix_messages, messages    what the teacher's view of the row was rendered from;
                   a prefix stands in the first line that has it, and is null in later ones;
                   `tools` too, where a row has them
  text, finished   the response, and whether it came to its end within trajectory.max_new_tokens
  refused          so many were not accepted, and written again as long as that was allowed
  kept             whether something of the writer's predictions lies beside: see `kept_files`
  ids              the response's token ids

and the student's have `written_at`, the step whose weights wrote it.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gkdjax import progress
from gkdjax.data.chat import Chat
from gkdjax.errors import UserError
from gkdjax.trajectories import kept_files
from gkdjax.trajectories.rules import Written
from gkdjax.types import KeptTopK, Message, Prompt, Trajectory

_LINE_BREAKS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"})
_COLUMNS = {"row": str, "number": int, "writer": str, "step": int, "prompt_digest": str}
_COLUMNS |= {"prefix_digest": str, "messages": list, "text": str, "finished": bool}
_COLUMNS |= {"refused": int, "kept": bool, "ids": list}


class Asked(NamedTuple):
    """One response that is wanted."""

    row: str  # the name of its row
    number: int  # 0.. of those of the row
    prompt: np.ndarray  # int32, the token ids of its writer's view
    prefix: tuple[Message, ...]  # of the row
    turns: tuple[Message, ...]  # of the row
    tools: str = ""  # of the row

    @property
    def prompt_digest(self) -> str:
        """What the prompt is known by from run to run."""
        return _digest(np.asarray(self.prompt, np.int32).tobytes())

    def for_writer(self) -> Prompt:
        """What its writer is given."""
        return Prompt(self.row, self.prompt, self.prefix + self.turns, self.tools)

    def key(self) -> tuple:
        """What a line must have to be this one's."""
        return self.row, self.number, self.prompt_digest


def prefixes_in(records: Sequence[dict]) -> set[str]:
    """The digests of the prefixes that lines have told, to be added to by `line`."""
    return {record["prefix_digest"] for record in records}


def line(asked: Asked, written: Written, chat: Chat, step: int, told: set[str], **more: int) -> str:
    """The line of a response; `told` are the file's prefixes, `more` are columns of its own."""
    trajectory = written.trajectory
    prefix = [message.for_template() for message in asked.prefix]
    prefix_digest = _digest(json.dumps(prefix).encode())
    record = {
        "row": asked.row,
        "number": asked.number,
        "writer": written.author,
        "step": step,
        **more,
        "prompt_digest": asked.prompt_digest,
        "prefix_digest": prefix_digest,
        "prefix_messages": None if prefix_digest in told else prefix,
        "messages": [message.for_template() for message in asked.turns],
        **({"tools": json.loads(asked.tools)} if asked.tools else {}),
        "text": chat.decode(trajectory.ids),
        "finished": trajectory.finished,
        "refused": written.refused,
        "kept": isinstance(trajectory.kept, KeptTopK),
        "ids": trajectory.ids.tolist(),
    }
    told.add(prefix_digest)
    # Readable in every script, and one line to every reader.
    return json.dumps(record, ensure_ascii=False).translate(_LINE_BREAKS) + "\n"


def read(path: pathlib.Path, advice: str, **more: type) -> list[dict]:
    """The records of all whole lines, in order; the last one may have been cut off by a crash.

    Args:
      path: a file; [] if there is none.
      advice: ends the message of an error.
      more: columns of its own, with their types.

    Raises:
      UserError: a line does not parse, or is no response.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except ValueError as error:
        raise UserError(f"{path} is no text: {error}; {advice}") from None
    return [
        _parse(f"{path}:{place}", text, _COLUMNS | more, advice)
        for place, text in enumerate(lines, 1)
    ]


def _parse(where: str, text: str, columns: dict[str, type], advice: str) -> dict:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} does not parse: {error}; {advice}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is no object; {advice}")
    for name, kind in columns.items():
        if type(record.get(name)) is not kind:
            raise UserError(f"{where} has no {name!r}, or not a {kind.__name__}; {advice}")
    if not all(type(i) is int and 0 <= i < 2**31 for i in record["ids"]):
        raise UserError(f"{where}: 'ids' are not all token ids; {advice}")
    return record


def _digest(content: bytes) -> str:
    """64 bits: a response must never be taken for that of another prompt, among millions."""
    return hashlib.sha256(content).hexdigest()[:16]


def key_of(record: dict) -> tuple:
    """What `Asked.key` is to be."""
    return record["row"], record["number"], record["prompt_digest"]


def written_of(record: dict, kept: KeptTopK | None = None) -> Written:
    """The response of a line."""
    trajectory = Trajectory(np.asarray(record["ids"], np.int32), record["finished"], kept)
    return Written(trajectory, record["refused"], record["writer"])


def keep_lines(path: pathlib.Path, count: int) -> None:
    """Cuts the file down to its first `count` lines, in one step."""
    kept = path.read_text(encoding="utf-8").split("\n")[:count]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
    part.replace(path)


def write_once(
    path: pathlib.Path,
    asked: Sequence[Asked],
    write: Callable[[Sequence[int]], list[Written]],
    chat: Chat,
    *,
    step: int,
    chunk: int,
    show: bool,
) -> list[Written]:
    """The responses that are asked for; those that `path` holds already are not written again.

    They are written in chunks of fixed rows in a fixed order, so that an interrupted run that
    continues here gets the same text as an uninterrupted one. A chunk is on disk before it is used,
    and so is what its writer kept of it.

    Args:
      path: the file.
      asked: in the order of its lines.
      write: places in `asked` -> what was written there.
      chat: decodes the text.
      step: for its column.
      chunk: responses written at once.
      show: a progress bar.

    Raises:
      UserError: `path` holds the text of other rows, or a line that is no response.
    """
    records = read(path, "remove the file")
    _check_rows(path, records, asked)
    if len(records) < len(asked):
        records = records[: len(records) // chunk * chunk]
    done = [
        one
        for start in range(0, len(records), chunk)
        for one in _with_kept(path, start, records[start : start + chunk])
    ]
    if done:
        keep_lines(path, len(done))
    told = prefixes_in(records[: len(done)])
    with (
        progress.bar(len(asked), "teacher writes", start=len(done), shown=show) as bar,
        path.open("a" if done else "w", encoding="utf-8") as file,
    ):
        for start in range(len(done), len(asked), chunk):
            places = range(start, min(start + chunk, len(asked)))
            written = [_only_top_k(one) for one in write(places)]
            kept = [w.trajectory.kept for w in written]
            kept_files.write(path, start, [k for k in kept if k is not None])
            for i, one in zip(places, written, strict=True):
                file.write(line(asked[i], one, chat, step, told))
            file.flush()
            done += written
            bar.update(len(written))
    return done


def _check_rows(path: pathlib.Path, records: Sequence[dict], asked: Sequence[Asked]) -> None:
    for place, record in enumerate(records):
        if place == len(asked) or key_of(record) != asked[place].key():
            raise UserError(
                f"{path}:{place + 1} was written for other rows than the data now has: the data,"
                " the chat template or the file of trajectory.reuse changed since this run began."
                " Put them back, or give --workdir another directory"
            )


def _only_top_k(written: Written) -> Written:
    """What is not written to disk is not used: a run that continues would not have it."""
    trajectory = written.trajectory
    if isinstance(trajectory.kept, KeptTopK):
        return written
    return written._replace(trajectory=dataclasses.replace(trajectory, kept=None))


def _with_kept(path: pathlib.Path, start: int, records: Sequence[dict]) -> list[Written]:
    """A chunk as it was written: its lines say of which something was kept beside them."""
    lengths = [len(record["ids"]) for record in records if record["kept"]]
    kept = iter(kept_files.read(path, start, lengths))
    return [written_of(r, next(kept) if r["kept"] else None) for r in records]
