"""A request to stop: when it raises, when it waits, and what it leaves behind."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from small_runs import ConstantTeacher, losses_hex, small

import gkdjax
from gkdjax.config import cli
from gkdjax.train.checkpoint import saved_steps
from gkdjax.train.stopping import StopRequest
from gkdjax.utils.errors import Interrupted, Preempted

# A computation that Python's signal handlers cannot interrupt, as a compilation is none either.
LONG = """
import hashlib, threading
from gkdjax.train.stopping import StopRequest
stop = StopRequest()
with stop.listening(None):
    threading.Timer(0.3, print, ["there"], {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def handlers():
    return [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (signal.SIGTERM, Preempted, 75),
        (signal.SIGHUP, Preempted, 75),
        (signal.SIGINT, Interrupted, 130),
    ],
)
def test_a_signal_raises_and_its_handlers_go(number, error, code):
    before, stop = handlers(), StopRequest()
    told = f"stopped by {number.name}.*run again"
    with pytest.raises(error, match=told) as caught, stop.listening(None):
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(5)
        except Exception:  # what handles errors does not swallow it
            pytest.fail("an error")
    assert caught.value.exit_code == code and handlers() == before


def test_in_a_deferred_block_it_waits():
    stop = StopRequest()
    with stop.listening(None), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.event.wait(5)
        with pytest.raises(Preempted, match="stopped by SIGTERM"), stop.raising():
            pytest.fail("it was asked before")
        stop._alone = False  # with several processes it only waits
        with stop.raising():
            pass


@pytest.fixture
def restored():
    """All handlers are the old ones afterwards."""
    before = handlers()
    yield
    for number, handler in zip((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


def test_under_nohup_a_terminal_may_close(restored):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    with stop.listening(None):
        os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.event.is_set()


@pytest.mark.parametrize("collecting", [False, True])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_a_command_line_may_be_stopped_before_its_run_begins(
    restored, monkeypatch, number, code, collecting
):
    """Also while garbage is collected, where all that is raised is lost."""
    signal.signal(number, signal.default_int_handler if code == 130 else signal.SIG_DFL)
    calls = []

    def stop():
        calls.append(os.kill(os.getpid(), number))

    def collected(*_):
        if not calls:
            stop()

    def main(*_, **__):
        gc.collect() if collecting else collected()
        threading.Event().wait(5)

    monkeypatch.setattr(cli.app, "run", main)
    if collecting:
        gc.callbacks.append(collected)
    try:
        with pytest.raises(SystemExit) as caught:
            cli.run(print)
    finally:
        gc.callbacks[:] = [each for each in gc.callbacks if each is not collected]
    assert caught.value.code == code


def test_the_time_that_a_run_has():
    stop = StopRequest()
    told = r"stopped by train\.max_seconds = 0\.05"
    with pytest.raises(Preempted, match=told), stop.listening(0.05):
        threading.Event().wait(5)
    with stop.listening(1e12):  # more than a thread can wait; a warning of its thread is an error
        threading.Event().wait(0.1)


@pytest.mark.parametrize(
    ("numbers", "code"), [((signal.SIGTERM,), 75), ((signal.SIGINT, signal.SIGINT), 130)]
)
def test_a_long_computation_does_not_hold_the_process(numbers, code):
    """In a process of its own, as it is the process that ends."""
    root = pathlib.Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", LONG], stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout.readline() == "there\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.2)  # two signals at once are one
        assert process.wait(30) == code


class Stopped(ConstantTeacher):
    """Sends itself a signal in one of its calls, by the number of the call."""

    def __init__(self, call: int | None = None, number: int = signal.SIGTERM):
        super().__init__(50, 5)
        self.number, self.left = number, call

    def count(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                os.kill(os.getpid(), self.number)

    def sample(self, *args, **kwargs):
        self.count()
        return super().sample(*args, **kwargs)

    def targets(self, batch):
        self.count()
        return super().targets(batch)


@pytest.mark.slow(70)
def test_a_run_stopped_anywhere_goes_on_to_the_same_losses(student, tmp_path):
    c = small(student, teacher__top_k=1, checkpoint__every_steps=9, eval__every_steps=2)
    c.eval.questions = [{"prompt": f"tell {i}", "answer": "x"} for i in range(3)]
    whole = Stopped()
    gkdjax.run(c, tmp_path / "whole", whole)
    calls = 0
    for calls in range(99):
        teacher = Stopped(calls, signal.SIGINT if calls % 2 else signal.SIGTERM)
        workdir = tmp_path / str(calls)
        try:
            gkdjax.run(c, workdir, teacher)
        except Preempted as error:
            assert isinstance(error, Interrupted) == bool(calls % 2)
            assert ("saved" in str(error)) == bool(saved_steps(workdir))
            gkdjax.run(c, workdir, Stopped())
        assert losses_hex(workdir) == losses_hex(tmp_path / "whole")
        if teacher.left is not None:  # it was never called so often
            break
    assert calls > 7
