"""Whole runs that learn from a teacher behind HTTP: what is asked, bought, stored and learnt."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import threading

import factories
import numpy as np
import pytest
from fake_server import FakeServer
from fake_teacher import LOGPROBS, VOCAB, FakeTeacher
from server_runs import (
    MIXED_ROWS,
    READ_IN_TURN,
    Failing,
    answers_in,
    config_for,
    rows_asked,
)
from small_runs import losses_hex, metrics

import gkdjax
from gkdjax import config
from gkdjax.models import sampler
from gkdjax.rollout import teacher as rollout_teacher
from gkdjax.teachers import scoring
from gkdjax.train import models, offline, run, setup
from gkdjax.train import workdir as workdirs
from gkdjax.train.checkpoint import saved_steps
from gkdjax.types import Message, Prompt
from gkdjax.utils.errors import Preempted, UserError, WrongAnswer

HELD_OUT = [{"prompt": "held"}, {"prompt": "held 2"}]
ANCHOR = [{"prompt": "other", "response": "fine"}, {"prompt": "thing"}]
EVERYTHING = {
    "anchor__data": ANCHOR,
    "anchor__reference": "teacher",
    "gkd__on_policy_fraction": 0.5,
    "eval__prompts": HELD_OUT,
    "train__steps": 6,
}
NOWHERE = "http://127.0.0.1:9"


@dataclasses.dataclass
class Done:
    """A finished run of which the server is still there."""

    config: object
    server: FakeServer
    workdir: pathlib.Path
    results: dict
    asked: list[str]

    def copy(self, **teacher):
        c = self.config.copy_and_resolve_references()
        c.teacher.update(teacher)
        return c

    @property
    def store(self) -> str:
        return str(self.workdir / "answers.sqlite")


@contextlib.contextmanager
def finished(student, workdir, **changes):
    with FakeServer(FakeTeacher()) as server:
        c = config_for(student, server.base, **changes)
        results = gkdjax.run(c, workdir)
        yield Done(c, server, workdir, results, rows_asked(server.requests))


@pytest.fixture(scope="module")
def everything(student, tmp_path_factory):
    """A run with all that can be asked of a server."""
    with finished(student, tmp_path_factory.mktemp("everything") / "run", **EVERYTHING) as done:
        yield done


@pytest.fixture(scope="module")
def off_policy(student, tmp_path_factory):
    """A run whose requests are all known before it."""
    with finished(student, tmp_path_factory.mktemp("off") / "run", train__steps=3) as done:
        yield done


def read(c, workdir, connections) -> setup.RunInputs:
    return setup.read(config.parse(c), workdir, None, connections)


def test_rows_that_the_server_cannot_hold_are_named_before_any_text_is_bought(student, tmp_path):
    """Not by config.json, and an adapter's own entry may have no length."""
    entries = [{"id": "base", "max_model_len": 101}, {"id": "tuned", "parent": "base"}]
    with FakeServer(FakeTeacher(entries=entries)) as server, contextlib.ExitStack() as stack:
        c = config_for(student, server.base, teacher__api_model="tuned", train__steps=3)
        c.rollout.max_new_tokens = 90
        message = rf"max_model_len=101 of base in /v1/models, {server.base}.*rollout.max_new_tokens"
        with pytest.raises(UserError, match=message):
            read(c, tmp_path, stack)
        assert rows_asked(server.requests) == []


def test_every_row_is_bought_once_and_none_is_padded(everything):
    lines = metrics(everything.workdir)
    assert {line["on_policy_rows"] for line in lines} == {0, 4}
    assert sum(4 - line["on_policy_rows"] for line in lines) > len(MIXED_ROWS)  # a second epoch
    counts = everything.results["teacher"]
    assert counts["bought"] == len(everything.asked) == len(set(everything.asked)) > 20
    assert (counts["retries"], counts["lost"], counts["unmapped"]) == (0, 0, 0)
    ids = [json.loads(row)["prompt"] for row in everything.asked]
    assert counts["read_tokens"] == sum(map(len, ids))
    assert all(row[-1] != 0 for row in ids)  # padding stands at the end, and is 0


def test_another_run_on_the_store_buys_only_what_a_changed_student_writes(everything, tmp_path):
    c = everything.copy(store=everything.store)
    c.optim.learning_rate = 2e-2
    before = len(everything.server.requests)
    results = gkdjax.run(c, tmp_path / "run")
    new = rows_asked(everything.server.requests[before:])
    assert 0 < len(new) == results["teacher"]["bought"] < 20
    assert not {*new} & {*everything.asked}
    assert all("prompt_logprobs" in json.loads(row) for row in new)
    c.teacher.offline = True
    with pytest.raises(UserError, match=r"no store has what the student will write"):
        gkdjax.run(c, tmp_path / "offline")


def check_targets(c, workdir, table, shared=None) -> np.ndarray:
    """Compares the targets of the first two steps with `table` -> ids of the best tokens."""
    parsed, best = config.parse(c), []
    with contextlib.ExitStack() as connections:
        rows = setup.read(parsed, workdir, None, connections)
        how = rows.dataset, rows.teacher, workdir, shared or rows.vocab_size
        dataset = rollout_teacher.prepare(parsed, "train", *how)
        for step in range(2):  # all eight rows: those the teacher wrote, and those it reads
            (batch, cached), names = dataset.batch(step), dataset.names(step)
            found = scoring.request_targets(rows.teacher, batch, names, cached, rows.mesh)()
            mask_BN, target_ids = batch.target_mask_BN, batch.target_ids_BN[batch.target_mask_BN]
            at_BN = np.take_along_axis(batch.teacher_tokens_BT, batch.teacher_at_BN, axis=1)
            logprobs = table[at_BN[mask_BN]]  # [n, V]
            best.append(np.argsort(-logprobs, axis=1)[:, :8])
            top = np.take_along_axis(logprobs, best[-1], axis=1)
            np.testing.assert_array_equal(np.asarray(found.topk.ids)[mask_BN], best[-1])
            for got, wanted, rtol in (
                (found.topk.logprobs, top, 1e-6),
                (found.topk.tail_logprob, np.log1p(-np.exp(top).sum(axis=1)), 1e-5),
                (found.target_logprob_BN, logprobs[np.arange(len(top)), target_ids], 1e-6),
            ):
                np.testing.assert_allclose(np.asarray(got)[mask_BN], wanted, rtol=rtol)
            assert found.shared == shared and target_ids.max() < (shared or rows.vocab_size)
    return np.concatenate(best)


def test_the_targets_of_a_step_are_the_teachers(off_policy, tmp_path):
    check_targets(off_policy.config, tmp_path, LOGPROBS)


class Grown(FakeTeacher):
    """Has an added token behind those of the student, and likes it everywhere."""

    def __post_init__(self):
        super().__post_init__()
        self.tokenizer.add_tokens(["<think>", "</think>"])
        p = 0.85 * np.exp(self.logprob_table)
        p[:, VOCAB] += 0.15
        self.logprob_table = np.log(p)


def test_a_server_may_have_added_tokens_if_its_tokenizer_is_named(tmp_path):
    """The student has no row for them; the server names them, and what it writes has none."""
    student = factories.model_dir(tmp_path / "student", vocab_size=VOCAB)
    with FakeServer(Grown()) as server:
        server.handler.tokenizer.save_pretrained(tmp_path / "tokenizer")
        c = config_for(student, server.base)
        (tmp_path / "named").mkdir()
        with pytest.raises(UserError, match=r"teacher\.tokenizer"):
            check_targets(c, tmp_path, server.handler.logprob_table)
        c.teacher.tokenizer = str(tmp_path / "tokenizer")
        sources = models.resolve_models(config.parse(c), tmp_path, None)
        assert sources.teacher_chat.shared == VOCAB
        assert models.ids_of_server(sources, VOCAB) == VOCAB + 2
        best = check_targets(c, tmp_path / "named", server.handler.logprob_table, shared=VOCAB)
        assert best.max() == VOCAB


def test_without_a_store_the_run_is_the_same(off_policy, tmp_path):
    results = gkdjax.run(off_policy.copy(store=None), tmp_path)
    assert losses_hex(tmp_path) == losses_hex(off_policy.workdir)
    assert results["teacher"]["stored"] == 0
    assert not (tmp_path / "answers.sqlite").exists()


def test_a_filled_store_is_enough_and_an_offline_run_names_what_it_lacks(off_policy, tmp_path):
    store = str(tmp_path / "filled.sqlite")
    here = off_policy.copy(store=store)
    away = off_policy.copy(store=store, offline=True, api_base=NOWHERE)
    fill(here, tmp_path / "filling", here.data.train[:-1])
    with pytest.raises(UserError, match=r"lacks the answers to 1 requests, of data\.train:7\b"):
        gkdjax.run(away, tmp_path / "lacking")
    fill(here, tmp_path / "filling again", here.data.train)
    results = gkdjax.run(away, tmp_path / "offline")
    assert losses_hex(tmp_path / "offline") == losses_hex(off_policy.workdir)
    assert results["teacher"]["bought"] == 0


def fill(c, workdir, rows) -> None:
    """Fills the store as `tools.cache_teacher`."""
    c = c.copy_and_resolve_references()
    c.data.train = rows
    parsed = config.parse(c)
    workdirs.claim(workdir, parsed)
    with contextlib.ExitStack() as connections:
        inputs = setup.read(parsed, workdir, None, connections)
        offline.prefill_answers(inputs, inputs.teacher, workdir, parsed.train.steps)


def test_other_weights_under_the_same_name_are_noticed(off_policy, tmp_path, caplog):
    c = off_policy.copy(store=off_policy.store)
    c.train.steps = 1
    with FakeServer(FakeTeacher(seed=1)) as server:
        c.teacher.api_base = server.base
        results = gkdjax.run(c, tmp_path)
        assert "has other weights now" in caplog.text
        assert results["teacher"]["stored"] == 0
        assert results["teacher"]["bought"] == len(rows_asked(server.requests)) > 4
        begun = off_policy.workdir / "results.json"
        aside = begun.rename(begun.with_name("results.aside"))
        try:
            with pytest.raises(UserError, match="began with other weights than bigram has now"):
                gkdjax.run(off_policy.copy(api_base=server.base), off_policy.workdir)
        finally:
            aside.rename(begun)


def test_a_run_that_waits_for_its_teacher_is_stopped_saved_and_goes_on(student, tmp_path):
    """SIGTERM while an answer is minutes away: the run does not wait for it to save its state."""
    teacher, left, path = Failing(), threading.Event(), tmp_path / "run"

    def hold(request):
        """Answers for the last step only when the run has left it."""
        os.kill(os.getpid(), signal.SIGTERM)
        assert left.wait(60.0)
        return teacher.well(request)

    def watch():
        """Sets `left` as soon as the stopped run is saved."""
        while not left.wait(0.1) and not saved_steps(path):
            pass
        left.set()

    teacher.faults = {5: hold}
    with FakeServer(teacher) as server:
        c = config_for(student, server.base, **READ_IN_TURN, checkpoint__every_steps=100)
        c.teacher.concurrency = 2  # so that the steps before are answered meanwhile
        watched = threading.Thread(target=watch)
        watched.start()
        try:
            with pytest.raises(Preempted, match=r"SIGTERM.*saved"):
                gkdjax.run(c, path)
        finally:
            left.set()
            watched.join()
        teacher.faults = {}
        gkdjax.run(c, path)
        gkdjax.run(c, tmp_path / "undisturbed")
    assert losses_hex(path) == losses_hex(tmp_path / "undisturbed")


# A server that names tokens by text and scores nothing: only its own text is learnt.
BY_TEXT = {"by_text": True, "completions": False}
CHAT = {"teacher__backend": "openai", "data__train": MIXED_ROWS[:4], "train__steps": 2}


class Unreadable(FakeTeacher):
    """Gives the first token of half of its responses a text that no token has."""

    def _chat(self, body):
        reply = super()._chat(body)
        asked = body["messages"][-1]["content"]
        if asked == "held 2" or (body["temperature"] and body["seed"] % 2):
            for token in reply.body["choices"][0]["logprobs"]["content"][:1]:
                token["token"] = "\ufffd"
        return reply


def test_it_learns_from_the_text_of_a_server_that_scores_nothing(student, tmp_path, capsys, caplog):
    with FakeServer(Unreadable(**BY_TEXT)) as server:
        c = config_for(student, server.base, **CHAT, eval__prompts=HELD_OUT)
        c.rollout.max_retries, c.teacher.max_unreadable = 20, 1.0
        results = gkdjax.run(c, tmp_path)
    line = results["held_out"]["after"]
    assert {name.partition("/")[0] for name in line} == {"step", "teacher_text"}
    assert "teacher's text, after" in capsys.readouterr().out
    why = results["unavailable"]["distance on the student's own text"]
    assert why.endswith("cannot read it (/v1/chat/completions takes no token ids and scores none)")
    # An answer of the evaluation is not sampled again, but it is named where it is left out.
    assert "1 of the teacher's answers have no token" in caplog.text
    assert "eval.prompts:1" in caplog.text
    # Refused, counted and written again; every row has a response in the end.
    lost = results["teacher"]["lost"] - 1  # one is the evaluation's
    assert results["rows"]["train"]["refused_responses"] >= lost > 0
    assert results["rows"]["train"]["dropped"] == []


def test_too_much_text_that_cannot_be_read_ends_the_run(student, tmp_path):
    """What is bought stays in the store; one in two is lost, and one in twenty may be."""
    with FakeServer(Unreadable(**BY_TEXT)) as server, contextlib.ExitStack() as stack:
        c = config_for(student, server.base, **CHAT, teacher__concurrency=1)
        teacher = read(c, tmp_path, stack).teacher
        ask = np.asarray([9, 9]), (Message("user", "ask"),)
        prompts = [Prompt(f"ask:{i}", *ask) for i in range(40)]
        with pytest.raises(WrongAnswer, match=r"^5 of (9|10) responses .* names no id") as caught:
            teacher.sample(prompts, range(40), sampler.sampling(config.parse(c)))
    assert caught.value.exit_code == 3
    assert "backend='vllm'" in str(caught.value) and "ask:1: answer.choices" in str(caught.value)
    assert len(answers_in(tmp_path / "answers.sqlite")) >= 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gkd__on_policy_fraction": 0.5}, "what the student writes"),
        ({"data__train": MIXED_ROWS}, "rows of data.train"),
        ({"anchor__data": ANCHOR[:1], "anchor__reference": "teacher"}, "rows of anchor.data"),
    ],
)
def test_text_that_it_would_have_to_score_is_refused(
    student, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(run, "assemble", None)  # nothing is loaded before
    with FakeServer(FakeTeacher(**BY_TEXT)) as server:
        c = config_for(student, server.base, **CHAT | changes)
        message = f"takes no token ids and scores none.*wanted of .*{message}"
        with pytest.raises(UserError, match=message) as caught:
            gkdjax.run(c, tmp_path)
    assert caught.value.exit_code == 2
