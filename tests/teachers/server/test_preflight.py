"""What a server has to be caught at before anything is learnt from it."""

import contextlib

import numpy as np
import pytest
from fake_server import FakeServer, Reply, script
from fake_teacher import LOGPROBS, MODEL, VOCAB, FakeTeacher

from gkdjax.teachers.server import preflight
from gkdjax.teachers.server.connect import DIALECTS
from gkdjax.teachers.server.preflight import examine
from gkdjax.teachers.server.transport import client
from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.types import SamplingParams
from gkdjax.utils.errors import TeacherRefused, TeacherUnreachable, UserError

IDS = ("return_token_ids", "return_tokens_as_token_ids")
LOGPROBS_FIELDS = ("logprobs", "top_logprobs")
PARTS = tuple(range(1, VOCAB, 2))  # of characters, as a byte-level tokenizer has them
GREEDY = SamplingParams(20, temperature=0.0, top_p=1.0)
TEXT = {"by_text": True}
CHAT = {"by_text": True, "completions": False}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(client, "pause", lambda closed, seconds: None)


def examined(handler, chat, backend="vllm", *, model="", top_k=5, max_retries=0, sampling=None):
    """(what `examine` finds, the server's requests)."""
    limits = Limits(timeout_s=5.0, deadline_s=30.0, max_retries=max_retries)
    sampling = sampling or SamplingParams(20, temperature=0.8, top_p=0.9)
    with FakeServer(handler) as server:
        transport = Transport(server.base, "", limits, trust_env=False)
        with contextlib.closing(transport):
            how = model, DIALECTS[backend], chat, VOCAB, top_k, sampling
            return examine(transport, *how, must_score=backend != "openai"), server.requests


def refused(handler, chat, *words, backend="vllm", **how):
    with pytest.raises(UserError) as error:
        examined(handler, chat, backend, **how)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "backend, how, dialect",
    [
        ("vllm", {}, "prompt_logprobs"),
        ("vllm", {"ignores": ["prompt_logprobs"]}, "echo"),
        ("openai", {}, "completions_by_id"),
        ("openai", TEXT, "completions_by_id"),  # it ignores the fields for ids
        ("openai", TEXT | {"refuses": IDS}, "completions"),
        ("openai", TEXT | {"parts": PARTS, "extensions": True}, "completions_by_id"),
    ],
)
def test_a_server_that_scores(chat, backend, how, dialect):
    server, requests = examined(FakeTeacher(**how), chat, backend)
    found = server.findings
    assert (found.model, found.dialect, found.scores, found.limits) == (MODEL, dialect, True, "")
    assert (found.context_length, found.top_k) == (511, 5)
    assert found.difference < 1e-5
    ids = preflight.probe_ids(chat)
    rows = LOGPROBS[ids[:-1]]
    assert np.allclose(server.probe.target_logprob, rows[np.arange(len(rows)), ids[1:]], atol=1e-5)
    assert np.allclose(server.probe.top_logprobs[:, 0], rows.max(axis=1), atol=1e-5)
    # No padding and no id that the server does not have is sent.
    sent = [r.body["prompt"] for r in requests if r.path == "/v1/completions"]
    flat = [i for prompt in sent for i in (prompt[0] if isinstance(prompt[0], list) else prompt)]
    assert min(flat) >= 0 and max(flat) < VOCAB and chat.pad_id not in flat


@pytest.mark.parametrize(
    "how, dialect, reason",
    [
        (TEXT | {"ignores": ["echo"]}, "completions_by_id", "not null"),
        (CHAT, "chat_by_id", "no token ids"),
        (CHAT | {"refuses": IDS}, "chat", "no token ids"),
        (CHAT | {"parts": PARTS, "extensions": True}, "chat_by_id", "no token ids"),
        # As at llama-cpp-python: what it writes is right, what it scores is shifted.
        (
            TEXT | {"row": lambda t, ids, at: t.logprob_table[ids[max(at - 1 - t.scoring, 0)]]},
            *("completions_by_id", "shifts positions"),
        ),
    ],
)
def test_a_server_that_only_writes(chat, how, dialect, reason):
    server, _ = examined(FakeTeacher(**how), chat, "openai")
    assert (server.findings.dialect, server.findings.scores) == (dialect, False)
    assert reason in server.findings.limits
    assert server.probe.top_logprobs.shape == (8, 5) and server.probe.unmapped == 0
    assert server.findings.tokenizer == "not compared: the server has no /tokenize"


def noisy(noise=0.06, warmer=0.0):
    """Logprobs in low precision: those of text that it has written are other sums."""

    def row(teacher, ids, at):
        row = teacher.logprob_table[ids[at - 1]]
        if at <= teacher.read:
            return row * (1.0 + warmer * teacher.scoring)
        row = row + np.random.default_rng(ids[:at]).normal(0.0, noise, len(row))
        return row - np.log(np.exp(row).sum())

    return row


def penalised(p, seen):
    """As llama-cpp-python samples by default; its logprobs are those before it."""
    return p ** np.where(np.isin(np.arange(len(p)), seen), 1.5, 1.0)


class Fewer(FakeTeacher):
    def _best(self, ids, at, k):
        return super()._best(ids, at, min(k, 2))


class OtherTokenizer(FakeTeacher):
    def _tokenize(self, body):
        return Reply({"tokens": super()._tokenize(body).body["tokens"][::-1]})


class Processed(FakeTeacher):
    """Logprobs after temperature; greedy answers have raw ones."""

    def _choice(self, index, ids, body):
        raw, temperature = self.logprob_table, body.get("temperature") or 1.0
        if "prompt_logprobs" not in body:
            logits = raw / temperature
            self.logprob_table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        choice = super()._choice(index, ids, body)
        self.logprob_table = raw
        return choice


def row_shift(by, lower=0.0):
    return {"row": lambda t, ids, at: t.logprob_table[ids[at - 1 - by]] - lower * t.scoring}


@pytest.mark.parametrize(
    "handler, backend, words",
    [
        (FakeTeacher(**TEXT, parts=PARTS), "openai", ["names no id here", "backend='vllm'"]),
        (FakeTeacher(greedy=penalised), "vllm", ["repeat_penalty is 1.1"]),
        (FakeTeacher(bos=True), "vllm", ["the preflight"]),
        (FakeTeacher(ignores=LOGPROBS_FIELDS), "vllm", ["logprobs"]),
        (FakeTeacher(ignores=LOGPROBS_FIELDS, completions=False), "openai", ["logprobs"]),
        (FakeTeacher(ignores=["prompt_logprobs", "echo"]), "vllm", ["does not score given ids"]),
        (FakeTeacher(most_top_k=3), "vllm", ["greater than max allowed"]),
        (Fewer(**TEXT), "openai", ["set teacher.top_k=2"]),
        (FakeTeacher(**TEXT, **row_shift(1)), "openai", ["another position"]),
        (FakeTeacher(row=noisy(noise=0.0, warmer=0.05)), "vllm", ["not compute at temperature 1"]),
        (FakeTeacher(row=noisy(warmer=0.06)), "vllm", ["does not compute at temperature 1"]),
        (FakeTeacher(row=noisy(noise=0.25)), "vllm", ["its own noise of", "allows 0.100"]),
        (FakeTeacher(**row_shift(0, lower=0.03)), "vllm", ["noise of 0.0000 allows 0.010"]),
        (Processed(), "vllm", ["rollout.temperature=0.8", "raw_logprobs"]),
        (OtherTokenizer(), "vllm", ["the tokenizer of bigram", "config.teacher.tokenizer"]),
        (script(Reply(b"<html>hi")), "vllm", ["<html>hi", "config.teacher.api_base"]),
        (script(Reply({"error": {"message": "no such key"}}, 401)), "vllm", ["no such key"]),
    ],
)
def test_a_server_that_cannot_be_used(chat, handler, backend, words):
    refused(handler, chat, *words, backend=backend)


def test_a_low_precision_is_known_by_its_own_noise(chat):
    server, requests = examined(FakeTeacher(row=noisy()), chat)
    assert server.findings.scores and 0.01 < server.findings.difference < 0.1
    assert len(requests) == 36 and len(examined(FakeTeacher(), chat)[1]) == 30


def test_a_route_with_raw_logprobs_is_taken_where_there_is_one(chat):
    server, _ = examined(Processed(**TEXT), chat, "openai")
    assert server.findings.dialect == "chat_by_id"


def nucleus(p, seen):
    above = np.asarray([p[p > one].sum() for one in p])
    return np.where(above < 0.6, p, 0.0)


@pytest.mark.parametrize("by_text", [False, True])
@pytest.mark.parametrize(
    "drawn, message",
    [
        (lambda p, seen: np.eye(len(p))[p.argmax()], "it draws greedily"),
        (lambda p, seen: p**2, "a lower temperature"),
        (lambda p, seen: p ** (1 / 0.7), "a lower temperature"),  # as people set it
        (nucleus, "only from the best"),
        (lambda p, seen: p**0.4, "a higher temperature"),
        (lambda p, seen: p * np.exp(-2.0 * np.isin(np.arange(len(p)), seen)), "a repetition"),
        (lambda p, seen: np.roll(p, 1), "from something else"),
    ],
)
def test_samples_that_are_not_from_what_is_reported(chat, drawn, message, by_text):
    teacher = FakeTeacher(drawn=drawn, by_text=by_text)
    words = "mean negative logprob", message
    refused(teacher, chat, *words, backend="openai" if by_text else "vllm", top_k=20)


def test_a_run_whose_text_is_greedy_takes_a_greedy_server(chat):
    greedy = FakeTeacher(drawn=lambda p, seen: np.eye(len(p))[p.argmax()])
    assert examined(greedy, chat, sampling=GREEDY)[0].findings.scores


class Broken(FakeTeacher):
    """Answers /v1/completions with the same 500, as llama-cpp-python does to token ids."""

    broken, everywhere = 10**9, False  # requests that fail, of all routes that write

    def __call__(self, request):
        routes = ["/v1/completions", *["/v1/chat/completions"] * self.everywhere]
        if request.path in routes and self.broken > 0:
            self.broken -= 1
            return Reply({"error": {"message": "'int' object has no attribute"}}, status=500)
        return super().__call__(request)


def test_a_route_that_fails_again_and_again_is_refused_and_the_next_is_tried(chat):
    server, requests = examined(Broken(**TEXT), chat, "openai", max_retries=1000)
    assert server.findings.dialect.startswith("chat") and not server.findings.scores
    ways = sum(name.startswith("completions") for name in DIALECTS["openai"])
    asked = [request.path for request in requests]
    assert asked.count("/v1/completions") == 4 * ways  # three times, and once more in the end


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_server_that_comes_back_is_asked_the_best_way(chat, everywhere):
    teacher = Broken(**TEXT)
    ways = [name for name in DIALECTS["openai"] if everywhere or name.startswith("completions")]
    teacher.broken, teacher.everywhere = 3 * len(ways) + 2 * everywhere, everywhere
    server, _ = examined(teacher, chat, "openai", max_retries=1000)
    assert server.findings.dialect.startswith("completions") and server.findings.scores


def test_a_server_that_stays_away_is_no_users_fault(chat):
    with pytest.raises(TeacherUnreachable, match=r"attempts: \d+; the last one: status 500"):
        examined(Broken(), chat, max_retries=8)


class LlamaCppPython(Broken):
    """No ids on the one route, and a penalty on the other unless it is switched off."""

    def _write(self, ids, body):
        self.greedy = penalised if body.get("repeat_penalty") != 1.0 else lambda p, seen: p
        return super()._write(ids, body)


def test_llama_cpp_python_is_asked_to_sample_without_its_penalty(chat):
    how = {"backend": "openai", "max_retries": 1000}
    server, _ = examined(LlamaCppPython(**TEXT), chat, **how)
    assert server.findings.dialect == "chat_by_id"
    deaf = LlamaCppPython(**TEXT, refuses=("repeat_penalty",))
    refused(deaf, chat, "completions_by_id writes nothing", "repeat_penalty is 1.1", **how)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=500),
        Reply(b"<html>"),
        Reply({"tokens": []}),  # llama-server's, where it does not find the text
        Reply(silent=True),
    ],
)
def test_a_route_that_is_not_for_everybody_may_fail_as_it_likes(chat, reply):
    teacher = FakeTeacher()

    def without(request):
        return reply if request.path == "/tokenize" else teacher(request)

    server, requests = examined(without, chat)
    assert "not compared" in server.findings.tokenizer
    assert sum(request.path == "/tokenize" for request in requests) == 2


ADAPTER = {"id": MODEL, "max_model_len": None, "parent": "base"}
TWO = [{"id": MODEL}, {"id": "other"}]


def info(*lengths):
    return [{"model_name": MODEL, "model_info": {"max_input_tokens": n}} for n in lengths]


@pytest.mark.parametrize(
    "how, length, source",
    [
        ({}, 511, f"max_model_len=512 of {MODEL} in /v1/models"),
        # vLLM's entry of a LoRA leaves it to the model that it is for
        ({"entries": [{"id": "base", "max_model_len": 99}, ADAPTER]}, 98, "99 of base in /v1/mo"),
        ({"entries": [ADAPTER | {"parent": MODEL}], "tells": True}, 511, "in /tokenize"),
        ({"entries": [ADAPTER], "tells": True, "window": 300}, 299, "max_model_len=300 of"),
        ({"entries": [{"id": MODEL, "max_input_tokens": 80}]}, 80, f"=80 of {MODEL} in /v1/models"),
        ({"entries": TWO, "proxied": info(70, None, 60)}, 60, "max_input_tokens=60"),
        ({"entries": TWO, "proxied": [{"model_name": "other"}, 3]}, None, ""),
        ({"entries": TWO}, None, ""),
    ],
)
def test_how_much_it_reads_and_who_says_so(chat, how, length, source):
    found = examined(FakeTeacher(**how), chat, model=MODEL)[0].findings
    both = "max_model_len" in found.context_source
    assert (found.context_length, found.context_written) == (length, length + 1 if both else None)
    assert source in found.context_source and bool(found.context_source) == bool(source)


def test_the_model_by_its_name(chat):
    refused(FakeTeacher(), chat, "'bigam'", "did you mean 'bigram'", model="bigam")
    refused(FakeTeacher(entries=TWO), chat, "['bigram', 'other']", "config.teacher.api_model")
    teacher = FakeTeacher()

    def unlisted(request):
        return Reply(status=404) if request.path == "/v1/models" else teacher(request)

    with pytest.raises(TeacherRefused):
        examined(unlisted, chat)
    assert examined(unlisted, chat, model="mine")[0].findings.model == "mine"
