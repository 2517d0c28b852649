"""Directories in a bucket: real clients of Google's object storage, and a stand-in for it."""

import json
import pathlib
import shutil
import sys

import pytest
from fake_bucket import FORBIDDEN, UNAVAILABLE, FakeBucket, variables
from fake_server import FakeServer

from gkdjax.train.places import open_places
from gkdjax.train.stopping import StopRequest
from gkdjax.utils import remote
from gkdjax.utils.errors import Preempted, StorageUnreachable, UserError

RUN = "gs://bucket/runs/a"


async def at_once(seconds: float) -> None:
    pass


@pytest.fixture
def storage(monkeypatch):
    """A server whose `handler` is a bucket."""
    with FakeServer(FakeBucket()) as server:
        for name, value in variables(server.base).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)  # between its attempts
        monkeypatch.setattr(remote, "EVERY_S", 0.05)
        monkeypatch.setattr(remote, "_SILENT_S", 1.0)
        yield server


@pytest.fixture
def on_host(monkeypatch, tmp_path):
    """on_host(name) -> the directories of the run there: each host has a cache of its own."""

    def opened(name: str):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return open_places(RUN, StopRequest())

    return opened


def held(storage) -> dict[str, str]:
    """The files of the run in the bucket."""
    objects = storage.handler.objects.items()
    return {name.removeprefix("runs/a/"): data.decode() for name, (data, _) in objects}


def lock(storage) -> dict:
    return json.loads(held(storage)[".gkdjax-lock"])


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_run_is_kept_whichever_way_it_ends_and_goes_on_elsewhere(storage, on_host):
    with pytest.raises(Preempted, match=f"^{RUN}/x is safe"), on_host("one") as places:
        assert str(places.run) == RUN and places.own == places.shared
        (places.own / "config.json").write_text("1")
        (places.own / "train.kept").mkdir()
        (places.own / "train.kept" / "0.safetensors").write_bytes(b"k" * 6 * 2**20)
        places.keep()
        assert held(storage)["config.json"] == "1"
        (places.own / "config.json").write_text("2")
        (places.own / "metrics.jsonl").write_text("3")
        for unwanted in ("a.part", "answers.sqlite", ".merged.gkdjax-part"):
            (places.own / unwanted).write_text("")
        raise Preempted(f"{places.own}/x is safe")
    files = held(storage)
    assert sorted(files) == [
        *(".gkdjax-lock", "config.json", "metrics.jsonl", "train.kept/0.safetensors")
    ]
    assert files["config.json"] == "2" and not lock(storage)["working"]
    storage.handler.objects |= {"runs/a/merged/x": (b"large", 99), "runs/ab": (b"another", 98)}
    with pytest.raises(KeyError), on_host("two") as places:
        assert sorted(p.name for p in places.own.iterdir()) == [
            *(".gkdjax-copy", ".gkdjax-lock", "config.json", "metrics.jsonl", "train.kept")
        ]
        (places.own / "config.json").unlink()
        raise KeyError
    assert sorted(held(storage)) == [
        *(".gkdjax-lock", "merged/x", "metrics.jsonl", "runs/ab", "train.kept/0.safetensors")
    ]


def leave_killed(storage, on_host, host: str) -> pathlib.Path:
    """A process that was killed before it sent its last lines -> its directory."""
    with pytest.raises(KeyError), on_host(host) as places:
        (places.own / "metrics.jsonl").write_text("sent")
        places.keep()
        before = dict(storage.handler.objects)
        raise KeyError
    storage.handler.objects = before
    (places.own / "metrics.jsonl").write_text("sent and more")
    return places.own


def test_a_killed_run_goes_on_with_all_it_wrote_on_its_host(storage, on_host):
    own = leave_killed(storage, on_host, "one")
    (own / "new.json").write_text("")
    with on_host("one") as places:
        assert held(storage)["metrics.jsonl"] == "sent and more"
        assert (places.own / "new.json").exists()


def test_a_killed_run_goes_on_elsewhere_with_what_was_sent(storage, on_host, caplog):
    own = leave_killed(storage, on_host, "one")
    assert lock(storage)["working"]
    with pytest.raises(KeyError), on_host("two") as places:
        assert (places.own / "metrics.jsonl").read_text() == "sent"
        raise KeyError
    assert "sees no sign of life" in caplog.text
    with pytest.raises(KeyError), on_host("one") as places:  # its copy is an old one now
        assert places.own == own and (own / "metrics.jsonl").read_text() == "sent"
        raise KeyError


def test_a_run_at_work_keeps_others_out(storage, on_host):
    with on_host("one") as places:
        with pytest.raises(UserError, match=r"at work in gs://bucket/runs/a: process .* on host"):
            on_host("two").__enter__()
        assert places.own.exists()
    assert not lock(storage)["working"]


def test_a_copy_of_the_whole_disk_does_not_open_the_lock(storage, on_host, tmp_path, monkeypatch):
    with on_host("one"):
        shutil.copytree(tmp_path / "one", tmp_path / "clone")
        for lock_of_one in (tmp_path / "clone").rglob(".gkdjax-lock"):
            lock_of_one.unlink()
        monkeypatch.setattr(remote.socket, "gethostname", lambda: "another")
        with pytest.raises(UserError, match="at work in gs://bucket/runs/a"):
            on_host("clone").__enter__()


def test_a_lock_that_is_none_of_ours_counts_as_held(storage, on_host, caplog):
    storage.handler.objects["runs/a/.gkdjax-lock"] = b"\0garbage", 99
    with on_host("one"):
        assert lock(storage)["working"]
    assert "is of process unknown on host unknown, last seen unknown" in caplog.text


def test_a_fault_of_our_own_is_no_outage():
    for fault in (TypeError("x"), KeyError("x"), ValueError("x")):
        with pytest.raises(type(fault)), remote.writing(remote.place(RUN)):
            raise fault
    away = ValueError("UNAVAILABLE: Error writing [tensorstore_spec='...']")
    with pytest.raises(StorageUnreachable, match="UNAVAILABLE"), remote.writing(remote.place(RUN)):
        raise away


def test_a_run_whose_lock_was_taken_ends(storage, on_host, monkeypatch):
    left = []
    monkeypatch.setattr("gkdjax.parallel.shutdown.leave", lambda code: left.append(code))
    with on_host("one"):
        storage.handler.objects["runs/a/.gkdjax-lock"] = b"{}", 99
        while not left:
            pass
    assert left[0] == 75 and held(storage)[".gkdjax-lock"] == "{}"


def test_results_are_sent_last_and_a_finished_run_only_read(storage, on_host):
    with on_host("one") as places:
        for name in ("results.json", "z.json", "metrics.jsonl"):
            (places.own / name).write_text("{}")
        storage.handler.objects.clear()
        (places.own / "results.json").write_text('{"steps": 4}')
    sent = [name for name in storage.handler.objects if not name.endswith("-lock")]
    assert sent[-1] == "runs/a/results.json"
    assert not list(places.own.iterdir())  # nothing is left behind
    objects = dict(storage.handler.objects)
    with on_host("two") as places:
        assert (places.own / "results.json").read_text() == '{"steps": 4}'
    assert storage.handler.objects == objects


@pytest.mark.parametrize(
    ("reply", "kind", "code"),
    [(FORBIDDEN, UserError, 2), (UNAVAILABLE, StorageUnreachable, 75)],
)
def test_storage_that_refuses_or_is_away(storage, on_host, reply, kind, code):
    bucket, number = storage.handler, len(storage.requests)
    storage.handler = lambda request: reply
    with pytest.raises(kind, match=f"^{RUN} cannot be ") as found:
        on_host("one").__enter__()
    assert found.value.exit_code == code and "\n" not in str(found.value)
    storage.handler = bucket
    with pytest.raises(kind, match=f"^{RUN} cannot be "), on_host("one") as places:
        (places.own / "a.json").write_text("")
        number = len(storage.requests)
        storage.handler = lambda request: reply
        places.keep()
    assert len(storage.requests) > number
    storage.handler = bucket


def test_what_cannot_be_a_directory(monkeypatch):
    for path in ("s3://bucket/run", "gs://", "gs:///run"):
        with pytest.raises(UserError, match="gs://BUCKET/RUN"):
            remote.place(path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"needs gcsfs.*pip install -e '.\[gcs\]'"):
        open_places(RUN, StopRequest()).__enter__()
