"""cache_teacher asks ahead for everything that a run will need; the run then needs no server."""

import pathlib

import pytest
from fake_server import FakeServer
from fake_teacher import FakeTeacher
from recorded_answers import sample_request, score_request
from small_runs import losses_hex, small

import gkdjax
from gkdjax import config
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.tools import cache_teacher
from gkdjax.utils.errors import UserError


def job(student: str, base: str, **changes):
    """Text of the teacher, with refreshes, text of the rows, an anchor and an evaluation."""
    c = small(student, teacher__backend="vllm", teacher__api_base=base, teacher__top_k=5)
    c.data.train = [{"prompt": f"ask {i}"} for i in range(6)]
    c.data.train += [{"prompt": f"told {i}", "response": "so it is"} for i in range(2)]
    c.rollout.refresh_every_steps = 2
    c.train.steps = 6
    c.anchor.data = [{"prompt": "other", "response": "no"}, {"prompt": "more"}]
    c.anchor.reference = "teacher"
    c.anchor.batch_size = 4
    c.data.validation = [{"prompt": "checked"}, {"prompt": "read", "response": "so be it"}]
    c.eval.prompts = [{"prompt": f"q {i}"} for i in range(3)]
    c.eval.heldout = [{"prompt": f"h {i}", "answer": "x"} for i in range(2)]
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c


@pytest.fixture
def server():
    with FakeServer(FakeTeacher()) as made:
        yield made


def fill(c, workdir: pathlib.Path, *prices: float, buy: bool = True) -> None:
    cache_teacher.cache(config.parse(c), workdir, *(prices or (None, None)), buy=buy)


def test_a_run_after_it_needs_no_server(student, server, tmp_path, capsys):
    c, run = job(student, server.base), tmp_path / "run"
    fill(c, run, 1e6, 0.0, buy=False)
    printed = capsys.readouterr().out
    preflights = server.handler.answered  # as many rows each
    assert preflights == 33
    assert "requests" in printed and "price, at most" in printed

    fill(c, run)
    bought = server.handler.answered - 2 * preflights
    assert bought > 20
    assert ["bought", str(bought)] in [line.split() for line in capsys.readouterr().out.split("\n")]

    fill(c, run)  # nothing is bought twice
    assert server.handler.answered == bought + 3 * preflights
    asked = len(server.requests)

    server.stop()
    c.teacher.offline = True
    results = gkdjax.run(c, run)
    assert results["teacher"]["bought"] == 0
    assert len(server.requests) == asked
    assert results["held_out"]["after"]["validation/loss"] > 0
    assert "heldout_accuracy" in results["prompted_teacher"]
    server.start()
    gkdjax.run(job(student, server.base), tmp_path / "online")
    assert losses_hex(run) == losses_hex(tmp_path / "online")


def test_nothing_is_bought_that_the_run_would_not_ask_for(student, server, tmp_path):
    rows = [{"prompt": f"told {i}", "response": "so it is"} for i in range(40)]
    c = job(student, server.base, data__train=rows, train__steps=2, anchor__data=None)
    c.data.validation = None
    c.rollout.refresh_every_steps = None
    fill(c, tmp_path / "run")
    results = gkdjax.run(c, tmp_path / "run")
    assert results["teacher"]["bought"] > 0  # the student's text of the evaluation, alone
    c.teacher.offline = True
    c.teacher.store = str(tmp_path / "run" / "answers.sqlite")
    assert gkdjax.run(c, tmp_path / "other")["teacher"]["bought"] == 0
    with AnswerStore(c.teacher.store, read_only=True) as store:
        scored = [stored for stored in store.all() if stored.kind == "score"]
    assert 8 <= len(scored) <= 8 + results["teacher"]["bought"]


def test_earlier_answers_of_a_refreshed_row_are_read_ahead_too(student, server, tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [*talk, {"role": "user", "content": f"c {i}"}]} for i in range(6)]
    c = job(student, server.base, data__train=rows, anchor__data=None)
    fill(c, tmp_path / "run")
    server.stop()
    c.teacher.offline = True
    assert gkdjax.run(c, tmp_path / "run")["teacher"]["bought"] == 0


def test_without_a_store_or_a_server_there_is_nothing_to_fill(student, server, tmp_path):
    for c, reason in (
        (job(student, server.base, teacher__store=None), "no store to fill"),
        (job(student, server.base, teacher__offline=True), "no server to ask"),
        (small(student), "no server to ask"),
    ):
        with pytest.raises(UserError, match=reason):
            fill(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_estimate_adds_up_what_is_read_and_written():
    """A server writes one token where it only scores."""
    requests = [sample_request([5] * 9, tokens=20), *2 * [score_request([5] * 12)]]
    printed = " ".join(cache_teacher.estimate(requests, 1e6, 1e4).split())
    assert "requests 3 responses to be written 1 texts to be scored 2" in printed
    assert "read 33 tokens to be written, at most 22 price, at most 33.22 USD" in printed
    assert "0.00 USD" in cache_teacher.estimate([], 1.0, 2.0)
    assert "USD" not in cache_teacher.estimate([], None, None)


def test_another_config_in_the_same_directory_is_refused(student, server, tmp_path):
    fill(job(student, server.base, train__seed=3), tmp_path, buy=False)  # a look at the price
    fill(job(student, server.base), tmp_path)
    fill(job(student, server.base, teacher__concurrency=3), tmp_path)
    with pytest.raises(UserError, match="holds a run of another config"):
        fill(job(student, server.base, train__seed=5), tmp_path)
