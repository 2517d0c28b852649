"""Whole runs that learn from a teacher behind HTTP: what is asked, bought, stored and learnt."""

import contextlib
import dataclasses
import json

import factories
import numpy as np
import pytest
from fake_server import FakeServer
from fake_teacher import LOGPROBS, VOCAB, FakeTeacher
from server_runs import MIXED_ROWS, config_for, rows_asked
from small_runs import losses_hex, metrics

import gkdjax
from gkdjax import config
from gkdjax.rollout import teacher
from gkdjax.teachers import scoring
from gkdjax.train import models, offline, setup
from gkdjax.train import workdir as workdirs
from gkdjax.utils.errors import UserError

HELD_OUT = [{"prompt": "held"}, {"prompt": "held 2"}]
ANCHOR = [{"prompt": "other", "response": "fine"}, {"prompt": "thing"}]
ANCHORED = {"anchor__data": ANCHOR, "anchor__reference": "teacher", "anchor__batch_size": 4}
ON_POLICY = {"gkd__on_policy_fraction": 0.5, "eval__prompts": HELD_OUT, "train__steps": 6}


@dataclasses.dataclass
class Done:
    """A finished run of which the server is still there."""

    config: object
    server: FakeServer
    workdir: object
    results: dict
    asked: list[str]


@contextlib.contextmanager
def finished(student, workdir, **changes):
    with FakeServer(FakeTeacher()) as server:
        c = config_for(student, server.base, **changes)
        results = gkdjax.run(c, workdir)
        yield Done(c, server, workdir, results, rows_asked(server.requests))


@pytest.fixture(scope="module")
def everything(student, tmp_path_factory):
    """A run with all that can be asked of a server."""
    workdir = tmp_path_factory.mktemp("everything") / "run"
    with finished(student, workdir, **ANCHORED, **ON_POLICY) as done:
        yield done


@pytest.fixture(scope="module")
def off_policy(student, tmp_path_factory):
    """A run that needs nothing beyond what can be known before it."""
    with finished(student, tmp_path_factory.mktemp("off") / "run", train__steps=3) as done:
        yield done


def test_rows_that_the_server_cannot_hold_are_named_before_any_text_is_bought(student, tmp_path):
    """Not by config.json, and an adapter's own entry may say nothing."""
    entries = [{"id": "base", "max_model_len": 101}, {"id": "tuned", "parent": "base"}]
    with FakeServer(FakeTeacher(entries=entries)) as server, contextlib.ExitStack() as stack:
        c = config_for(student, server.base, teacher__api_model="tuned", train__steps=3)
        c.rollout.max_new_tokens = 90
        told = rf"max_model_len=101 of base in /v1/models, {server.base}.*rollout.max_new_tokens"
        with pytest.raises(UserError, match=told):
            setup.read(config.parse(c), tmp_path, None, stack)
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
    c = everything.config.copy_and_resolve_references()
    c.teacher.store = str(everything.workdir / "answers.sqlite")
    c.optim.learning_rate = 2e-2
    before = len(everything.server.requests)
    results = gkdjax.run(c, tmp_path)
    new = rows_asked(everything.server.requests[before:])
    assert 0 < len(new) == results["teacher"]["bought"] < 20
    assert not {*new} & {*everything.asked}
    assert all("prompt_logprobs" in json.loads(row) for row in new)


def check_targets(c, workdir, table, shared=None) -> list[np.ndarray]:
    """What reaches the first two steps is what the teacher says by `table` -> ids of its best."""
    parsed, best_ids = config.parse(c), []
    with contextlib.ExitStack() as connections:
        rows = setup.read(parsed, workdir, None, connections)
        vocab_size = shared or rows.vocab_size
        feed = teacher.prepare(parsed, "train", rows.dataset, rows.teacher, workdir, vocab_size)
        for step in range(2):  # all eight rows: those the teacher wrote, and those it reads
            batch, kept = feed.batch(step)
            assert batch.target_ids_BN.max() < vocab_size
            names = feed.names(step)
            found = scoring.request_targets(rows.teacher, batch, names, kept, rows.mesh)()
            assert found.shared == shared
            for row, n in zip(*np.nonzero(batch.target_mask_BN), strict=True):
                said = table[batch.teacher_tokens_BT[row, batch.teacher_at_BN[row, n]]]
                best = np.argsort(-said)[:8]
                np.testing.assert_array_equal(found.topk.ids[row, n], best)
                np.testing.assert_allclose(found.topk.logprobs[row, n], said[best], rtol=1e-6)
                rest = np.log1p(-np.exp(said[best]).sum())
                np.testing.assert_allclose(found.topk.tail_logprob[row, n], rest, rtol=1e-5)
                own = said[batch.target_ids_BN[row, n]]
                np.testing.assert_allclose(found.target_logprob_BN[row, n], own, rtol=1e-6)
                best_ids.append(best)
    return best_ids


def test_what_reaches_the_step_is_what_the_teacher_says(off_policy, tmp_path):
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
        assert np.max(best) == VOCAB


def test_without_a_store_the_run_is_the_same(off_policy, tmp_path):
    c = off_policy.config.copy_and_resolve_references()
    c.teacher.store = None
    results = gkdjax.run(c, tmp_path)
    assert losses_hex(tmp_path) == losses_hex(off_policy.workdir)
    assert results["teacher"]["stored"] == 0
    assert not (tmp_path / "answers.sqlite").exists()


def test_a_filled_store_is_enough_and_says_what_it_lacks(off_policy, tmp_path):
    c = off_policy.config.copy_and_resolve_references()
    c.teacher.store = str(tmp_path / "filled.sqlite")
    fill(c, tmp_path / "filling", c.data.train[:-1])
    c.teacher.offline, c.teacher.api_base = True, "http://127.0.0.1:9"
    told = r"lacks the answers to 1 requests, of data\.train:7\b"
    with pytest.raises(UserError, match=told) as caught:
        gkdjax.run(c, tmp_path / "lacking")
    assert caught.value.exit_code == 2
    c.teacher.offline, c.teacher.api_base = False, off_policy.server.base
    fill(c, tmp_path / "filling again", c.data.train)
    c.teacher.offline, c.teacher.api_base = True, "http://127.0.0.1:9"
    results = gkdjax.run(c, tmp_path / "offline")
    assert losses_hex(tmp_path / "offline") == losses_hex(off_policy.workdir)
    assert results["teacher"]["bought"] == 0


def fill(c, workdir, rows) -> None:
    """As cache_teacher does."""
    c = c.copy_and_resolve_references()
    c.data.train = rows
    parsed = config.parse(c)
    workdirs.claim(workdir, parsed)
    with contextlib.ExitStack() as connections:
        read = setup.read(parsed, workdir, None, connections)
        offline.prefill_answers(read, read.teacher, workdir, parsed.train.steps)


def test_offline_nobody_reads_what_the_student_will_write(student, everything, tmp_path):
    c = everything.config.copy_and_resolve_references()
    c.teacher.store, c.teacher.offline = str(everything.workdir / "answers.sqlite"), True
    with pytest.raises(UserError, match=r"no store has what the student will write"):
        gkdjax.run(c, tmp_path)


def test_other_weights_under_the_same_name_are_noticed(off_policy, tmp_path, caplog):
    c = off_policy.config.copy_and_resolve_references()
    c.teacher.store = str(off_policy.workdir / "answers.sqlite")
    c.train.steps = 1
    with FakeServer(FakeTeacher(seed=1)) as server:
        c.teacher.api_base = server.base
        results = gkdjax.run(c, tmp_path)
        assert "has other weights now" in caplog.text
        assert results["teacher"]["stored"] == 0
        assert results["teacher"]["bought"] == len(rows_asked(server.requests)) > 4
        begun = off_policy.workdir / "results.json"
        aside = begun.rename(begun.with_name("results.aside"))
        c.train.steps = off_policy.config.train.steps
        c.teacher.store = off_policy.config.teacher.store
        try:
            with pytest.raises(UserError, match="began with other weights than bigram has now"):
                gkdjax.run(c, off_policy.workdir)
        finally:
            aside.rename(begun)
