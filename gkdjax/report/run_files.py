"""The small files of a run: what each must hold, and what becomes of a run where one is damaged.

A report reads a directory as it is: a run that is going on, or was killed, has only some files.
Damage does not stop it: it is left out, and `damaged` names it. A run itself reads by `load` and
`keep_lines_before`.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import logging

from gkdjax import config as config_lib
from gkdjax.report import results as report_results
from gkdjax.utils import files
from gkdjax.utils.errors import UserError
from gkdjax.utils.text import visible


def _is_number(value) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _is_measure(value) -> bool:
    return value is None or _is_number(value)  # null: it could not be measured


# What a value must be: of a type; a list of one form; a function's True; or an object with a form
# for each key, of which those with "?" may be missing, and "*" is for all that are not named.
_Form = type | list | Callable[[Any], bool] | dict[str, "_Form"]
_SHARES = {"accuracy?": _is_number, "heldout_accuracy?": _is_number}
_MEASURES: _Form = {**_SHARES, "*": _is_measure}
_LINE: _Form = {"step": int, "*": _is_measure}


class _Kind(NamedTuple):
    """A file of a run, or a line of one."""

    form: _Form
    without: str | None = None  # what is lost if it is deleted; None: it is made again


_CONDITIONS: dict[str, _Form] = {f"{name}?": _MEASURES for name in report_results.CONDITIONS}
_FILES = {
    "metrics.jsonl": _Kind(
        {
            **dict.fromkeys(("step", "on_policy_rows", "tokens", "compilations"), int),
            **{"loss": float, "divergence": str},
        },
        "curves and counts then lack its step",
    ),
    "eval.jsonl": _Kind(_LINE, "the curves then lack its step"),
    "samples.jsonl": _Kind({"step": int, "answers": [str]}, "the report then lacks its answers"),
    "bad_steps.jsonl": _Kind({"step": int}, "the report then counts one bad step less"),
    "answers.jsonl": _Kind(
        {
            **dict.fromkeys(("set", "condition", "name", "question", "answer"), str),
            **{"expected": list, "right": bool},
        }
    ),
    "rows.json": _Kind(
        {"*": int}, "then nobody sees whether the rows have changed since the run began"
    ),
    "models.json": _Kind(
        {"*": str},
        "the models are then looked up again, and an id of the hub may have a newer commit",
    ),
    "clock.json": _Kind({"began": str}, "chat templates that show the date then show today's"),
    "teacher.json": _Kind(
        dict.fromkeys(("model", "probe"), str),
        "then nobody sees whether the server has had other weights when the run began",
    ),
    "failure.json": _Kind({"failure": str}, "then nothing of the config may be changed"),
    "before.json": _Kind(
        {
            **{"abilities": _MEASURES, "counts": {"*": files.is_count}, "unavailable": {"*": str}},
            **{"samples": {"*": [str]}, "answers": list, **_CONDITIONS},
        }
    ),
    "results.json": _Kind(
        {
            **{"steps": int, "samples": {"*": [str]}, "exports": [str], **_CONDITIONS},
            **{
                "rows": {"*": {"rows": int, "refused_responses": int, "padding": {"*": _is_number}}}
            },
            **{
                "counts?": {"*": files.is_count},
                "unavailable?": {"*": str},
                "versions?": {"*": str},
            },
            **{"held_out?": {"before": _LINE, "after": _LINE}, "task?": dict},
            **{"retention?": {"*": {"before": _is_number, "after": _is_number}}},
            **{"side_effects?": _MEASURES, "teacher?": _MEASURES},
            "prefix_cost?": {
                **{"tokens_saved": _is_number, "rows": int, "new_tokens": int},
                "seconds": {"without": _is_number, "*": _is_number},
            },
            **{"recovery?": _is_measure, "heldout_recovery?": _is_measure, "bad_steps?": int},
            **dict.fromkeys(("tokens?", "on_policy_steps?", "compilations?"), int),
            **{"loss?": _is_number, "seconds?": _is_number},
        }
    ),
    "ending.json": _Kind({"stop_ids": [int], "pad_id": int}),
    "teacher_ended_at.json": _Kind({"keys": [str]}),
}
_COMPLETION = {"row": str, "writer": str, "step": int, "messages": list, "text": str}
_EXCERPT = 3  # lines at each end of a file of completions
_LONGEST = 60  # characters of a config's value


class Excerpt(NamedTuple):
    """The first and the last lines of a file of completions."""

    name: str
    count: int  # of all lines
    first: list[dict]
    last: list[dict]


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The content of a run's files; that of a missing one is empty."""

    directory: pathlib.Path
    config: dict
    metrics: list[dict]
    evaluations: list[dict]
    samples: list[dict]
    answers: list[dict]
    found: dict  # the content of results.json, or as much of it as is known
    missing: list[str]  # what a finished run has and this one lacks, in words
    damaged: list[str]  # what could not be read, in words

    @property
    def state(self) -> str:
        """How far it got, as "finished, 300 steps"."""
        if not self.missing:
            return f"finished, {self.found['steps']:,} steps"
        train, planned = self.config["train"], "an unknown number"
        if train.get("steps"):
            planned = f"{train['steps']:,}"
        elif train.get("epochs"):
            planned = f"{train['epochs']} epochs"
        return f"not finished, step {self.found.get('steps') or 0:,} of {planned}"


def read(directory: pathlib.Path) -> RunFiles:
    """Reads all but the completions, for which there is `excerpts`.

    Raises:
      UserError: it is no run's directory.
    """
    damaged: list[str] = []
    config = read_config(directory)
    names = "metrics.jsonl", "eval.jsonl", "samples.jsonl", "answers.jsonl"
    metrics, evaluations, samples, answers = (read_lines(directory / n, damaged) for n in names)
    before, found = (_read_object(directory / n, damaged) for n in ("before.json", "results.json"))
    missing = [] if found is not None else [*_missing(metrics, evaluations, before)]
    if found is None:
        found = report_results.so_far(before or {}, evaluations)
        found |= report_results.training(metrics)
    lines = metrics, evaluations, samples, answers
    return RunFiles(directory, config, *lines, found, missing, damaged)


def read_lines(path: pathlib.Path, damaged: list[str]) -> list[dict]:
    """Reads the whole lines of a run's file, by its name; names the others in `damaged`."""
    parsed = [_parse(line, _FILES[path.name].form) for line in _lines(path)]
    bad = [place for place, record in enumerate(parsed, 1) if record is None]
    if bad and bad[-1] == len(parsed):
        damaged.append(f"{path.name}: the last line is cut off, and left out")
        bad.pop()
    if bad:
        some = ", ".join(map(str, bad[:3])) + (", ..." if len(bad) > 3 else "")
        damaged.append(f"{path.name}: lines that cannot be read are left out ({len(bad)}: {some})")
    return [record for record in parsed if record is not None]


def load(path: pathlib.Path, parse: Callable[[dict], Any] = lambda found: found) -> Any | None:
    """Reads a run's JSON file for the run; None if it is not there, or has to be made again.

    `parse` makes of the object what is returned; its ValueError is damage, too.

    Raises:
      UserError: it is damaged and nothing can make it again; with what is lost without it.
    """
    form, without = _FILES[re.sub(r"\.\d+", "", path.name)]  # some are those of one process
    try:
        found = files.read_json(path)
        if found is None:
            return None
        if not _fits(found, form):
            raise UserError(f"{path} lacks what it must hold")
        try:
            return parse(found)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None
    except UserError as error:
        if without is not None:
            raise UserError(f"{error}. Put it back, or delete it: {without}") from None
        logging.warning("%s; it is made again", error)
        return None


def keep_lines_before(path: pathlib.Path, step: int) -> set[int]:
    """Cuts a run's file of lines down to those of steps before `step` -> their steps.

    What is damaged after them is cut off, too, and told: a crash may leave half a line.

    Raises:
      UserError: a line among them is damaged; with what is lost without it.
    """
    form, without = _FILES[path.name]
    lines = _lines(path)
    records = [_parse(line, form) for line in lines]
    kept = [i for i, record in enumerate(records) if record and record["step"] < step]
    count = kept[-1] + 1 if kept else 0
    if None in records:
        place = records.index(None)
        if place < count:
            raise UserError(f"{path}:{place + 1} is damaged. Put it back, or delete it: {without}")
        logging.warning("%s is damaged from line %d on, and cut off there", path, place + 1)
    if lines:
        files.write_bytes(path, b"".join(line + b"\n" for line in lines[:count]))
    return {records[i]["step"] for i in kept}


def excerpts(directory: pathlib.Path) -> Iterator[Excerpt]:
    """Reads the ends of all files of completions, in the order of their names and steps."""

    def by_number(path):
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if part.isdigit() else part for part in parts]

    for path in sorted(directory.glob("trajectories_*.jsonl"), key=by_number):
        first, last = [], collections.deque(maxlen=_EXCERPT)
        with path.open("rb") as file:
            count = 0
            for count, line in enumerate(file, 1):  # large: only the ends are parsed
                (first if count <= _EXCERPT else last).append(line)
        ends = ([_parse(line, _COMPLETION) for line in lines] for lines in (first, last))
        yield Excerpt(path.name, count, *([*filter(None, records)] for records in ends))


def flat(config: dict) -> dict[str, str]:
    """Dotted key -> its value in one short line; values that differ have lines that differ.

    Args:
      config: the content of config.json.
    """
    found = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            found |= {f"{name}.{key}": text for key, text in flat(value).items()}
        else:
            found[name] = _short(value)
    return found


def unlike_defaults(config: dict) -> dict[str, str]:
    """The part of `flat` that the config's author has chosen."""
    defaults = flat(config_lib.to_dict(config_lib.Config()))
    return {key: text for key, text in flat(config).items() if defaults.get(key) != text}


def _short(value) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    shown = visible(" ".join(text.split()))
    if len(shown) <= _LONGEST and shown == text:
        return shown
    what = f"a list of {len(value)}" if isinstance(value, list) else f"{shown[:40]}..."
    return f"{what} (crc32 {zlib.crc32(text.encode(errors='surrogatepass')):08x})"


def _lines(path: pathlib.Path) -> list[bytes]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return content.removesuffix(b"\n").split(b"\n") if content else []


def _parse(line: bytes, form: _Form) -> dict | None:
    """The object of a line; None if it is not of the form."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        return None
    return record if isinstance(record, dict) and _fits(record, form) else None


def _fits(value, form: _Form) -> bool:
    if isinstance(form, type):
        return isinstance(value, form)
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(each, form[0]) for each in value)
    if not isinstance(form, dict):
        return form(value)
    if not isinstance(value, dict) or {n for n in form if n[-1] not in "?*"} - value.keys():
        return False
    own = {"*": object} | {name.removesuffix("?"): each for name, each in form.items()}
    return all(_fits(each, own[name if name in own else "*"]) for name, each in value.items())


def _read_object(path: pathlib.Path, damaged: list[str]) -> dict | None:
    with contextlib.suppress(UserError):
        record = files.read_json(path)
        if record is None or _fits(record, _FILES[path.name].form):
            return record
    damaged.append(f"{path.name} cannot be read, and is left out")
    return None


def read_config(directory: pathlib.Path) -> dict:
    """Reads config.json; UserError if there is none, or it is not a run's."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no config.json, so it is not a run's directory")
    config = files.read_object(path)
    if not _fits(config, dict.fromkeys(("train", "student", "eval"), dict)):
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
