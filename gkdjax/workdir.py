"""A run's directory: which config it belongs to, and whether the run is finished."""

import json
import pathlib

from gkdjax import config as config_lib
from gkdjax.config_models import REACH_KEYS
from gkdjax.errors import UserError


def claim(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Writes the config into a new directory, or checks that it is the one written there.

    How a teacher's server is reached may change (not what it is, see `teachers.http.connect`), and
    so may the mesh.

    Raises:
      UserError: the directory belongs to another config; every key that differs is named.
    """
    path = workdir / "config.json"
    mine = json.loads(json.dumps(config_lib.to_dict(config)))
    if path.exists():
        theirs = _with_new_keys(json.loads(path.read_text()))
        differing = sorted(_differences(_lasting(mine), _lasting(theirs), "config"))
        if differing:
            raise UserError(
                f"{workdir} holds a run of another config; it differs in {'; '.join(differing)}."
                " Give --workdir another directory, or the old values"
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error}") from None
    write_json(path, mine)


def claim_rows(workdir: pathlib.Path, fingerprints: dict[str, int]) -> None:
    """Writes what the rows of each stream are known by, or checks that they are those of the run.

    Raises:
      UserError: rows are not what they were when the run began.
    """
    path = workdir / "rows.json"
    begun_with = read_json(path)
    if begun_with is None:
        write_json(path, fingerprints)
        return
    for name, fingerprint in fingerprints.items():
        if begun_with[name] != fingerprint:
            raise UserError(
                f"the rows of {name} are not those that the run in {workdir} began with: the data,"
                " a prefix file, the tokenizer or the chat template changed since. Put them back,"
                " or give --workdir another directory"
            )


def read_json(path: pathlib.Path) -> dict | None:
    """The parsed file, or None if there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def write_json(path: pathlib.Path, value: dict) -> None:
    """Writes under another name first: the file is whole or not there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def _with_new_keys(theirs: dict) -> dict:
    """An older run did what the defaults of the keys say that are new since."""
    defaults = json.loads(json.dumps(config_lib.to_dict(config_lib.Config())))
    sections = {name: default for name, default in defaults.items() if isinstance(default, dict)}
    return theirs | {
        name: default | theirs[name] for name, default in sections.items() if name in theirs
    }


def _lasting(raw: dict) -> dict:
    """What makes a run another one; on other devices it is the same."""
    teacher = {key: v for key, v in raw["teacher"].items() if key not in REACH_KEYS}
    return raw | {"teacher": teacher, "mesh": None}


def _differences(mine, theirs, key: str):
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in sorted({*mine, *theirs}):
            if name not in mine or name not in theirs:
                yield f"{key}.{name} (only in {'this run' if name in mine else 'the old one'})"
            else:
                yield from _differences(mine[name], theirs[name], f"{key}.{name}")
    elif mine != theirs:
        yield f"{key} (now {_short(mine)}, was {_short(theirs)})"


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
