"""A process that hangs in a step ends, with its stacks in the log."""

import threading
import time

from small_runs import ConstantTeacher, small

import gkdjax
from gkdjax.train import loop, watchdog


def test_a_step_that_hangs_ends_the_process(student, tmp_path, monkeypatch, capfd):
    """The process goes on here, as it is the tests' own: `leave` lets the step go on."""
    ended, codes = threading.Event(), []
    monkeypatch.setattr(watchdog, "leave", lambda code: (codes.append(code), ended.set()))
    make = loop.make_train_step

    def hanging(*args):
        step, calls = make(*args), []

        def run(*args, **kwargs):
            calls.append(1)
            # Long enough for the watchdog: it does not watch a program that may be compiled.
            if len(calls) in (1, 3):
                ended.wait(2.0 if len(calls) == 1 else 60.0)
            return step(*args, **kwargs)

        return run

    monkeypatch.setattr(loop, "make_train_step", hanging)
    c = small(student, teacher__top_k=1, train__watchdog_s=1.0, checkpoint__every_steps=9)
    c.data.train = [{"prompt": "ask", "response": "yes"}] * 4
    gkdjax.run(c, tmp_path, ConstantTeacher(50, 5))
    assert codes == [75]
    told = capfd.readouterr().err
    assert "test_watchdog.py" in told and "a step has taken longer than" in told


def test_long_steps_make_it_patient(monkeypatch):
    left = threading.Event()
    monkeypatch.setattr(watchdog, "leave", lambda code: left.set())
    watch = watchdog.Watchdog(0.01)
    watch._seconds = [10.0, 10.0, 0.1]
    for _ in range(2):
        with watch.watching("program"):
            assert not left.wait(1.2)
    watch._seconds = [0.0]
    with watch.watching("program"):
        assert left.wait(30)
    left.clear()
    with watch.watching("another"):  # it may be compiled
        assert not left.wait(1.2)
    with watch.watching(None):
        assert left.wait(30)
    watch.close()


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    """The clock jumps by ten minutes, as it does for a process that goes on after SIGSTOP."""
    left, jumped, now = threading.Event(), threading.Event(), time.monotonic
    monkeypatch.setattr(watchdog, "leave", lambda code: left.set())
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now() + 600.0 * jumped.is_set())
    watch = watchdog.Watchdog(2.0)
    with watch.watching("program"):
        pass
    with watch.watching("program"):
        jumped.set()
        assert not left.wait(1.0)
        assert left.wait(30)  # and then time goes on
    watch.close()
