"""check_teacher tries a server and says what it found, without a run."""

import subprocess
import sys

import numpy as np
import pytest
from fake_server import FakeServer, Reply, script
from fake_teacher import FakeTeacher
from small_runs import small

from gkdjax import config
from gkdjax.teachers.server.answers import TeacherAnswer
from gkdjax.tools import check_teacher
from gkdjax.utils.errors import TeacherUnreachable, UserError


def found(student, handler, backend="vllm", local=None, **keys) -> dict[str, str]:
    with FakeServer(handler) as server:
        c = small(student, teacher__backend=backend, teacher__api_base=server.base)
        for key, value in {"top_k": 5, "concurrency": 2, "max_retries": 0, **keys}.items():
            c.teacher[key] = value
        return dict(check_teacher.rows(config.parse(c), local))


def test_a_server_that_can_do_everything(student):
    told = found(student, FakeTeacher())
    assert told["model"] == "bigram"
    assert told["dialect"] == "vllm, prompt_logprobs"
    assert told["longest view"] == "511 tokens (max_model_len=512 of bigram in /v1/models)"
    assert told["scores given ids"].startswith("yes")
    assert told["on-policy, rows with a response"] == "yes"
    assert told["logprobs of a token"] == "5"
    assert told["scoring, one request"].endswith("ms (median of 5)")
    assert told["writing, 2 at a time"].endswith("tokens/s")


def test_a_server_that_only_writes(student):
    told = found(student, FakeTeacher(by_text=True, completions=False), "openai")
    assert told["scores given ids"].startswith("no: ")
    assert told["on-policy, rows with a response"].startswith("no: ")
    assert not any(what.startswith("scoring") for what in told)


def test_what_is_wrong_is_raised(student):
    refusal = Reply({"error": {"message": "who are you?"}}, status=401)
    with pytest.raises(UserError, match="who are you"):
        found(student, script(refusal))
    with pytest.raises(TeacherUnreachable):
        found(student, script(Reply(status=503)))
    with pytest.raises(UserError, match="nothing to compare"):
        found(student, FakeTeacher(by_text=True, completions=False), "openai", local=student)
    with pytest.raises(UserError, match="no server to try"):
        list(check_teacher.rows(config.parse(small(student)), None))


def test_the_same_weights_are_near_and_others_are_not(student):
    logits = np.random.default_rng(0).standard_normal((3, 30))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :4].astype(np.int32)
    best = np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)
    best[0, 3] = -np.inf  # absent: its id means nothing
    tail = np.log1p(-np.exp(best).sum(axis=1)).astype(np.float32)
    probe = TeacherAnswer(ids[:, 0], best[:, 0], ids, best, tail)
    apart, divergence = check_teacher.compare(logits, probe)
    assert apart < 1e-6
    assert abs(divergence) < 1e-6
    apart, divergence = check_teacher.compare(logits[::-1], probe)
    assert apart > 0.1
    assert divergence > 0.01


def test_the_command(student, tmp_path):
    path = tmp_path / "mine.py"
    with FakeServer(FakeTeacher()) as server:
        path.write_text(
            "from gkdjax import config\n\n\ndef get_config():\n"
            "    c = config.default()\n"
            f"    c.student.model = {student!r}\n"
            "    c.teacher.backend = 'vllm'\n"
            f"    c.teacher.api_base = '{server.base}/v1'\n"
            "    c.data.train = [{'prompt': 'ask'}]\n"
            "    return c\n"
        )
        command = [sys.executable, "-m", "gkdjax.tools.check_teacher", f"--config={path}"]
        good = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        bad = subprocess.run(
            [*command, "--config.teacher.api_model=other"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    assert good.returncode == 0, good.stderr
    assert "scores given ids" in good.stdout
    assert bad.returncode == 2
    assert bad.stderr.splitlines()[-1].startswith("gkdjax: config.teacher.api_model = 'other'")
    assert "Traceback" not in bad.stderr
    assert sorted(tmp_path.iterdir()) == [path]  # no run was begun
