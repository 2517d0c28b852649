"""python tests/resume_many.py DIR [--kills=30] [--seed=0]: more kills than the tests, anywhere.

Over all four settings; DIR is made and kept. Half of the kills come some seconds after a process
has started, the others shortly after a stage was reached.
"""

import argparse
import pathlib
import random
import sys
import time

import resume_config
import resume_runs

from gkdjax.utils.text import table

MOST_KILLS = 8  # of one run


def moments(draw: random.Random, seconds: float, kills: int) -> list[resume_runs.Moment]:
    found = []
    for number in range(kills):
        if draw.random() < 0.5:
            found.append(resume_runs.Moment(None, draw.uniform(0, seconds)))
        else:  # in the part of the run that it may have come to
            first = 4 * number // kills
            stage = draw.choice([*resume_runs.STAGES][first : first + 3])
            steps = resume_config.STEPS * number // kills if first else 0
            found.append(resume_runs.Moment(stage, draw.uniform(0, 0.05), steps))
    return found


def kill_setting(setting: str, base: pathlib.Path, kills: int, draw: random.Random) -> list[list]:
    """Runs of one setting until there are enough kills -> a row of the table for each run."""
    resume_runs.KilledRun(setting, base, base / f"{setting}-whole").finish()
    began = time.monotonic()
    resume_runs.KilledRun(setting, base, base / f"{setting}-again").finish()
    seconds = time.monotonic() - began  # without compilations
    rows, left = [], kills
    while left > 0:
        workdir = base / f"{setting}-{len(rows)}"
        planned = moments(draw, seconds, min(left, MOST_KILLS))
        found = resume_runs.KilledRun(setting, base, workdir).kill_all(planned)
        left -= len(found)
        unequal = resume_runs.differences(base / f"{setting}-whole", workdir)
        rows.append([setting, found, unequal])
        print(setting, *found, *unequal, sep="\n  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base, draw = arguments.directory.absolute(), random.Random(arguments.seed)
    resume_runs.make_models(base / "models")
    rows, settings = [], len(resume_config.SETTINGS)
    for number, setting in enumerate(resume_config.SETTINGS):
        kills = (arguments.kills + number) // settings
        rows += kill_setting(setting, base, kills, draw)
    shown = []
    for setting, kills, unequal in rows:
        lines = " ".join(str(kill.lines) for kill in kills)
        at = " ".join("-" if k.resumed_at is None else str(k.resumed_at) for k in kills)
        shown.append([setting, str(len(kills)), lines, at, "no" if unequal else "yes"])
    print(table(["run", "kills", "killed at step", "resumed at step", "equal"], shown))
    sys.exit(any(unequal for _, _, unequal in rows))


if __name__ == "__main__":
    main()
