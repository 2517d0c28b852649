"""cache_teacher asks ahead for all that a run will need; the run then needs no server."""

import pathlib

import pytest
from fake_server import FakeServer
from fake_teacher import FakeTeacher
from small_runs import losses_hex, small

from gkdjax import config, loop
from gkdjax.errors import UserError
from gkdjax.tools import cache_teacher


def job(student: str, base: str, **changes):
    """Text of the teacher, with refreshes, text of the rows, an anchor and an evaluation."""
    c = small(student, teacher__backend="vllm", teacher__api_base=base, teacher__top_k=5)
    c.data.train = [{"prompt": f"ask {i}"} for i in range(6)]
    c.data.train += [{"prompt": f"told {i}", "response": "so it is"} for i in range(2)]
    c.trajectory.refresh_every_steps = 2
    c.train.steps = 6
    c.anchor.data = [{"prompt": "other", "response": "no"}, {"prompt": "more"}]
    c.anchor.towards = "teacher"
    c.anchor.batch_size = 4
    c.eval.held_out = [{"prompt": f"q {i}"} for i in range(3)]
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c


@pytest.fixture
def server():
    with FakeServer(FakeTeacher()) as made:
        yield made


def fill(c, workdir: pathlib.Path, buy: bool = True) -> None:
    cache_teacher.cache(config.parse(c), workdir, None, None, buy=buy)


def rows_asked(server: FakeServer) -> int:
    return server.handler.answered


def test_a_run_after_it_needs_no_server(student, server, tmp_path, capsys):
    c = job(student, server.base)
    run = tmp_path / "run"
    cache_teacher.cache(config.parse(c), run, 1e6, 0.0, buy=False)
    told = capsys.readouterr().out
    preflights = rows_asked(server)  # two rows each
    assert preflights == 2
    assert "requests" in told and "price, at most" in told

    fill(c, run)
    bought = rows_asked(server) - 2 * preflights
    assert bought > 20
    assert ["bought", str(bought)] in [line.split() for line in capsys.readouterr().out.split("\n")]

    fill(c, run)  # nothing is bought twice
    assert rows_asked(server) == bought + 3 * preflights
    asked = len(server.requests)

    server.stop()
    c.teacher.offline = True
    results = loop.run(c, run)
    assert results["teacher"]["bought"] == 0
    assert len(server.requests) == asked
    server.start()
    loop.run(job(student, server.base), tmp_path / "online")
    assert losses_hex(run) == losses_hex(tmp_path / "online")


def test_without_a_store_or_a_server_there_is_nothing_to_fill(student, server, tmp_path):
    for changes, reason in (
        ({"teacher__store": None}, "no store to fill"),
        ({"teacher__offline": True}, "no server to ask"),
    ):
        with pytest.raises(UserError, match=reason):
            fill(job(student, server.base, **changes), tmp_path / "run")
    with pytest.raises(UserError, match="no server to ask"):
        fill(small(student), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_estimate_adds_up():
    assert "0.00 USD" in cache_teacher.estimate([], 1.0, 2.0)
    assert "USD" not in cache_teacher.estimate([], None, None)


def test_another_config_in_the_same_directory_is_refused(student, server, tmp_path):
    fill(job(student, server.base), tmp_path, buy=False)
    fill(job(student, server.base, teacher__concurrency=3), tmp_path, buy=False)
    with pytest.raises(UserError, match="holds a run of another config"):
        fill(job(student, server.base, train__seed=5), tmp_path, buy=False)
