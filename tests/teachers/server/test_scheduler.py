"""A server that goes away when it is asked about certain rows, or comes back with other weights."""

import contextlib
import threading

import numpy as np
import pytest
from fake_server import FakeServer, Reply
from fake_teacher import MODEL, VOCAB, FakeTeacher
from stored_answers import BIG, answer

from gkdjax.teachers.server import scheduler
from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest
from gkdjax.teachers.server.dialects.vllm import PromptLogprobs
from gkdjax.teachers.server.scheduler import Pool, Suspects
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.teachers.server.transport import client
from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.types import SamplingParams
from gkdjax.utils.errors import TeacherRefused, TeacherUnreachable

BAD = 66  # the first id of the row that is too much
PAUSES = 3  # that somebody takes to start the server again


def rows(kind: str) -> list[ScoreRequest] | list[SampleRequest]:
    """Eight, of which the sixth is bad; those to score fit into one request."""
    ids = [np.asarray([BAD if i == 5 else 10 + i, 7, 8, 9], np.int32) for i in range(8)]
    if kind == "scores":
        at = np.asarray([1, 2], np.int32)
        return [ScoreRequest(f"row {i}", row, at, 5) for i, row in enumerate(ids)]
    how = SamplingParams(4, 1.0, 1.0)
    return [SampleRequest(f"row {i}", row, (), how, 0, (1,), 5) for i, row in enumerate(ids)]


class Ending(FakeTeacher):
    """Goes away without an answer when it is asked about the bad row."""

    def __post_init__(self):
        super().__post_init__()
        self.server, self.ends, self.comes_back = None, 0, True
        self.asked: list[list[int]] = []  # the first ids of each request
        self._down, self._pauses = threading.Event(), 0
        self._stops = threading.Thread()

    def __call__(self, request):
        prompts = request.body["prompt"]
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        with self._lock:
            self.asked.append([ids[0] for ids in prompts])
            if BAD in self.asked[-1] and not self._down.is_set():
                self.ends += 1
                self._down.set()
                self._stops = threading.Thread(target=self.server.stop)
                self._stops.start()
        return Reply(delay_s=60.0) if self._down.is_set() else super().__call__(request)

    def pause(self, closed, seconds) -> None:
        """Between two attempts of whoever asks; some of them later it is there again."""
        closed.wait(0.01)
        with self._lock:
            self._pauses += self._down.is_set() and not self._stops.is_alive()
            if self.comes_back and self._pauses == PAUSES:
                self.start_again()

    def start_again(self) -> None:
        self._pauses = 0
        self._down.clear()
        self.server.start()


@pytest.fixture
def ending(monkeypatch):
    teacher = Ending()
    with FakeServer(teacher) as teacher.server:
        monkeypatch.setattr(client, "pause", teacher.pause)
        yield teacher


@contextlib.contextmanager
def pool(server, directory, max_retries=1000, probe=BIG.probe):
    store = AnswerStore(directory / "answers.sqlite")
    store.add_teacher(BIG)
    transport = Transport(server.base, "", Limits(10.0, 60.0, max_retries), trust_env=False)
    made = Pool(
        *(
            PromptLogprobs(MODEL, VOCAB),
            transport,
            store,
            BIG,
            Suspects(directory / "teacher_ended_at.json"),
        ),
        probe=lambda: probe,
        concurrency=4,
        max_unreadable=0.0,
    )
    with contextlib.closing(made):
        yield made


def in_store(directory) -> int:
    with AnswerStore(directory / "answers.sqlite", read_only=True) as store:
        return len(list(store.all()))


@pytest.mark.parametrize("kind", ["scores", "samples"])
def test_the_row_that_a_server_does_not_survive_is_named(kind, ending, tmp_path):
    requests = rows(kind)
    named = pytest.raises(TeacherUnreachable, match=r"^row 5: .*does not survive this row")
    with pool(ending.server, tmp_path) as asked, named as error:
        getattr(asked, kind)(requests)()
    assert error.value.exit_code == 4
    ends = ending.ends
    assert 4 <= ends <= 5  # twice among others, or once more until all have seen it; twice alone
    assert ending.asked.count([BAD]) >= 2
    kept = in_store(tmp_path)
    assert kept >= 4
    # The next start asks for what is missing, and first of all not for others with it.
    ending.asked.clear()
    with pool(ending.server, tmp_path) as asked:
        getattr(asked, kind)(requests[:5] + requests[6:])()
        assert sum(map(len, ending.asked)) == 7 - kept
        with pytest.raises(TeacherUnreachable, match=r"^row 5: "):
            getattr(asked, kind)(requests)()
    assert (ending.ends, in_store(tmp_path)) == (ends + 2, 7)


def test_a_server_that_nobody_starts_again_is_asked_one_by_one_at_the_next_start(ending, tmp_path):
    ending.comes_back = False
    named = pytest.raises(TeacherUnreachable, match=r"about row 0, row 1, .*one by one")
    with pool(ending.server, tmp_path, max_retries=8) as asked, named as error:
        asked.scores(rows("scores"))()
    assert "survive this row" not in str(error.value) and ending.ends == 1
    ending.start_again()
    named = pytest.raises(TeacherUnreachable, match=r"^row 5: .*does not survive this row")
    with pool(ending.server, tmp_path, max_retries=8) as asked, named:
        asked.scores(rows("scores"))()
    assert ending.ends == 2 and ending.asked[-1] == [BAD]
    assert in_store(tmp_path) >= 4


@pytest.mark.parametrize("outage, bought", [(True, 0), (False, 1)])
def test_other_weights_are_noticed_after_an_outage_and_now_and_then(
    outage, bought, tmp_path, monkeypatch
):
    monkeypatch.setattr(scheduler, "_PROBE_EVERY", 2)
    monkeypatch.setattr(client, "pause", lambda closed, seconds: None)
    teacher = FakeTeacher()

    def handler(request):
        return Reply(silent=True) if outage and not request.number else teacher(request)

    refused = pytest.raises(TeacherRefused, match="'big' with other weights than before")
    with FakeServer(handler) as server, pool(server, tmp_path, probe=answer(101)) as made, refused:
        for row in rows("scores")[:2]:
            made.scores([row])()
    assert in_store(tmp_path) == bought


def test_an_answer_that_comes_when_the_pool_is_closed_is_kept(tmp_path, monkeypatch):
    """After an outage the weights are asked for first, which is one request more."""
    monkeypatch.setattr(client, "pause", lambda closed, seconds: None)
    teacher = FakeTeacher()

    def handler(request):
        if not request.number:
            return Reply(silent=True)
        made.transport.close()
        return teacher(request)

    with FakeServer(handler) as server, pool(server, tmp_path) as made:
        made.probe = lambda: made.transport.get("/v1/models") and BIG.probe
        made.scores(rows("scores")[:1])()
    assert in_store(tmp_path) == 1
