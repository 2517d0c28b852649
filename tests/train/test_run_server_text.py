"""Runs on servers that name tokens by text and score nothing: only their own text is learnt."""

import contextlib

import numpy as np
import pytest
from fake_server import FakeServer
from fake_teacher import FakeTeacher
from server_runs import MIXED_ROWS, answers_in, config_for

import gkdjax
from gkdjax import config
from gkdjax.models import sampler
from gkdjax.train import run, setup
from gkdjax.types import Message, Prompt
from gkdjax.utils.errors import UserError, WrongAnswer

UNANSWERED = MIXED_ROWS[:4]
CHAT = {"teacher__backend": "openai", "data__train": UNANSWERED, "train__steps": 2}


class Unreadable(FakeTeacher):
    """Names the tokens that it draws first as nobody can tell apart, in half of its responses."""

    def _chat(self, body):
        reply = super()._chat(body)
        told = body["messages"][-1]["content"]
        if told == "held 2" or (body["temperature"] and body["seed"] % 2):
            drawn = reply.body["choices"][0]["logprobs"]["content"]
            for token in drawn[:1]:
                token["token"] = "\ufffd"
        return reply


def test_it_learns_from_the_servers_own_text(student, tmp_path, capsys, caplog):
    with FakeServer(Unreadable(by_text=True, completions=False)) as server:
        held_out = [{"prompt": "held"}, {"prompt": "held 2"}]
        c = config_for(student, server.base, **CHAT, eval__prompts=held_out)
        c.rollout.max_retries, c.teacher.max_unreadable = 20, 1.0
        results = gkdjax.run(c, tmp_path)
    line = results["held_out"]["after"]
    assert {name.partition("/")[0] for name in line} == {"step", "teacher_text"}
    assert "teacher's text, after" in capsys.readouterr().out
    why = results["unavailable"]["distance on the student's own text"]
    assert why.endswith("cannot read it (/v1/chat/completions takes no token ids and scores none)")
    # An answer of the evaluation is not drawn again, but what it is left out of is told.
    assert "1 of the teacher's answers have no token" in caplog.text
    assert "eval.prompts:1" in caplog.text
    # Refused, counted and written again; every row has a response in the end.
    lost = results["teacher"]["lost"] - 1  # one is the evaluation's
    assert results["rows"]["train"]["refused_responses"] >= lost > 0
    assert results["rows"]["train"]["dropped"] == []


def test_too_much_text_that_cannot_be_read_ends_the_run(student, tmp_path):
    """What is bought stays in the store; one in two is lost, and one in twenty may be."""
    with (
        FakeServer(Unreadable(by_text=True, completions=False)) as server,
        contextlib.ExitStack() as stack,
    ):
        c = config.parse(config_for(student, server.base, **CHAT, teacher__concurrency=1))
        rows = setup.read(c, tmp_path, None, stack)
        ask = np.asarray([9, 9]), (Message("user", "ask"),)
        prompts = [Prompt(f"ask:{i}", *ask) for i in range(40)]
        with pytest.raises(WrongAnswer, match=r"^5 of (9|10) responses .* names no id") as caught:
            rows.teacher.sample(prompts, range(40), sampler.sampling(c))
    assert caught.value.exit_code == 3
    assert "backend='vllm'" in str(caught.value) and "ask:1: answer.choices" in str(caught.value)
    assert len(answers_in(tmp_path / "answers.sqlite")) >= 9


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gkd__on_policy_fraction": 0.5}, "what the student writes"),
        ({"data__train": MIXED_ROWS}, "rows of data.train"),
        (
            {"anchor__data": [{"prompt": "a", "response": "b"}], "anchor__reference": "teacher"},
            "rows of anchor.data",
        ),
    ],
)
def test_what_it_would_have_to_score_is_refused_at_once(
    student, tmp_path, monkeypatch, changes, told
):
    monkeypatch.setattr(run, "assemble", None)  # nothing is loaded before
    with FakeServer(FakeTeacher(by_text=True, completions=False)) as server:
        c = config_for(student, server.base, **CHAT | changes)
        with pytest.raises(UserError, match=f"wanted of .*{told}") as caught:
            gkdjax.run(c, tmp_path)
    assert caught.value.exit_code == 2
    assert "takes no token ids and scores none" in str(caught.value)
