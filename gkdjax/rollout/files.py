"""Keeps responses on disk: a JSON line each, for people to read and for runs to continue from.

A line of RUN/NAME.jsonl has

  row, number      which response of which row of the data: its name, 0.. of rollout.per_prompt
  writer, step     "student" or the teacher's description; the optimizer step for which it was
                   written, 0 for text written before the first one
  prompt_digest    of the token ids that the writer read
  prefix_digest, prefix_messages, messages    what the teacher's view of the row was rendered from,
                   `tools` too; a prefix stands in the first line that has it, later ones have null
  text, finished   the response, and whether it ended within rollout.max_new_tokens
  refused          how many responses were not accepted before, or with, this one
  kept             whether the writer's top k at each of its tokens is on disk, too
  ids              the response's token ids

and a student's line has `written_at`, the step whose weights wrote it.

Lines are written in chunks. RUN/NAME.kept/FIRST.safetensors has the top k of a chunk, FIRST being
its first line (from 0): those of the lines with `kept`, response after response.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import safetensors
import safetensors.numpy

from gkdjax.data.chat_template import Chat
from gkdjax.losses.topk import TokenTopK, TopKLogprobs
from gkdjax.types import Completion, Prompt, digest
from gkdjax.utils import text as utils_text
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import append, write_bytes, write_text, writing

_LINE_BREAKS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"})
_COLUMNS = {"row": str, "number": int, "writer": str, "step": int, "prompt_digest": str}
_COLUMNS |= {"prefix_digest": str, "messages": list, "text": str, "finished": bool}
_COLUMNS |= {"refused": int, "kept": bool, "ids": list}
_TENSORS = "ids", "logprobs", "tail_logprob", "target_logprob"


def line(
    prompt: Prompt, completion: Completion, chat: Chat, step: int, prefixes: set[str], **more
) -> str:
    """Returns the line of a response.

    `prefixes` are digests of those that the file has, to which the line's own is added; `more` are
    further columns.
    """
    row, number, prompt_digest = prompt.key()
    messages = [message.for_template() for message in prompt.messages]
    prefix, turns = messages[: prompt.prefix], messages[prompt.prefix :]
    prefix_digest = digest(json.dumps(prefix).encode())
    record = {
        "row": row,
        "number": number,
        "writer": completion.author,
        "step": step,
        **more,
        "prompt_digest": prompt_digest,
        "prefix_digest": prefix_digest,
        "prefix_messages": None if prefix_digest in prefixes else prefix,
        "messages": turns,
        **({"tools": json.loads(prompt.tools)} if prompt.tools else {}),
        "text": chat.decode(completion.ids),
        "finished": completion.finished,
        "refused": completion.refused,
        "kept": isinstance(completion.cached, TokenTopK),
        "ids": completion.ids.tolist(),
    }
    prefixes.add(prefix_digest)
    # Readable in every script, and one line to every reader.
    return json.dumps(record, ensure_ascii=False).translate(_LINE_BREAKS) + "\n"


def read(path: pathlib.Path, advice: str, **more: type) -> list[dict]:
    """Reads all whole lines of a file; a crash may have cut off the last one; [] without a file.

    Raises:
      UserError: a line does not parse, or lacks a column, also of `more`; it ends with `advice`.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no text that can be read: {error}; {advice}") from None
    records = []
    for place, text in enumerate(lines, 1):
        try:
            records.append(_checked(json.loads(text), _COLUMNS | more))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{place} is no response: {error}; {advice}") from None
    return records


def _checked(record, columns: dict[str, type]) -> dict:
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    for name, kind in columns.items():
        if type(record.get(name)) is not kind:
            raise ValueError(f"it has no {name!r}, or not a {kind.__name__}")
    if not all(type(i) is int and 0 <= i < 2**31 for i in record["ids"]):
        raise ValueError("its 'ids' are not all token ids")
    return record


def key_of(record: dict) -> tuple:
    """Returns what `Prompt.key` of the line's prompt is."""
    return record["row"], record["number"], record["prompt_digest"]


def completion_of(record: dict, cached: TokenTopK | None = None) -> Completion:
    ids = np.asarray(record["ids"], np.int32)
    return Completion(ids, record["finished"], cached, record["refused"], record["writer"])


def keep_lines(path: pathlib.Path, count: int) -> None:
    """Cuts the file down to its first `count` lines, in one step."""
    lines = path.read_text(encoding="utf-8").split("\n")[:count]
    write_text(path, "".join(text + "\n" for text in lines))


def write_once(
    path: pathlib.Path,
    prompts: Sequence[Prompt],
    write: Callable[[Sequence[int]], list[Completion]],
    chat: Chat,
    *,
    step: int,
    chunk: int,
    show: bool,
) -> list[Completion]:
    """Returns a completion of each prompt; those that `path` has already are not written again.

    They are written in chunks of fixed rows in a fixed order, so that an interrupted run that
    continues here gets the same text as an uninterrupted one. A chunk is on disk before it is used;
    so are its top k, and nothing else that the writer predicted is used.

    Args:
      path: the file.
      prompts: in the order of its lines.
      write: places in `prompts` -> their completions.
      chat: decodes the text.
      step: for its column.
      chunk: lines written at once.
      show: a progress bar.

    Raises:
      UserError: `path` has the text of other rows, or a line that is no response.
    """
    records = read(path, "remove the file")
    for place, record in enumerate(records):
        if place == len(prompts) or key_of(record) != prompts[place].key():
            raise UserError(
                f"{path}:{place + 1} was written for other rows than the data now has: the data,"
                " the chat template or the file of rollout.reuse changed since this run began."
                " Put them back, or give --workdir another directory"
            )
    if len(records) < len(prompts):
        records = records[: len(records) // chunk * chunk]
    done: list[Completion] = []
    for start in range(0, len(records), chunk):
        part = records[start : start + chunk]
        cached = iter(read_cached(path, start, [len(r["ids"]) for r in part if r["kept"]]))
        done += [completion_of(r, next(cached) if r["kept"] else None) for r in part]
    if path.exists():
        keep_lines(path, len(done))
    prefixes = {record["prefix_digest"] for record in records}
    with utils_text.bar(len(prompts), "teacher writes", start=len(done), shown=show) as bar:
        for start in range(len(done), len(prompts), chunk):
            places = range(start, min(start + chunk, len(prompts)))
            written = [
                c if isinstance(c.cached, TokenTopK) else dataclasses.replace(c, cached=None)
                for c in write(places)
            ]
            write_cached(path, start, [c.cached for c in written if c.cached is not None])
            lines = (
                line(prompts[place], completion, chat, step, prefixes)
                for place, completion in zip(places, written, strict=True)
            )
            append(path, "".join(lines))
            done += written
            bar.update(len(written))
    return done


def write_cached(path: pathlib.Path, start: int, cached: Sequence[TokenTopK]) -> None:
    """Writes the top k of the chunk that begins at line `start`, of one K and one temperature."""
    if not cached:
        return
    rows = [(k.topk.ids, k.topk.logprobs, k.topk.tail_logprob, k.target_logprob) for k in cached]
    tensors = dict(zip(_TENSORS, map(np.concatenate, zip(*rows, strict=True)), strict=True))
    file = _file(path, start)
    with writing(file):
        file.parent.mkdir(exist_ok=True)
    metadata = {"temperature": repr(cached[0].topk.temperature)}
    # Not the library's own file, which raises no OSError.
    write_bytes(file, safetensors.numpy.save(tensors, metadata))


def read_cached(path: pathlib.Path, start: int, lengths: Sequence[int]) -> list[TokenTopK]:
    """Reads what `write_cached` wrote; `lengths` are the tokens of each response that has a top k.

    Raises:
      UserError: the file is damaged or missing, or has another number of tokens.
    """
    if not lengths:
        return []
    file = _file(path, start)
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            temperature = float(handle.metadata()["temperature"])
            tensors = {name: handle.get_tensor(name) for name in _TENSORS}
        if any(len(tensor) != sum(lengths) for tensor in tensors.values()):
            raise ValueError(f"it does not hold the {sum(lengths)} tokens of its responses")
    except Exception as error:  # safetensors raises its own type for each kind of damage
        advice = f"remove {file.parent} and {path}"
        raise UserError(f"{file} cannot be read: {error}; {advice}") from None
    parts = (np.split(tensors[name], np.cumsum(lengths)[:-1]) for name in _TENSORS)
    return [
        TokenTopK(TopKLogprobs(*topk, temperature), target)
        for *topk, target in zip(*parts, strict=True)
    ]


def cached_starts(path: pathlib.Path) -> list[int]:
    """Returns the first lines of the chunks that have a top k, in order."""
    return sorted(int(file.stem) for file in path.with_suffix(".kept").glob("*.safetensors"))


def _file(path: pathlib.Path, start: int) -> pathlib.Path:
    return path.with_suffix(".kept") / f"{start:08d}.safetensors"
