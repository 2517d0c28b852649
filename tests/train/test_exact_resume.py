"""Killed with SIGKILL, a run ends as one that was not disturbed: to the bit.

Kills end the processes that run, so that they are others than this; `resume_runs` says when.
"""

import concurrent.futures
import pathlib
import random
import shutil
from typing import NamedTuple

import pytest
import resume_config
import resume_runs

import gkdjax
from gkdjax import config
from gkdjax.utils.errors import UserError

# Between them: both kinds of batches, of weights and of streams, dropout, text by the teacher,
# one device and two.
SETTINGS = {"off-lora": 1, "on-full": 2}  # setting -> devices
# (stage, the least number of steps), in the order of the kills.
STAGES = (
    *(("writing text", 0), ("nothing saved", 0), ("saving", 4)),
    *(("evaluating", 7), ("exporting", resume_config.STEPS)),
)

SLOW = pytest.mark.slow(150)


class Done(NamedTuple):
    """Two finished runs of one setting."""

    whole: pathlib.Path
    killed: pathlib.Path
    kills: list[resume_runs.Kill]


def run_both(setting: str, base: pathlib.Path, stages=STAGES) -> Done:
    paths = [base / name / setting for name in ("whole", "killed")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
    whole, killed = (resume_runs.KilledRun(setting, base, p, SETTINGS[setting]) for p in paths)
    whole.finish()
    draw = random.Random(setting)
    moments = [resume_runs.Moment(stage, draw.uniform(0, 0.05), n) for stage, n in stages]
    return Done(*paths, killed.kill_all(moments))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("resume")
    resume_runs.make_models(made / "models")
    return made


@pytest.fixture(scope="module")
def done(base) -> dict[str, Done]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        started = {setting: pool.submit(run_both, setting, base) for setting in SETTINGS}
        return {setting: future.result() for setting, future in started.items()}


def test_a_run_killed_once_is_equal_to_the_bit(tmp_path):
    resume_runs.make_models(tmp_path / "models")
    found = run_both("off-lora", tmp_path, STAGES[2:3])
    assert len(found.kills) == 1
    assert resume_runs.differences(found.whole, found.killed) == []


@SLOW
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_killed_five_times_is_equal_to_the_bit(done, setting):
    found = done[setting]
    assert len(found.kills) == len(STAGES), found.kills
    assert resume_runs.differences(found.whole, found.killed) == []
    # The runs make use of what a resume could get wrong.
    lines = resume_runs.outcome(found.whole)["metrics.jsonl"]
    assert len(lines) == len({line["loss"] for line in lines}) == resume_config.STEPS
    on_policy = [line["on_policy_rows"] > 0 for line in lines]
    assert any(on_policy) is any(on_policy[4:]) is (setting == "on-full")
    assert not all(on_policy[4:])
    assert any(line["refused_responses"] for line in lines) is any(on_policy)
    resumed = [kill.resumed_at for kill in found.kills]
    assert 6 <= resumed[3] < resumed[4] == resume_config.STEPS


@SLOW
def test_an_interrupted_run_of_another_config_is_refused(done, base, tmp_path):
    """As in tests/test_main.py, but before the run's end, where its checkpoints count."""
    interrupted = tmp_path / "interrupted"
    shutil.copytree(done["off-lora"].killed, interrupted)
    (interrupted / "results.json").unlink()
    changed = resume_config.get_config(f"off-lora,{base / 'models'}")
    changed.train.grad_accum_steps, changed.optim.learning_rate = 1, 1e-3
    message = r"config.optim.learning_rate \(now 0.001, was 0.01\); config.train.grad_accum_steps"
    with pytest.raises(UserError, match=message):
        gkdjax.run(config.parse(changed), interrupted)
