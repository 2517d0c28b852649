"""A run's directory as it is: of a run that is going on, or was killed, a part is there.

Nothing that is damaged stops the reading: it is left out, and `damaged` says so.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from gkdjax import config as config_lib
from gkdjax.report import results as report_results
from gkdjax.utils.errors import UserError

# What a line must have to be of use.
_COLUMNS = {
    "metrics.jsonl": {
        **dict.fromkeys(("step", "on_policy_rows", "tokens", "compilations"), int),
        **{"loss": float, "divergence": str},
    },
    "eval.jsonl": {"step": int},
    "samples.jsonl": {"step": int, "answers": list},
    "answers.jsonl": {
        **dict.fromkeys(("set", "condition", "name", "question", "answer"), str),
        **{"expected": list, "right": bool},
    },
}
_OF_TRAJECTORIES = {"row": str, "writer": str, "step": int, "messages": list, "text": str}
_EXCERPT = 3  # lines at each end of a file of completions


class Excerpt(NamedTuple):
    """The first and the last lines of a file of completions."""

    name: str
    count: int  # of all lines
    first: list[dict]
    last: list[dict]


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What the files say; what is not there is empty."""

    directory: pathlib.Path
    config: dict
    metrics: list[dict]
    evaluations: list[dict]
    samples: list[dict]
    answers: list[dict]
    found: dict  # the content of results.json, or as much of it as is known
    missing: list[str]  # what a finished run has and this one has not, in words; [] if it has all
    damaged: list[str]  # what could not be read, in words

    @property
    def state(self) -> str:
        """How far it got, as "finished, 300 steps"."""
        if not self.missing:
            return f"finished, {self.found['steps']:,} steps"
        done = self.found.get("steps") or 0
        return f"not finished, step {done:,} of {self._planned()}"

    def _planned(self) -> str:
        train = self.config.get("train") or {}
        if train.get("steps"):
            return f"{train['steps']:,}"
        return f"{train['epochs']} epochs" if train.get("epochs") else "an unknown number"


def read(directory: pathlib.Path) -> RunFiles:
    """Reads all but the completions, for which there is `excerpts`.

    Raises:
      UserError: it is no run's directory.
    """
    config = _read_config(directory)
    damaged: list[str] = []

    def lines(name: str) -> list[dict]:
        found, told = read_lines(directory / name)
        damaged.extend(told)
        return found

    def whole(name: str) -> dict | None:
        found, told = _read_object(directory / name)
        damaged.extend(told)
        return found

    metrics, evaluations = lines("metrics.jsonl"), lines("eval.jsonl")
    before, results = whole("before.json"), whole("results.json")
    found = results
    if results is None:
        found = report_results.so_far(before or {}, evaluations)
        found |= report_results.training(metrics) if metrics else {}
    return RunFiles(
        directory=directory,
        config=config,
        metrics=metrics,
        evaluations=evaluations,
        samples=lines("samples.jsonl"),
        answers=lines("answers.jsonl"),
        found=found,
        missing=[] if results is not None else [*_missing(metrics, evaluations, before)],
        damaged=damaged,
    )


def read_lines(path: pathlib.Path) -> tuple[list[dict], list[str]]:
    """(the whole lines of a file, what was left out in words); ([], []) if there is none.

    Args:
      path: of a file of a run with the name that it has there.
    """
    if not path.exists():
        return [], []
    columns = _COLUMNS[path.name]
    parsed = [_parse(line, columns) for line in _split(path.read_bytes())]
    bad = [place for place, record in enumerate(parsed, 1) if record is None]
    told = []
    if bad and bad[-1] == len(parsed):
        told.append(f"{path.name}: the last line is cut off, and left out")
        bad.pop()
    if bad:
        some = ", ".join(map(str, bad[:3])) + (", ..." if len(bad) > 3 else "")
        told.append(f"{path.name}: lines that cannot be read are left out ({len(bad)}: {some})")
    return [record for record in parsed if record is not None], told


def excerpts(directory: pathlib.Path) -> list[Excerpt]:
    """Of all files of completions, in the order of their names and steps."""
    paths = sorted(directory.glob("trajectories_*.jsonl"), key=_by_number)
    return [_excerpt(path) for path in paths]


def _excerpt(path: pathlib.Path) -> Excerpt:
    count, first, last = 0, [], collections.deque(maxlen=_EXCERPT)
    with path.open("rb") as file:
        for line in file:  # large: only the ends are parsed
            count += 1
            (first if count <= _EXCERPT else last).append(line)
    ends = ([_parse(line, _OF_TRAJECTORIES) for line in lines] for lines in (first, last))
    first, last = ([record for record in records if record is not None] for records in ends)
    return Excerpt(path.name, count, first, last)


def _by_number(path: pathlib.Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _split(content: bytes) -> list[bytes]:
    return content.removesuffix(b"\n").split(b"\n") if content else []


def _parse(line: bytes, columns: dict[str, type]) -> dict | None:
    """The object of a line, or None if it has not what it needs."""
    try:
        record = json.loads(line)
    except ValueError:  # a UnicodeDecodeError is one
        return None
    if not isinstance(record, dict):
        return None
    whole = all(isinstance(record.get(name), kind) for name, kind in columns.items())
    return record if whole else None


def _read_object(path: pathlib.Path) -> tuple[dict | None, list[str]]:
    if not path.exists():
        return None, []
    record = _parse(path.read_bytes(), {})
    return record, [] if record is not None else [f"{path.name} cannot be read, and is left out"]


def _read_config(directory: pathlib.Path) -> dict:
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no config.json, so it is not a run's directory")
    config = _parse(path.read_bytes(), {"train": dict, "student": dict, "eval": dict})
    if config is None:
        raise UserError(f"{path} is not a run's: it holds no config of gkdjax")
    return config_lib.from_saved(config)


def _missing(metrics: list, evaluations: list, before: dict | None) -> Iterator[str]:
    if before is None:
        yield "what the untrained student and the teacher answer (before.json)"
    if not metrics:
        yield "any training step (metrics.jsonl)"
    if not evaluations:
        yield "any measurement on the way (eval.jsonl)"
    yield "what the trained student answers, and all that is measured of it (results.json)"
