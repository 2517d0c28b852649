"""check_teacher tries a server and shows its abilities, without a run."""

import json

import numpy as np
import pytest
from fake_server import FakeServer, Reply, script
from fake_teacher import FakeTeacher
from small_runs import small

from gkdjax import config
from gkdjax.teachers.server.answers import TeacherAnswer
from gkdjax.tools import check_teacher
from gkdjax.utils.errors import TeacherUnreachable, UserError


def found(student, handler, backend="vllm", local=None) -> dict[str, str]:
    with FakeServer(handler) as server:
        c = small(student, teacher__backend=backend, teacher__api_base=server.base)
        c.teacher.top_k, c.teacher.concurrency, c.teacher.max_retries = 5, 2, 0
        return dict(check_teacher.rows(config.parse(c), local))


def test_a_server_that_can_do_everything(student):
    rows = found(student, FakeTeacher())
    wanted = {
        **{"model": "bigram", "dialect": "vllm, prompt_logprobs", "logprobs of a token": "5"},
        "longest view": "511 tokens (max_model_len=512 of bigram in /v1/models)",
        "on-policy, rows with a response": "yes",
    }
    assert rows | wanted == rows
    assert rows["scores given ids"].startswith("yes")
    assert rows["scoring, one request"].endswith("ms (median of 5)")
    assert rows["writing, 2 at a time"].endswith("tokens/s")


@pytest.mark.parametrize("kind", ["scoring", "writing", "chat"])
def test_the_speed_is_that_of_texts_which_no_cache_has(student, kind):
    teacher, asked = FakeTeacher(by_text=kind == "chat", completions=kind != "chat"), []

    def handler(request):
        body = request.body or {}
        if (body.get("prompt_logprobs") is not None) == (kind == "scoring"):
            asked.append(json.dumps(body.get("messages") or body.get("prompt")))
        return teacher(request)

    found(student, handler, "openai" if kind == "chat" else "vllm")
    measured = asked[-(5 + 2 * 2) :]
    assert len({*measured}) == len(measured) == 9


def test_a_server_that_only_writes(student):
    rows = found(student, FakeTeacher(by_text=True, completions=False), "openai")
    assert rows["scores given ids"].startswith("no: ")
    assert rows["on-policy, rows with a response"].startswith("no: ")
    assert not any(name.startswith("scoring") for name in rows)


def test_errors_of_the_server_are_raised(student):
    refusal = Reply({"error": {"message": "who are you?"}}, status=401)
    with pytest.raises(UserError, match="who are you"):
        found(student, script(refusal))
    with pytest.raises(TeacherUnreachable):
        found(student, script(Reply(status=503)))
    with pytest.raises(UserError, match="nothing to compare"):
        found(student, FakeTeacher(by_text=True, completions=False), "openai", local=student)


def test_the_same_weights_are_near_and_others_are_not(student):
    logits = np.random.default_rng(0).standard_normal((3, 30))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :4].astype(np.int32)
    best = np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)
    best[0, 3] = -np.inf  # absent: its id means nothing
    tail = np.log1p(-np.exp(best).sum(axis=1)).astype(np.float32)
    probe = TeacherAnswer(ids[:, 0], best[:, 0], ids, best, tail)
    apart, divergence = check_teacher.compare(logits, probe)
    assert apart < 1e-6 and abs(divergence) < 1e-6
    apart, divergence = check_teacher.compare(logits[::-1], probe)
    assert apart > 0.1 and divergence > 0.01


def test_the_table_is_printed_and_no_run_begun(student, tmp_path, capsys):
    with FakeServer(FakeTeacher()) as server:
        c = small(student, teacher__backend="vllm", teacher__api_base=f"{server.base}/v1")
        check_teacher.flags.FLAGS.mark_as_parsed()
        check_teacher.main(config.parse(c), tmp_path / "run")
        c.teacher.api_model = "other"
        with pytest.raises(UserError, match=r"config\.teacher\.api_model = 'other'"):
            check_teacher.main(config.parse(c), tmp_path / "run")
    assert "scores given ids" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
