"""Killed with SIGKILL, a run ends as one that nobody disturbed: to the bit."""

import concurrent.futures
import dataclasses
import pathlib
import random
import shutil

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


@dataclasses.dataclass(frozen=True)
class Done:
    """Two finished runs of one setting."""

    whole: pathlib.Path
    killed: pathlib.Path
    kills: list[resume_runs.Kill]


def run_both(setting: str, base: pathlib.Path, stages=STAGES) -> Done:
    whole, killed = base / "whole" / setting, base / "killed" / setting
    devices = SETTINGS[setting]
    resume_runs.KilledRun(setting, base, whole, devices).finish()
    draw = random.Random(setting)
    moments = [resume_runs.Moment(stage, draw.uniform(0, 0.05), n) for stage, n in stages]
    kills = resume_runs.KilledRun(setting, base, killed, devices).kill_all(moments)
    return Done(whole, killed, kills)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict[str, Done]:
    base = tmp_path_factory.mktemp("resume")
    resume_runs.make_models(base / "models")
    for name in ("whole", "killed"):
        (base / name).mkdir()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        started = {setting: pool.submit(run_both, setting, base) for setting in SETTINGS}
        return {setting: future.result() for setting, future in started.items()}


def test_a_run_killed_once_is_equal_to_the_bit(tmp_path):
    resume_runs.make_models(tmp_path / "models")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    found = run_both("off-lora", tmp_path, STAGES[2:3])
    assert len(found.kills) == 1
    assert resume_runs.differences(found.whole, found.killed) == []


@SLOW
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_killed_five_times_is_equal_to_the_bit(done, setting):
    found = done[setting]
    assert len(found.kills) == len(STAGES), found.kills
    assert resume_runs.differences(found.whole, found.killed) == []


@SLOW
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_runs_make_use_of_what_a_resume_could_get_wrong(done, setting):
    lines = resume_runs.outcome(done[setting].whole)["metrics.jsonl"]
    assert len(lines) == resume_config.STEPS
    assert len({line["loss"] for line in lines}) == resume_config.STEPS
    on_policy = [line["on_policy_rows"] > 0 for line in lines]
    assert any(on_policy) is any(on_policy[4:]) is (setting == "on-full")
    assert not all(on_policy[4:])
    assert any(line["refused_responses"] for line in lines) is any(on_policy)
    resumed = [kill.resumed_at for kill in done[setting].kills]
    assert 6 <= resumed[3] < resumed[4] == resume_config.STEPS


@SLOW
def test_an_interrupted_run_of_another_config_is_refused(done, tmp_path):
    """As in tests/test_main.py, but before the run's end, where its checkpoints count."""
    found = done["off-lora"]
    interrupted = tmp_path / "interrupted"
    shutil.copytree(found.killed, interrupted)
    (interrupted / "results.json").unlink()
    changed = resume_config.get_config(f"off-lora,{found.whole.parents[1] / 'models'}")
    changed.train.grad_accum_steps = 1
    changed.optim.learning_rate = 1e-3
    told = (
        r"config.optim.learning_rate \(now 0.001, was 0.01\); config.train.grad_accum_steps \(now 1"
    )
    with pytest.raises(UserError, match=told):
        gkdjax.run(config.parse(changed), interrupted)
