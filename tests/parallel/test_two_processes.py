"""Two processes with one device each, beside a single one: their batches, and whole runs.

Each test starts processes: JAX finds others only at its start, and in no other way.
"""

import contextlib
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys

import factories
import numpy as np
import pytest
import safetensors.numpy
from fake_bucket import FakeBucket, variables
from fake_server import FakeServer, Reply
from fake_teacher import FakeTeacher
from feeds import feed_of
from server_runs import READ_ROWS, answers_in, config_for, rows_asked
from small_runs import metrics, small

import gkdjax
from gkdjax.data.batching import RowOrder
from gkdjax.data.chat_template import load_chat
from gkdjax.train import lock
from gkdjax.train.checkpoint import saved_steps

HERE = pathlib.Path(__file__).parents[1]
HEADS = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = [{"prompt": f"say {i}"} for i in range(3)]
WRITTEN = [{"prompt": f"ask {i}"} for i in range(5)]
SLOW = pytest.mark.slow(120)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    return factories.model_dir(tmp_path_factory.mktemp("student"), **HEADS)


@pytest.fixture
def start(tmp_path):
    """start(script, its first argument, a path for each process) -> the processes."""
    started = []

    def run(script: str, first, *paths: pathlib.Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
        for index, path in enumerate(paths):
            command = [sys.executable, HERE / script, first, path, coordinator, str(len(paths))]
            log = (tmp_path / f"log-{len(started)}").open("w+")
            process = subprocess.Popen([*command, str(index)], env=environment, stderr=log)
            started.append((process, log))
        return started[-len(paths) :]

    yield run
    for process, log in started:
        process.kill()
        process.wait()
        log.close()


@pytest.fixture
def start_run(start, student, tmp_path):
    """start_run(the directory of each process, the server's address, changes) -> the processes."""

    def run(workdirs: list[pathlib.Path], server: str | None = None, **changes):
        spec = tmp_path / "spec.json"
        spec.write_text(json.dumps({"student": student, "server": server, "changes": changes}))
        return start("run_process.py", spec, *workdirs)

    return run


def errors_of(running, code: int) -> list[str]:
    """What the processes wrote, all of which must end with this code."""
    codes, errors = [process.wait(timeout=400) for process, _ in running], []
    for _, log in running:
        log.seek(0)
        errors.append(log.read())
    assert codes == [code] * len(running), errors
    return errors


def test_two_processes_share_each_batch(start, student, tmp_path):
    paths = [tmp_path / f"{i}.json" for i in range(2)]
    errors_of(start("process_batches.py", student, *paths), 0)
    parts = [json.loads(path.read_text()) for path in paths]
    alone = feed_of(load_chat(student))
    for step, found in enumerate(zip(*parts, strict=True)):
        whole, _ = alone.batch(step)
        assert [f["held"] for f in found] == [h.tolist() for h in np.split(whole.row_id_B, 2)]
        assert [f["own"] for f in found] == [[0, 1], [2, 3]]
        for f in found:
            assert f["fetched"] == whole.row_id_B.tolist()
            assert f["shape"] == list(whole.student_tokens_BS.shape)
            assert f["asked"] == [4, 3, 3, 3]
            assert f["stops"] == (step == 3)  # both, a step after one was asked
            assert f["total"] == int(whole.student_tokens_BS.sum())
    assert step == 4


def losses_of(workdir):
    return [line["loss"] for line in metrics(workdir)]


def test_two_processes_make_the_run_of_one(start_run, tmp_path, student):
    """Weights are cut over both; all that a run writes is written once, by the leader."""
    changes = {
        "gkd__on_policy_fraction": 0.5,
        "anchor__data": [*PROMPTS, {"prompt": "more"}],
        "anchor__batch_size": 4,
        "eval__prompts": PROMPTS,
        "eval__every_steps": 2,
        "train__export": "both",
        "data__validation": [{"prompt": f"v {i}", "response": "ok"} for i in range(3)],
    }
    gkdjax.run(small(student, **changes), tmp_path / "one")
    errors_of(start_run([tmp_path / "two"] * 2, **changes, mesh__fsdp=2), 0)
    one, two = (sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("one", "two"))
    assert one == two
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-5)
    lines = [metrics(tmp_path / name) for name in ("one", "two")]
    for key in ("step", "tokens", "batch_crc32", "on_policy_rows"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    found, expected = (
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("two", "one")
    )
    for condition in ("base", "student", "reprompted_student"):
        assert found[condition] == pytest.approx(expected[condition], rel=1e-3, abs=1e-6)
    assert found["samples"] == expected["samples"]
    for file in ("merged/model.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (safetensors.numpy.load_file(tmp_path / name / file) for name in ("one", "two"))
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            np.testing.assert_allclose(b[name], tensor, atol=1e-4)  # four steps of 1e-2


@SLOW
def test_each_process_asks_its_share_and_one_goes_on_where_both_stopped(
    start_run, tmp_path, student
):
    """SIGTERM reaches one of them. Nothing is asked twice, not even by another number of processes.

    The weights are cut over both, so that each of them holds all rows.
    """
    teacher, running, left = FakeTeacher(), [], [20]

    def stop_one(request):
        if rows_asked([request]):
            left[0] -= 1
            if left[0] == 0:
                running[1][0].send_signal(signal.SIGTERM)
        return teacher(request)

    changes = {"data__train": WRITTEN + READ_ROWS, "train__steps": 12, "teacher__concurrency": 1}
    changes["mesh__tensor"] = 2
    workdir, whole = tmp_path / "two", tmp_path / "one"
    with FakeServer(stop_one) as server:
        running += start_run([workdir] * 2, server.base, **changes)
        errors_of(running, 75)
        assert 0 < len(metrics(workdir)) < 12
        stores = [answers_in(workdir / name) for name in ("answers.sqlite", "answers.1.sqlite")]
        assert all(len(store) > 5 for store in stores)
        gkdjax.run(config_for(student, server.base, **changes), workdir)
        asked = rows_asked(server.requests)
        assert len(asked) == len(set(asked))
        gkdjax.run(config_for(student, server.base, **changes), whole)
        assert sorted(rows_asked(server.requests)[len(asked) :]) == sorted(asked)
    # After some steps of Adam on other devices the rounding shows.
    np.testing.assert_allclose(losses_of(workdir), losses_of(whole), rtol=1e-4)
    text = [(path / "trajectories_train.jsonl").read_text() for path in (workdir, whole)]
    assert text[0] == text[1]


@SLOW
def test_a_server_that_fails_one_process_ends_both(start_run, tmp_path):
    """A row of the fourth step is never answered, and only one process asks for it."""
    teacher = FakeTeacher()
    late = READ_ROWS[RowOrder(0, "data.train", 4, [0] * 24).rows(3)[1]]["prompt"]
    row = str(factories.tokenizer()(f"{late}\n")["input_ids"][1:-1])[1:-1] + ", "

    def deaf_to_one(request):
        return Reply(silent=True) if row in str(request.body) else teacher(request)

    changes = {"data__train": READ_ROWS, "train__steps": 6, "teacher__concurrency": 1}
    changes |= {"teacher__deadline_s": 4.0, "teacher__max_retries": 2, "checkpoint__every_steps": 9}
    with FakeServer(deaf_to_one) as server:
        errors = errors_of(start_run([tmp_path / "run"] * 2, server.base, **changes), 4)
    made = len(metrics(tmp_path / "run"))
    assert 0 < made < 6
    assert (tmp_path / "run" / "checkpoints" / str(made)).exists()
    assert sum("TeacherUnreachable: process" in error for error in errors) == 1


@SLOW
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_process_that_is_stopped_ends_the_others(start_run, tmp_path, stopped):
    """The leader, or another one; each of those that are left waits in a collective for it."""
    changes = {"train__watchdog_s": 5.0, "train__steps": 100_000}
    changes |= dict.fromkeys(("train__batch_size", "anchor__batch_size", "eval__batch_size"), 6)
    workdir = tmp_path / "run"
    running = start_run([workdir] * 3, **changes, mesh__fsdp=1)
    while not (workdir / "metrics.jsonl").exists() or len(metrics(workdir)) < 4:
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"ended with {running[0][0].wait(timeout=0.2)}")
    running[stopped][0].send_signal(signal.SIGSTOP)
    errors = errors_of(running[:stopped] + running[stopped + 1 :], 75)
    assert all("a step has taken longer than 5 s" in error for error in errors)
    assert all("in train" in error for error in errors)  # the stacks


@SLOW
@pytest.mark.parametrize(("full", "for_good"), [(1, False), (0, True)])
def test_a_save_that_one_process_cannot_write_is_known_to_both(start_run, tmp_path, full, for_good):
    """It is made good when there is room, and else both end alike."""
    workdir, limit = tmp_path / "run", resource.RLIMIT_FSIZE
    changes = {"train__steps": 100_000, "checkpoint__every_steps": 10, "student__lora__rank": 64}
    running = start_run([workdir] * 2, **changes)
    (process, log), (other, _) = running[full], running[1 - full]

    def wait_until(found):
        while not found():
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"ended with {process.wait(timeout=0.1)}")

    wait_until(lambda: saved_steps(workdir))
    limits = resource.prlimit(process.pid, limit)
    resource.prlimit(process.pid, limit, (40_000, limits[1]))  # no other file is so large
    if not for_good:
        wait_until(lambda: "File too large" in pathlib.Path(log.name).read_text())
        resource.prlimit(process.pid, limit, limits)
        before = saved_steps(workdir)[-1]
        wait_until(lambda: saved_steps(workdir)[-1] > before)
        other.send_signal(signal.SIGTERM)
    errors = errors_of(running, 75)
    assert all("checkpoints cannot be written: File too large" in error for error in errors)
    assert all(("The run is saved at step" in error) == for_good for error in errors)
    assert f"process {full}: " in errors[1 - full]


@SLOW
@pytest.mark.parametrize("count", [1, 2])
def test_a_run_in_a_bucket_goes_on_on_another_machine(start_run, tmp_path, monkeypatch, count):
    """All of its processes are killed before a checkpoint is whole; what it wrote is newer."""
    bucket, running = FakeBucket(), []

    def kill_before_the_last_checkpoint(request):
        if running and "checkpoints%2F4%2Fcommit_success.txt" in request.path:
            for process, _ in running:
                process.kill()
            running.clear()
        return bucket(request) if running else Reply(silent=True)

    def written(name: str) -> list[dict]:
        return [json.loads(line) for line in bucket.objects[name][0].splitlines()]

    changes = {"gkd__on_policy_fraction": 0.5, "eval__prompts": PROMPTS, "mesh__fsdp": 2}
    with FakeServer(kill_before_the_last_checkpoint) as server:
        for name, value in variables(server.base).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
        killed = start_run(["gs://bucket/run"] * count, **changes)
        running += killed
        assert [process.wait(timeout=400) for process, _ in killed] == [-signal.SIGKILL] * count
        assert len(written("run/metrics.jsonl")) == 4 and "run/results.json" not in bucket.objects
        assert "run/checkpoints/2/commit_success.txt" in bucket.objects
        assert "run/checkpoints/4/commit_success.txt" not in bucket.objects
        server.handler = bucket
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
        errors_of(start_run(["gs://bucket/run"] * count, **changes), 0)
        errors_of(start_run([tmp_path / "local"] * count, **changes), 0)
    lines, expected = written("run/metrics.jsonl"), metrics(tmp_path / "local")
    for key in ("step", "loss", "batch_crc32", "on_policy_rows"):
        assert [line[key] for line in lines] == [line[key] for line in expected]
    for name in ("trajectories_train.jsonl", "merged/model.safetensors"):
        assert bucket.objects[f"run/{name}"][0] == (tmp_path / "local" / name).read_bytes()


@SLOW
def test_directories_that_are_not_the_same_are_refused(start_run, tmp_path):
    errors = errors_of(start_run([tmp_path / "a", tmp_path / "b"]), 2)
    assert all("processes [1] do not see" in error for error in errors)


@SLOW
def test_a_locked_directory_keeps_all_processes_out(start_run, tmp_path):
    with lock.locked(tmp_path):
        errors = errors_of(start_run([tmp_path] * 2), 2)
    assert all("another process is at work" in error for error in errors)
