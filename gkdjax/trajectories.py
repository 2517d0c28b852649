"""Responses that the teacher writes for rows without one: written once, kept on disk, read back."""

import json
import pathlib
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from gkdjax import progress
from gkdjax.data.chat import Chat
from gkdjax.errors import UserError
from gkdjax.types import Trajectory

Writer = Callable[[Sequence[np.ndarray], Sequence[int]], list[Trajectory]]  # (prompts, seeds)


def write_once(
    path: pathlib.Path,
    names: Sequence[str],
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    writer: Writer,
    chat: Chat,
    *,
    chunk: int,
    show: bool,
) -> list[Trajectory]:
    """The trajectories of all prompts; those that `path` holds already are not written again.

    They are written in chunks of fixed rows in a fixed order, so that an interrupted run that
    continues here gets the same text as an uninterrupted one. A chunk is on disk before it is used.

    Args:
      path: a JSONL file, a trajectory a line, with its text for people to read.
      names: of the rows, for the file.
      prompts: token ids of the writer's view.
      seeds: one a prompt.
      writer: who writes.
      chat: decodes the text.
      chunk: prompts written at once.
      show: a progress bar.

    Raises:
      UserError: `path` holds the text of other rows, or a line that does not parse.
    """
    done = _read(path, names, prompts)
    done = done[: len(done) // chunk * chunk] if len(done) < len(prompts) else done
    if done:
        _rewrite(path, len(done))
    with (
        progress.bar(len(prompts), "teacher writes", start=len(done), shown=show) as bar,
        path.open("a" if done else "w") as file,
    ):
        for start in range(len(done), len(prompts), chunk):
            rows = slice(start, start + chunk)
            written = writer(prompts[rows], seeds[rows])
            for name, prompt, trajectory in zip(names[rows], prompts[rows], written, strict=True):
                file.write(_line(name, prompt, trajectory, chat))
            file.flush()
            done += written
            bar.update(len(written))
    return done


def _line(name: str, prompt: np.ndarray, trajectory: Trajectory, chat: Chat) -> str:
    record = {
        "row": name,
        "prompt_crc32": _crc32(prompt),
        "text": chat.decode(trajectory.ids),
        "finished": trajectory.finished,
        "ids": trajectory.ids.tolist(),
    }
    return json.dumps(record) + "\n"


def _read(
    path: pathlib.Path, names: Sequence[str], prompts: Sequence[np.ndarray]
) -> list[Trajectory]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # cut off by a crash
        lines.pop()
    if len(lines) > len(names):
        raise _other_rows(path, len(names) + 1)
    trajectories = []
    for number, (line, name, prompt) in enumerate(zip(lines, names, prompts, strict=False), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} does not parse: {error}; remove the file") from None
        if (record["row"], record["prompt_crc32"]) != (name, _crc32(prompt)):
            raise _other_rows(path, number)
        trajectories.append(Trajectory(np.asarray(record["ids"], np.int32), record["finished"]))
    return trajectories


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
