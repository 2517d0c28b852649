"""A directory has one run at a time, and a run that is gone keeps no other out."""

import errno
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest
from made_up_runs import full_results
from small_runs import small

import gkdjax
from gkdjax.parallel import shutdown
from gkdjax.tools import export_hf
from gkdjax.train import lock
from gkdjax.utils.errors import Preempted, UserError

HOLD = """
import pathlib, sys
from gkdjax.train import lock
with lock.locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
OTHER_HOST = {"boot": "another", "pids": "pid:[1]", "host": "tpu-7", "process": 1, "began": "1"}
FLOCK = {"flock": None, "no flock": errno.ENOLCK}


@pytest.fixture(params=FLOCK)
def flock(request, monkeypatch) -> bool:
    """Whether the file system has it."""
    code = FLOCK[request.param]

    def refuse(file, how):
        raise OSError(code, "not here")

    if code is not None:
        monkeypatch.setattr(fcntl, "flock", refuse)
    return code is None


def left_by(path: pathlib.Path, **holder) -> pathlib.Path:
    """Writes the lock of another run, of this host unless `holder` says otherwise."""
    here = {"process": os.getpid(), "began": lock._began(os.getpid()), "host": "mine"}
    path.mkdir(exist_ok=True)
    (path / lock.LOCK).write_text(json.dumps(here | lock._kernel() | holder))
    return path / lock.LOCK


@pytest.fixture(scope="module")
def ended() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_two_runs_are_never_at_work_in_one_directory(student, tmp_path, flock, capsys):
    run = tmp_path / "run"
    with lock.locked(run):
        path = run / lock.LOCK
        before = path.read_bytes()
        told = rf"another process is at work in {run}: process {os.getpid()} on host .*, since"
        with pytest.raises(UserError, match=rf"{told} 20.*, last seen 20.*remove {path}"):
            gkdjax.run(small(student), run)
        assert [*run.iterdir()] == [path] and path.read_bytes() == before
        # The run's own export would write there as well.
        assert export_hf.main(["--checkpoint", str(run), "--out", str(run / "merged")]) == 2
        assert f"another process is at work in {run}" in capsys.readouterr().err
    assert not [*run.iterdir()]


def test_a_killed_process_leaves_its_directory_to_the_next(tmp_path, flock, caplog):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"process {other.pid} on"), lock.locked(tmp_path):
            pass
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # its parent has not seen it yet
        with lock.locked(tmp_path):
            pass
    assert f"is taken over from process {other.pid} on host" in caplog.text


@pytest.mark.parametrize("reused", [False, True])
def test_a_process_that_is_gone_is_no_holder(tmp_path, flock, caplog, ended, reused):
    left_by(tmp_path, **({"began": "1"} if reused else {"process": ended}))
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / lock.LOCK).read_bytes())["process"] == os.getpid()
    (line,) = (record.getMessage() for record in caplog.records)
    assert "is taken over from process" in line and "on host mine" in line


def test_another_container_on_this_host(tmp_path, flock, monkeypatch, caplog):
    """Its process numbers say nothing here; its flock does, as one kernel has both."""
    path, silent = left_by(tmp_path, pids="pid:[1]"), []
    monkeypatch.setattr(lock.time, "sleep", lambda _: silent.append(1))
    if flock:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="on host mine"), lock.locked(tmp_path):
                pass
    else:
        monkeypatch.setattr(lock, "_SILENT_S", 0.01)
    with lock.locked(tmp_path):
        assert bool(silent) != flock
    assert "is taken over from process" in caplog.text


@pytest.mark.parametrize("content", [json.dumps(OTHER_HOST), '{"boot": ""}', "[]", "\0"])
def test_a_holder_of_which_nothing_is_known_has_to_be_silent_for_long(
    tmp_path, monkeypatch, caplog, flock, content
):
    """One of another host, one of a host without /proc, damaged files."""
    monkeypatch.setattr(lock, "_SILENT_S", 0.05)
    monkeypatch.setattr(lock, "_POLL_S", 0.01)
    path = tmp_path / lock.LOCK
    path.write_text(content)
    with lock.locked(tmp_path):
        pass
    waits, taken = (record.getMessage() for record in caplog.records)
    assert f"{path} is of process" in waits and "remove the file to go on at once" in waits
    assert "is taken over from process" in taken


def test_another_hosts_sign_of_life_is_seen(tmp_path, monkeypatch, flock):
    path = left_by(tmp_path, **OTHER_HOST)
    before = path.read_bytes()
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(path, (1e9, 1e9)))
    told = r"process 1 on host tpu-7, since unknown, last seen 2001-09-09 01:46:40\+00:00\. Wait"
    with pytest.raises(UserError, match=told), lock.locked(tmp_path):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("what", ["ends", "is taken over"])
def test_a_lock_that_changes_while_it_is_watched_is_judged_anew(tmp_path, monkeypatch, flock, what):
    path = left_by(tmp_path, **OTHER_HOST)
    mine = {"process": os.getpid(), "boot": lock._kernel()["boot"]}

    def change(_):
        if what == "ends":
            path.unlink()
        else:
            left_by(tmp_path, host="faster")

    monkeypatch.setattr(lock.time, "sleep", change)
    if what == "ends":
        with lock.locked(tmp_path):
            assert mine.items() <= json.loads(path.read_bytes()).items()
    elif not flock:  # with it, nobody of this kernel could have taken it over
        with pytest.raises(UserError, match="on host faster"), lock.locked(tmp_path):
            pass


def test_what_release_0_1_0_left_is_taken_at_once(tmp_path, caplog):
    (tmp_path / lock.LOCK).touch()
    with lock.locked(tmp_path):
        assert (tmp_path / lock.LOCK).read_bytes()
    assert not caplog.records


def test_of_two_that_take_a_lock_over_one_gets_it(tmp_path):
    path = left_by(tmp_path, host="faster")
    fresh = path.read_bytes()
    lock._remove(path, b"that both saw")
    assert path.read_bytes() == fresh and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("taken", [False, True])
def test_a_holder_shows_life_and_ends_when_its_lock_is_anothers(
    tmp_path, monkeypatch, capfd, taken
):
    touched, left = threading.Event(), threading.Event()
    monkeypatch.setattr(lock, "_TOUCH_S", 0.01)
    monkeypatch.setattr(lock.os, "utime", lambda path: touched.set())
    monkeypatch.setattr(shutdown, "leave", lambda code: left.set())
    with lock.locked(tmp_path):
        path = tmp_path / lock.LOCK
        assert touched.wait(30) and not left.is_set()
        if taken:
            os.replace(left_by(tmp_path / "new", **OTHER_HOST), path)
        else:
            path.unlink()
        assert left.wait(30)
    assert path.exists() == taken  # it is not released by who lost it
    assert f"gkdjax: {path} was removed, or taken over" in capfd.readouterr().err


@pytest.mark.parametrize("how", [Preempted, KeyboardInterrupt, SystemExit, "leave"])
def test_the_lock_is_released_in_every_way_a_run_ends(tmp_path, monkeypatch, how):
    """`leave` ends a process that hangs, and no `finally` of it runs."""

    def end(code):
        assert code == 75 and not (tmp_path / lock.LOCK).exists()
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit if how == "leave" else how), lock.locked(tmp_path):
        assert (tmp_path / lock.LOCK).exists()
        if how == "leave":
            shutdown.leave(75)
        raise how
    assert not (tmp_path / lock.LOCK).exists() and not shutdown._before_leaving


def test_a_finished_run_is_only_shown(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(full_results()))
    with lock.locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("how", ["file", "parent", "lock", "proc", "dangling"])
def test_a_place_that_cannot_be_written_is_named(student, tmp_path, how):
    run = tmp_path / "run"
    if how in ("file", "parent"):
        run.touch()
    elif how == "dangling":
        run.symlink_to(tmp_path / "gone")
    elif how == "lock":
        (run / lock.LOCK).mkdir(parents=True)
    run = {"parent": run / "below", "proc": pathlib.Path("/proc/1/run")}.get(how, run)
    with pytest.raises(UserError, match=f"{run} cannot be written: "):
        gkdjax.run(small(student), run)
