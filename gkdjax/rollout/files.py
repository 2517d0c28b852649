"""Responses on disk: a JSON line each, for people to read and for runs to go on from.

A line has

  row, number      which response of which row of the data: its name, 0.. of rollout.per_prompt
  writer, step     whose it is ("student", or the teacher's description), and the optimizer step
                   for which it was written, 0 for text written before the first one
  prompt_digest    of the token ids that the writer read
  prefix_digest, prefix_messages, messages    what the teacher's view of the row was rendered from;
                   a prefix stands in the first line that has it, and is null in later ones;
                   `tools` too, where a row has them
  text, finished   the response, and whether it came to its end within rollout.max_new_tokens
  refused          so many were not accepted, and written again as long as that was allowed
  kept             whether something of the writer's predictions lies beside, see below
  ids              the response's token ids

and the student's have `written_at`, the step whose weights wrote it.

What a teacher predicted where it wrote its text, on disk beside the lines of that text.

The text of RUN/NAME.jsonl is written in chunks of lines. What was kept of a chunk is a file in
RUN/NAME.kept, named after the chunk's first line (from 0): the top k of its tokens, response after
response, of those lines that say that something was kept.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import safetensors
import safetensors.numpy

from gkdjax.data.chat_template import Chat
from gkdjax.losses import TopKLogprobs
from gkdjax.types import Completion, Prompt, TokenTopK
from gkdjax.utils import text as utils_text
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import replacing, write_text

_LINE_BREAKS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"})
_COLUMNS = {"row": str, "number": int, "writer": str, "step": int, "prompt_digest": str}
_COLUMNS |= {"prefix_digest": str, "messages": list, "text": str, "finished": bool}
_COLUMNS |= {"refused": int, "kept": bool, "ids": list}


def prefixes_in(records: Sequence[dict]) -> set[str]:
    """The digests of the prefixes that lines have told, to be added to by `line`."""
    return {record["prefix_digest"] for record in records}


def line(
    asked: Prompt, completion: Completion, chat: Chat, step: int, told: set[str], **more: int
) -> str:
    """The line of a response; `told` are the file's prefixes, `more` are columns of its own."""
    prefix = [message.for_template() for message in asked.messages[: asked.prefix]]
    row, number, prompt_digest = asked.key()
    prefix_digest = utils_text.digest(json.dumps(prefix).encode())
    record = {
        "row": row,
        "number": number,
        "writer": completion.author,
        "step": step,
        **more,
        "prompt_digest": prompt_digest,
        "prefix_digest": prefix_digest,
        "prefix_messages": None if prefix_digest in told else prefix,
        "messages": [message.for_template() for message in asked.messages[asked.prefix :]],
        **({"tools": json.loads(asked.tools)} if asked.tools else {}),
        "text": chat.decode(completion.ids),
        "finished": completion.finished,
        "refused": completion.refused,
        "kept": isinstance(completion.kept, TokenTopK),
        "ids": completion.ids.tolist(),
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


def key_of(record: dict) -> tuple:
    """What `Prompt.key` is to be."""
    return record["row"], record["number"], record["prompt_digest"]


def written_of(record: dict, kept: TokenTopK | None = None) -> Completion:
    """The response of a line."""
    ids = np.asarray(record["ids"], np.int32)
    return Completion(ids, record["finished"], kept, record["refused"], record["writer"])


def keep_lines(path: pathlib.Path, count: int) -> None:
    """Cuts the file down to its first `count` lines, in one step."""
    kept = path.read_text(encoding="utf-8").split("\n")[:count]
    write_text(path, "".join(text + "\n" for text in kept))


def write_once(
    path: pathlib.Path,
    asked: Sequence[Prompt],
    write: Callable[[Sequence[int]], list[Completion]],
    chat: Chat,
    *,
    step: int,
    chunk: int,
    show: bool,
) -> list[Completion]:
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
        utils_text.bar(len(asked), "teacher writes", start=len(done), shown=show) as bar,
        path.open("a" if done else "w", encoding="utf-8") as file,
    ):
        for start in range(len(done), len(asked), chunk):
            places = range(start, min(start + chunk, len(asked)))
            written = [_only_top_k(one) for one in write(places)]
            kept = [w.kept for w in written]
            write_kept(path, start, [k for k in kept if k is not None])
            for i, one in zip(places, written, strict=True):
                file.write(line(asked[i], one, chat, step, told))
            file.flush()
            done += written
            bar.update(len(written))
    return done


def _check_rows(path: pathlib.Path, records: Sequence[dict], asked: Sequence[Prompt]) -> None:
    for place, record in enumerate(records):
        if place == len(asked) or key_of(record) != asked[place].key():
            raise UserError(
                f"{path}:{place + 1} was written for other rows than the data now has: the data,"
                " the chat template or the file of rollout.reuse changed since this run began."
                " Put them back, or give --workdir another directory"
            )


def _only_top_k(completion: Completion) -> Completion:
    """What is not written to disk is not used: a run that continues would not have it."""
    if isinstance(completion.kept, TokenTopK):
        return completion
    return dataclasses.replace(completion, kept=None)


def _with_kept(path: pathlib.Path, start: int, records: Sequence[dict]) -> list[Completion]:
    """A chunk as it was written: its lines say of which something was kept beside them."""
    lengths = [len(record["ids"]) for record in records if record["kept"]]
    kept = iter(read_kept(path, start, lengths))
    return [written_of(r, next(kept) if r["kept"] else None) for r in records]


def write_kept(path: pathlib.Path, start: int, kept: Sequence[TokenTopK]) -> None:
    """Writes what was kept of a chunk, of one K and one temperature.

    Args:
      path: of the lines.
      start: number of the chunk's first line.
      kept: of each of its responses that has something; with none, no file is made.
    """
    if not kept:
        return
    rows = {
        "ids": [k.topk.ids for k in kept],
        "logprobs": [k.topk.logprobs for k in kept],
        "tail_logprob": [k.topk.tail_logprob for k in kept],
        "target_logprob": [k.target_logprob for k in kept],
    }
    final = _file(path, start)
    final.parent.mkdir(exist_ok=True)
    tensors = {name: np.concatenate(parts) for name, parts in rows.items()}
    metadata = {"temperature": repr(kept[0].topk.temperature)}
    with replacing(final) as part:
        safetensors.numpy.save_file(tensors, part, metadata=metadata)


def read_kept(path: pathlib.Path, start: int, lengths: Sequence[int]) -> list[TokenTopK]:
    """What `write` was given.

    Args:
      lengths: tokens of each of these responses; with none, no file is read.

    Raises:
      UserError: the file is damaged, is gone, or holds another number of tokens.
    """
    if not lengths:
        return []
    file = _file(path, start)
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            temperature = float(handle.metadata()["temperature"])
            names = handle.keys()
            tensors = {name: handle.get_tensor(name) for name in names}
        if any(len(tensor) != sum(lengths) for tensor in tensors.values()):
            raise ValueError(f"it does not hold the {sum(lengths)} tokens of its responses")
    except Exception as error:  # safetensors raises its own type for each kind of damage
        raise UserError(
            f"{file} cannot be read: {error}; remove {file.parent} and {path}"
        ) from None
    parts = {name: np.split(tensor, np.cumsum(lengths)[:-1]) for name, tensor in tensors.items()}
    rows = zip(parts["ids"], parts["logprobs"], parts["tail_logprob"], strict=True)
    return [
        TokenTopK(TopKLogprobs(*row, temperature), target)
        for row, target in zip(rows, parts["target_logprob"], strict=True)
    ]


def kept_starts(path: pathlib.Path) -> list[int]:
    """The first lines of the chunks of which something was kept, in order; [] without any."""
    return sorted(int(file.stem) for file in path.with_suffix(".kept").glob("*.safetensors"))


def _file(path: pathlib.Path, start: int) -> pathlib.Path:
    return path.with_suffix(".kept") / f"{start:08d}.safetensors"
