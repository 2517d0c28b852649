"""A run's directory: which config it belongs to, and whether the run is finished."""

import contextlib
import copy
import datetime
import json
import pathlib
import re
import shutil
from collections.abc import Iterator

from gkdjax import config as config_lib
from gkdjax.config import ASSETS
from gkdjax.config.schema import REACH_KEYS
from gkdjax.models.hf import hub
from gkdjax.parallel import multihost
from gkdjax.report import run_files
from gkdjax.report.run_files import load
from gkdjax.utils import files
from gkdjax.utils.errors import TrainingFailure, UserError, WrongAnswer
from gkdjax.utils.files import write_json

_FAILURE = "failure.json"  # why the numbers of a run ended it
# What may be changed after such a failure, to continue from the newest checkpoint.
MENDABLE = (("optim", "learning_rate"), ("optim", "max_grad_norm"), ("train", "max_bad_steps"))
# What a run writes down before it computes anything, beside its config.
_BEGUN_WITH = ("models.json", "clock.json", "teacher.json", "ending.json", "rows.json")
# What it measures before its first step; cheap enough to be measured once more.
_MEASURED = ("before.json", "answers.jsonl", "eval.jsonl", "samples.jsonl", "tensorboard")
_MEASURED += ("bad_steps.jsonl", "bad_steps", _FAILURE, "history.jsonl")
_MEASURED += ("report.html", "report.png")  # of an unfinished run, by `tools.report`
# Rollouts, steps, and what a run hands over: these make the directory the run's own.
_COMPUTED = ("trajectories_*.jsonl", "metrics.jsonl", "checkpoints/[!.]*", "results.json")
_COMPUTED += ("merged/*", "adapter/*")
_OLD_ASSETS = str(ASSETS.parents[1] / "assets")  # where runs of 0.1.0 found them


def claim(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Writes the config into a new directory, or checks that it is the one written there.

    How a teacher's server is reached may change (not what it is, see `teachers.server.connect`),
    and so may the mesh; after a failure of the numbers also what is `MENDABLE`, which
    RUN/history.jsonl records. A directory without a saved step and without rollouts belongs to no
    run: the first start may have been refused, and its advice followed, or the server changed.

    Raises:
      UserError: the directory belongs to another config, every key that differs is named; or its
        config.json is not a run's.
    """
    path = workdir / "config.json"
    mine = config_lib.to_dict(config)
    theirs = _config_of_run(path)
    # Only the leader's directory has all files.
    (computed, *_) = multihost.exchange(_computed(workdir))
    if theirs is not None and computed:
        old, failure = _lasting(theirs), load(workdir / _FAILURE)
        for section, name in MENDABLE if failure is not None else ():
            old[section][name] = mine[section][name]
        differing = sorted(_differences(_lasting(mine), old, "config"))
        if differing:
            raise UserError(
                f"{workdir} holds a run of another config; it differs in {'; '.join(differing)}."
                " Give --workdir another directory, or the old values"
            )
        if failure is not None and (changed := sorted(_differences(mine, theirs, "config"))):
            files.append_line(workdir / "history.jsonl", failure | {"changed": changed})
            write_json(path, mine)
            (workdir / _FAILURE).unlink()
        return
    if not computed:  # what an earlier start began with may have been mended since
        for begun in (workdir / name for name in (*_BEGUN_WITH, *_MEASURED)):
            shutil.rmtree(begun) if begun.is_dir() else begun.unlink(missing_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, mine)


@contextlib.contextmanager
def failure_kept(workdir: pathlib.Path) -> Iterator[None]:
    """Writes down a failure of the numbers, so that `claim` allows what mends it."""
    try:
        yield
    except WrongAnswer:
        raise
    except TrainingFailure as error:
        write_json(workdir / _FAILURE, {"failure": str(error)})
        flags = ", ".join(f"--config.{section}.{name}" for section, name in MENDABLE)
        raise TrainingFailure(
            f"{error}. The same command goes on from the newest checkpoint, or from the start"
            f" without one; with it may be changed: {flags}"
        ) from None


def _config_of_run(path: pathlib.Path) -> dict | None:
    """Reads the config of the directory's run, completed with keys that are new; None without any.

    A model's directory has a config.json, too, and other programs write one.
    """
    if not path.exists():
        return None
    try:
        theirs = files.read_object(path)
    except UserError:
        theirs = {}
    theirs = json.loads(json.dumps(theirs).replace(_OLD_ASSETS, str(ASSETS)))
    sections = config_lib.from_saved({})
    known = {name: value for name, value in theirs.items() if name in {*sections, "trajectory"}}
    needed = {"student", "teacher", "data", "train"}
    if not known.keys() >= needed or not all(isinstance(v, dict) for v in known.values()):
        raise UserError(
            f"{path} is not the config of a run, and is left as it is; give --workdir another"
            " directory. If it was a run's, put it back, or delete it: the config given is then"
            " taken for it"
        )
    return config_lib.from_saved(theirs)


def _computed(workdir: pathlib.Path) -> bool:
    """Whether rollouts were written there, a step made, or a model exported.

    A server's answers do not keep another config out: their store finds them by what was asked,
    and stays. Nor do the untrained student's: it is asked again.
    """
    found = [path for pattern in _COMPUTED for path in workdir.glob(pattern)]
    if any(path.is_dir() or path.stat().st_size for path in found):
        return True
    evals = [workdir / name for name in ("eval.jsonl", "samples.jsonl")]
    return any(p.is_file() and re.search(rb'"step": [1-9]', p.read_bytes()) for p in evals)


def saved_config(workdir: pathlib.Path) -> config_lib.Config:
    """Reads the config of a run; UserError if there is none, or it is not a run's."""
    saved = run_files.read_config(workdir)
    try:
        return config_lib.parse(saved)
    except UserError as error:
        raise UserError(f"{workdir / 'config.json'} is not a run's: {error}") from error


def claim_rows(workdir: pathlib.Path, fingerprints: dict[str, int]) -> None:
    """Writes the fingerprints of the datasets, or checks that they are those of the run.

    Raises:
      UserError: rows changed since the run began.
    """
    path = workdir / "rows.json"
    begun_with = load(path)
    if begun_with is None:
        write_json(path, fingerprints)
        return
    for name, fingerprint in fingerprints.items():
        if begun_with.get(name) != fingerprint:
            raise UserError(
                f"the rows of {name} are not those that the run in {workdir} began with: the data,"
                " a prefix file, the tokenizer or the chat template changed since. Put them back,"
                " or give --workdir another directory"
            )


def clock(workdir: pathlib.Path) -> datetime.datetime | None:
    """Returns the local time that chat templates see: when the run began, at every start of it.

    All processes see the leader's. None in a run that began before there was a clock.json: its
    templates see the present time, as they did.
    """
    path, parse = workdir / "clock.json", datetime.datetime.fromisoformat
    began = load(path, lambda found: parse(found["began"]).isoformat())
    if began is None and not (workdir / "rows.json").exists():
        began = datetime.datetime.now().isoformat(timespec="seconds")
    (began, *_) = multihost.exchange(began)
    if began is None:
        return None
    if not path.exists():
        write_json(path, {"began": began})
    return parse(began)


def _lasting(raw: dict) -> dict:
    """Copies a config without what a run may change; on other devices it is the same run."""
    raw = copy.deepcopy(raw)
    anew = dict.fromkeys(("max_seconds", "watchdog_s"))
    teacher = {key: v for key, v in raw["teacher"].items() if key not in REACH_KEYS}
    return raw | {"teacher": teacher, "mesh": None, "train": raw["train"] | anew}


def _differences(mine, theirs, key: str) -> Iterator[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in sorted({*mine, *theirs}):
            if name not in mine or name not in theirs:
                yield f"{key}.{name} (only in {'this run' if name in mine else 'the old one'})"
            else:
                yield from _differences(mine[name], theirs[name], f"{key}.{name}")
    elif mine != theirs:
        now, was = (
            text if len(text) <= 60 else text[:57] + "..." for text in map(repr, (mine, theirs))
        )
        yield f"{key} (now {now}, was {was})"


def local_directory(name: str, workdir: pathlib.Path, weights: bool = True) -> pathlib.Path:
    """Finds a model as `hub.local_directory`, or where the run began with it.

    RUN/models.json has the absolute path of each directory and the commit of each hub id, which
    may get newer ones.
    """
    path = workdir / "models.json"
    found = load(path) or {}
    if name not in found:
        directory = hub.local_directory(name, weights)
        here = str(directory.absolute()) if pathlib.Path(name).is_dir() else directory.name
        write_json(path, found | {name: here})
        return directory
    place = pathlib.Path(found[name])
    if not place.is_absolute():
        return hub.local_directory(name, weights, found[name])
    if not place.is_dir():
        raise UserError(f"{place} is gone, with which the run in {workdir} began; put it back")
    return place


def begun_with(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Lists the directories of models, tokenizers and adapters here that a run began with."""
    places = map(pathlib.Path, (load(workdir / "models.json") or {}).values())
    return [place for place in places if place.is_absolute()]


def base_name(name: str, workdir: pathlib.Path) -> str:
    """Names an adapter's base: a hub id as it is, a directory by its absolute path.

    `name` was found by `local_directory` for this run.
    """
    place = load(workdir / "models.json")[name]
    return place if pathlib.Path(place).is_absolute() else name
