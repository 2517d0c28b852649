"""Responses that the teacher writes for rows without one: written once, kept on disk, read back."""

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from gkdjax import progress
from gkdjax.data.chat import Chat
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
    """
    done = _read(path)
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
            for name, trajectory in zip(names[rows], written, strict=True):
                file.write(_line(name, trajectory, chat))
            file.flush()
            done += written
            bar.update(len(written))
    return done


def _line(name: str, trajectory: Trajectory, chat: Chat) -> str:
    record = {
        "row": name,
        "text": chat.decode(trajectory.ids),
        "finished": trajectory.finished,
        "ids": trajectory.ids.tolist(),
    }
    return json.dumps(record) + "\n"


def _read(path: pathlib.Path) -> list[Trajectory]:
    if not path.exists():
        return []
    trajectories = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):  # cut off by a crash
            break
        record = json.loads(line)
        trajectories.append(Trajectory(np.asarray(record["ids"], np.int32), record["finished"]))
    return trajectories


def _rewrite(path: pathlib.Path, lines: int) -> None:
    """Cuts the file down to its first `lines` lines, in one step."""
    kept = path.read_text().splitlines(keepends=True)[:lines]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept))
    part.replace(path)
