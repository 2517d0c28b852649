"""SIGTERM while an answer is minutes away: the run does not wait for it to save its state."""

import os
import pathlib
import signal
import threading

import pytest
from fake_server import FakeServer
from server_runs import READ_IN_TURN, Failing, config_for
from small_runs import losses_hex

import gkdjax
from gkdjax.utils.errors import Preempted


def test_a_run_that_waits_for_its_teacher_is_saved_and_goes_on(student, tmp_path):
    teacher, left = Failing(), threading.Event()

    def hold(request):
        """The last step's answer comes only when the run has left it."""
        os.kill(os.getpid(), signal.SIGTERM)
        assert left.wait(60.0)
        return teacher.well(request)

    teacher.faults = {5: hold}
    with FakeServer(teacher) as server:
        c = config_for(student, server.base, **READ_IN_TURN)
        c.teacher.concurrency = 2  # so that the steps before are answered meanwhile
        run = tmp_path / "run"
        watched = threading.Thread(target=_when_saved, args=(run, left))
        watched.start()
        with pytest.raises(Preempted, match=r"SIGTERM.*saved"):
            gkdjax.run(c, run)
        watched.join()
        teacher.faults = {}
        gkdjax.run(c, run)
        gkdjax.run(c, tmp_path / "undisturbed")
    assert losses_hex(run) == losses_hex(tmp_path / "undisturbed")


def _when_saved(run: pathlib.Path, left: threading.Event) -> None:
    """Sets `left` as soon as there is a checkpoint beyond the regular ones."""
    checkpoints = run / "checkpoints"
    for _ in range(600):
        steps = [p.name for p in checkpoints.glob("*")] if checkpoints.exists() else []
        if any(name.isdecimal() and int(name) % 2 for name in steps):
            break
        if left.wait(0.1):
            break
    left.set()
