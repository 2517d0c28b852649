"""Responses: which are accepted, and the teacher's, written once, kept on disk and read back."""

import dataclasses
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from gkdjax import progress
from gkdjax.data.chat import Chat
from gkdjax.data.views import Fate
from gkdjax.errors import UserError
from gkdjax.losses import TopKLogprobs
from gkdjax.types import KeptTopK, Trajectory

Writer = Callable[[Sequence[np.ndarray], Sequence[int]], list[Trajectory]]  # (prompts, seeds)


@dataclasses.dataclass(frozen=True)
class ResponseRules:
    """Which responses are learnt from.

    Attributes:
      pattern: a regular expression that has to be found somewhere in the text; None: any text.
      max_refills: a response that is refused is written again at most so many times.
      max_new_tokens: the longest that it may be.
    """

    pattern: str | None
    max_refills: int
    max_new_tokens: int

    def fate(self, trajectory: Trajectory, chat: Chat) -> Fate:
        """KEPT, EMPTY or UNMATCHED."""
        if len(trajectory.ids) == 0:
            return Fate.EMPTY
        if self.pattern is not None and not re.search(self.pattern, chat.decode(trajectory.ids)):
            return Fate.UNMATCHED
        return Fate.KEPT


class Written(NamedTuple):
    """The last response to a prompt, accepted or not, and how many were refused in all."""

    trajectory: Trajectory
    refused: int


def write_accepted(
    writer: Writer,
    prompts: Sequence[np.ndarray],
    seed: Callable[[int, int], int],
    rules: ResponseRules,
    chat: Chat,
) -> list[Written]:
    """A response to each prompt; one that is refused is written again, up to the rules' bound.

    Args:
      writer: who writes.
      prompts: token ids of the writer's view.
      seed: (index of the prompt, attempt from 0) -> seed.
      rules: what is accepted.
      chat: the writer's.
    """
    refused, trajectories = [0] * len(prompts), [None] * len(prompts)
    places = list(range(len(prompts)))
    for attempt in range(rules.max_refills + 1):
        again = writer([prompts[i] for i in places], [seed(i, attempt) for i in places])
        for i, trajectory in zip(places, again, strict=True):
            trajectories[i] = trajectory
        places = [i for i in places if rules.fate(trajectories[i], chat) is not Fate.KEPT]
        for i in places:
            refused[i] += 1
        if not places:
            break
    return [Written(t, n) for t, n in zip(trajectories, refused, strict=True)]


def write_once(
    path: pathlib.Path,
    names: Sequence[str],
    prompts: Sequence[np.ndarray],
    write: Callable[[Sequence[int]], list[Written]],
    chat: Chat,
    *,
    chunk: int,
    show: bool,
) -> list[Written]:
    """The responses to all prompts; those that `path` holds already are not written again.

    They are written in chunks of fixed rows in a fixed order, so that an interrupted run that
    continues here gets the same text as an uninterrupted one. A chunk is on disk before it is used,
    and so is what its writer kept of it, in the directory `path` with the suffix ".kept".

    Args:
      path: a JSONL file, a response a line, with its text for people to read.
      names: of the rows, for the file.
      prompts: token ids of the writer's view.
      write: indices of prompts -> what was written to them.
      chat: decodes the text.
      chunk: prompts written at once.
      show: a progress bar.

    Raises:
      UserError: `path` holds the text of other rows, or a line that does not parse.
    """
    lines = _read(path, names, prompts)
    lines = lines[: len(lines) // chunk * chunk] if len(lines) < len(prompts) else lines
    done = [
        one
        for start in range(0, len(lines), chunk)
        for one in _with_kept(path, start, lines[start : start + chunk])
    ]
    if done:
        _rewrite(path, len(done))
    with (
        progress.bar(len(prompts), "teacher writes", start=len(done), shown=show) as bar,
        path.open("a" if done else "w") as file,
    ):
        for start in range(len(done), len(prompts), chunk):
            places = range(start, min(start + chunk, len(prompts)))
            written = write(places)
            kept = _write_kept(path, start, written)
            for i, one in zip(places, written, strict=True):
                file.write(_line(names[i], prompts[i], one, kept, chat))
            file.flush()
            done += written
            bar.update(len(written))
    return done


def _line(name: str, prompt: np.ndarray, written: Written, kept: bool, chat: Chat) -> str:
    trajectory = written.trajectory
    record = {
        "row": name,
        "prompt_crc32": _crc32(prompt),
        "text": chat.decode(trajectory.ids),
        "finished": trajectory.finished,
        "refused": written.refused,
        "kept": kept,
        "ids": trajectory.ids.tolist(),
    }
    return json.dumps(record) + "\n"


def _read(path: pathlib.Path, names: Sequence[str], prompts: Sequence[np.ndarray]) -> list[dict]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # cut off by a crash
        lines.pop()
    if len(lines) > len(names):
        raise _other_rows(path, len(names) + 1)
    found = []
    for number, (line, name, prompt) in enumerate(zip(lines, names, prompts, strict=False), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} does not parse: {error}; remove the file") from None
        if (record["row"], record["prompt_crc32"]) != (name, _crc32(prompt)):
            raise _other_rows(path, number)
        found.append(record)
    return found


def _other_rows(path: pathlib.Path, line: int) -> UserError:
    return UserError(
        f"{path}:{line} was written for other rows than the data now has: the data or the chat"
        " template changed since this run began. Put them back, or give --workdir another directory"
    )


def _crc32(prompt: np.ndarray) -> int:
    return zlib.crc32(np.asarray(prompt, np.int32).tobytes())


def _rewrite(path: pathlib.Path, lines: int) -> None:
    """Cuts the file down to its first `lines` lines, in one step."""
    kept = path.read_text().splitlines(keepends=True)[:lines]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept))
    part.replace(path)


def _kept_path(path: pathlib.Path, start: int) -> pathlib.Path:
    return path.with_suffix(".kept") / f"{start:08d}.safetensors"


def _write_kept(path: pathlib.Path, start: int, written: Sequence[Written]) -> bool:
    """Writes the top k of a chunk's tokens, row after row -> whether they were kept."""
    kept = [one.trajectory.kept for one in written]
    if not all(isinstance(k, KeptTopK) for k in kept):
        return False
    rows = {
        "ids": [k.topk.ids for k in kept],
        "logprobs": [k.topk.logprobs for k in kept],
        "tail_logprob": [k.topk.tail_logprob for k in kept],
        "target_logprob": [k.target_logprob for k in kept],
    }
    final = _kept_path(path, start)
    final.parent.mkdir(exist_ok=True)
    part = final.with_name(final.name + ".part")
    safetensors.numpy.save_file(
        {name: np.concatenate(parts) for name, parts in rows.items()},
        part,
        metadata={"temperature": repr(kept[0].topk.temperature)},
    )
    part.replace(final)
    return True


def _with_kept(path: pathlib.Path, start: int, records: list[dict]) -> list[Written]:
    """A chunk as it was written: the lines say whether something of it was kept beside them."""
    chunk = [
        Written(Trajectory(np.asarray(r["ids"], np.int32), r["finished"]), r["refused"])
        for r in records
    ]
    if not all(r["kept"] for r in records):
        return chunk
    kept = _read_kept(path, start, [len(one.trajectory.ids) for one in chunk])
    return [
        one._replace(trajectory=dataclasses.replace(one.trajectory, kept=k))
        for one, k in zip(chunk, kept, strict=True)
    ]


def _read_kept(path: pathlib.Path, start: int, lengths: list[int]) -> list[KeptTopK]:
    file = _kept_path(path, start)
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
        KeptTopK(TopKLogprobs(*row, temperature), target)
        for row, target in zip(rows, parts["target_logprob"], strict=True)
    ]
