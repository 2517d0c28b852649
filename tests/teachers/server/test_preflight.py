"""What a server has to be caught at before anything is learnt from it."""

import contextlib

import factories
import numpy as np
import pytest
from fake_server import FakeServer, Reply, script
from fake_teacher import END, LOGPROBS, MODEL, VOCAB, FakeTeacher

from gkdjax.data.chat_template import load_chat
from gkdjax.teachers.server import preflight
from gkdjax.teachers.server.connect import DIALECTS
from gkdjax.teachers.server.preflight import examine
from gkdjax.teachers.server.transport import client
from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.types import SamplingParams
from gkdjax.utils.errors import TeacherRefused, TeacherUnreachable, UserError

IDS = ("return_token_ids", "return_tokens_as_token_ids")
PARTS = tuple(range(1, VOCAB, 2))  # of characters, as a byte-level tokenizer has them

SAMPLING = SamplingParams(20, temperature=0.8, top_p=0.9)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    factories.tokenizer().save_pretrained(directory)
    return load_chat(directory)


def examined(
    handler,
    chat,
    backend="vllm",
    *,
    model="",
    top_k=5,
    vocab_size=VOCAB,
    sampling=SAMPLING,
    max_retries=0,
):
    """(what `examine` finds, the server's requests)."""
    limits = Limits(timeout_s=5.0, deadline_s=30.0, max_retries=max_retries)
    with FakeServer(handler) as server:
        transport = Transport(server.base, "", limits, trust_env=False)
        with contextlib.closing(transport):
            found = examine(
                transport,
                model,
                DIALECTS[backend],
                chat,
                vocab_size,
                top_k,
                sampling,
                must_score=backend != "openai",
            )
        return found, server.requests


def refused(handler, chat, *words, backend="vllm", **how):
    with pytest.raises(UserError) as caught:
        examined(handler, chat, backend, **how)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "backend, lies, dialect",
    [
        ("vllm", {}, "prompt_logprobs"),
        ("vllm", {"prompt_logprobs": False}, "echo"),
        ("openai", {}, "completions_by_id"),
        ("openai", {"by_text": True}, "completions_by_id"),  # it ignores what it is asked beside
        ("openai", {"by_text": True, "refuses": IDS}, "completions"),
        ("openai", {"by_text": True, "parts": PARTS, "extensions": True}, "completions_by_id"),
    ],
)
def test_a_server_that_scores(chat, backend, lies, dialect):
    server, _ = examined(FakeTeacher(**lies), chat, backend)
    found = server.findings
    assert (found.model, found.dialect, found.scores, found.limits) == (MODEL, dialect, True, "")
    assert (found.context_length, found.top_k) == (511, 5)
    assert found.difference < 1e-5
    ids = preflight.probe_ids(chat)
    rows = LOGPROBS[ids[:-1]]
    assert np.allclose(server.probe.target_logprob, rows[np.arange(len(rows)), ids[1:]], atol=1e-5)
    assert np.allclose(server.probe.top_logprobs[:, 0], rows.max(axis=1), atol=1e-5)


@pytest.mark.parametrize(
    "lies, dialect, reason",
    [
        ({"by_text": True, "echo": False}, "completions_by_id", "not null"),
        ({"by_text": True, "completions": False}, "chat_by_id", "no token ids"),
        ({"by_text": True, "completions": False, "refuses": IDS}, "chat", "no token ids"),
        (
            {"by_text": True, "completions": False, "parts": PARTS, "extensions": True},
            "chat_by_id",
            "no token ids",
        ),
    ],
)
def test_a_server_that_only_writes(chat, lies, dialect, reason):
    server, _ = examined(FakeTeacher(**lies), chat, "openai")
    assert (server.findings.dialect, server.findings.scores) == (dialect, False)
    assert reason in server.findings.limits
    assert server.findings.limits
    assert server.probe.top_logprobs.shape == (8, 5)
    assert server.probe.unmapped == 0
    assert server.findings.tokenizer == "not compared: the server has no /tokenize"


def test_parts_of_characters_in_text_are_refused_with_what_to_do(chat):
    teacher = FakeTeacher(by_text=True, parts=PARTS)
    why = "names no id here", "use teacher.backend='vllm' or 'sglang'"
    refused(teacher, chat, *why, "completions writes nothing", backend="openai")


class OffByOne(FakeTeacher):
    """As llama-cpp-python has it: what it writes is right, what it scores is shifted."""

    def _row(self, ids, at):
        return self.logprob_table[ids[max(at - 1 - (self.scoring and 1), 0)]]

    def _choice(self, index, ids, body):
        self.scoring = bool(body.get("echo") or body.get("prompt_logprobs"))
        return super()._choice(index, ids, body)


def test_scores_that_are_off_by_one_are_not_used(chat):
    server, _ = examined(OffByOne(by_text=True), chat, "openai")
    assert not server.findings.scores
    assert "shifts positions" in server.findings.limits
    refused(OffByOne(), chat, "does not score given ids", "shifts positions")


@pytest.fixture
def quickly(monkeypatch):
    """No pauses between attempts."""
    monkeypatch.setattr(client, "pause", lambda closed, seconds: None)


class Broken(FakeTeacher):
    """Answers /v1/completions with the same 500, as llama-cpp-python does to token ids."""

    broken = 10**9  # requests of any kind that fail
    everywhere = False  # and not of that route alone

    def __call__(self, request):
        posted = request.path == "/v1/completions"
        if self.everywhere and request.method == "POST" and request.path != "/tokenize":
            posted = True
        if posted and self.broken > 0:
            self.broken -= 1
            return Reply({"error": {"message": "'int' object has no attribute"}}, status=500)
        return super().__call__(request)


def test_a_route_that_fails_again_and_again_is_refused_and_the_next_is_tried(chat, quickly):
    server, requests = examined(Broken(by_text=True), chat, "openai", max_retries=1000)
    assert server.findings.dialect.startswith("chat") and not server.findings.scores
    asked = [request.path for request in requests]
    ways = sum(name.startswith("completions") for name in DIALECTS["openai"])
    assert asked.count("/v1/completions") == 4 * ways  # three times, and once more in the end


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_server_that_comes_back_is_asked_the_best_way(chat, quickly, everywhere):
    teacher = Broken(by_text=True)
    ways = [name for name in DIALECTS["openai"] if everywhere or name.startswith("completions")]
    teacher.broken, teacher.everywhere = 3 * len(ways) + 2 * everywhere, everywhere
    server, _ = examined(teacher, chat, "openai", max_retries=1000)
    assert server.findings.dialect.startswith("completions") and server.findings.scores


def test_a_server_that_stays_away_is_no_users_fault(chat, quickly):
    teacher = Broken()
    with pytest.raises(TeacherUnreachable, match=r"attempts: \d+; the last one: status 500"):
        examined(teacher, chat, max_retries=8)


class Penalised(FakeTeacher):
    """Draws with llama-cpp-python's default unless told; its logprobs are those before it."""

    def _write(self, ids, body):
        if body.get("repeat_penalty") == 1.0:
            return super()._write(ids, body)
        written = []
        for _ in range(body["max_tokens"]):
            row = self.logprob_table[[*ids, *written][-1]].copy()
            row[[*{*ids, *written}]] *= 1.5
            written.append(int(row.argmax()))
        return written


def test_a_repetition_penalty_is_called_so(chat):
    refused(Penalised(), chat, "repeat_penalty is 1.1")


class LlamaCppPython(Broken, Penalised):
    """No ids on the one route, and a penalty on the other."""


def test_llama_cpp_python_is_told_to_draw_without_its_penalty(chat, quickly):
    how = {"backend": "openai", "max_retries": 1000}
    server, _ = examined(LlamaCppPython(by_text=True), chat, **how)
    assert server.findings.dialect == "chat_by_id"
    deaf = LlamaCppPython(by_text=True, refuses=("repeat_penalty",))
    refused(deaf, chat, "completions_by_id writes nothing", "repeat_penalty is 1.1", **how)


def test_a_token_put_before_the_prompt_is_seen(chat):
    refused(FakeTeacher(bos=True), chat, "the preflight")


def test_ignored_logprobs(chat):
    refused(FakeTeacher(logprobs=False), chat, "logprobs")
    refused(FakeTeacher(logprobs=False, completions=False), chat, "logprobs", backend="openai")


def test_ignored_echo_and_prompt_logprobs(chat):
    teacher = FakeTeacher(prompt_logprobs=False, echo=False)
    refused(teacher, chat, "does not score given ids")


def test_the_cap_on_k_is_told(chat):
    refused(FakeTeacher(most_top_k=3), chat, "greater than max allowed")


class Fewer(FakeTeacher):
    def _best(self, ids, at, k):
        return super()._best(ids, at, min(k, 2))


def test_fewer_logprobs_than_asked_for(chat):
    refused(Fewer(by_text=True), chat, "top_k", backend="openai")


class Shifted(FakeTeacher):
    """Its own answers have the logprobs of another position."""

    def _row(self, ids, at):
        return self.logprob_table[ids[at - 2]]


def test_logprobs_of_another_position_in_what_it_writes(chat):
    refused(Shifted(by_text=True), chat, "another position", backend="openai")


class Cooler(FakeTeacher):
    """Scores at another temperature than it draws."""

    def _best(self, ids, at, k):
        lower = 0.05 * self.scoring
        return [(i, p - lower) for i, p in super()._best(ids, at, k)]

    def _choice(self, index, ids, body):
        self.scoring = "prompt_logprobs" in body or "echo" in body
        return super()._choice(index, ids, body)


def test_another_temperature(chat):
    refused(Cooler(), chat, "temperature 1")


class LowPrecision(FakeTeacher):
    """Text that it has written it sums up otherwise than text that it has read."""

    noise, warmer = 0.06, 0.0

    def _row(self, ids, at):
        row = self.logprob_table[ids[at - 1]]
        if at <= self.read:
            return row * (1.0 + self.warmer * self.scoring)
        row = row + np.random.default_rng(ids[:at]).normal(0.0, self.noise, len(row))
        return row - np.log(np.exp(row).sum())

    def _choice(self, index, ids, body):
        self.read = len(ids)
        self.scoring = "prompt_logprobs" in body or "echo" in body
        return super()._choice(index, ids, body)


class Warmer(LowPrecision):
    """And scores at another temperature, which moves a median by no more than that."""

    warmer = 0.06


class Coarse(LowPrecision):
    """So much noise that nothing else would be seen."""

    noise = 0.25


def test_a_low_precision_is_known_by_its_own_noise_and_nothing_hides_in_it(chat):
    server, requests = examined(LowPrecision(), chat)
    assert server.findings.scores and 0.01 < server.findings.difference < 0.1
    assert len(requests) == 36 and len(examined(FakeTeacher(), chat)[1]) == 30
    refused(Warmer(), chat, "does not compute at temperature 1")
    refused(Coarse(), chat, "its own noise of", "allows 0.100")


class Lower(LowPrecision):
    """An error of the same size, and no noise that explains it."""

    def _row(self, ids, at):
        return self.logprob_table[ids[at - 1]] - 0.03 * self.scoring


def test_what_noise_may_do_an_exact_server_may_not(chat):
    refused(Lower(), chat, "its own noise of 0.0000 allows 0.010")


class Drawing(FakeTeacher):
    """Draws otherwise than it says; a greedy answer is what it should be."""

    def changed(self, p, written):
        """What it draws from."""
        return np.eye(len(p))[p.argmax()]

    def _write(self, ids, body):
        if not body.get("temperature"):
            return super()._write(ids, body)
        draw, written = np.random.default_rng([body["seed"], len(ids)]), []
        while len(written) < body["max_tokens"] and END not in written:
            last = [*ids, *written][-1]
            p = self.changed(np.exp(self.logprob_table[last]), [*ids, *written])
            written.append(int(draw.choice(len(p), p=p / p.sum())))
        return written


class Cold(Drawing):
    def changed(self, p, written):
        return p**2


class Cool(Drawing):
    """No more than people set it."""

    def changed(self, p, written):
        return p ** (1 / 0.7)


class Nucleus(Drawing):
    def changed(self, p, written):
        above = np.asarray([p[p > one].sum() for one in p])
        return np.where(above < 0.6, p, 0.0)


class Hot(Drawing):
    def changed(self, p, written):
        return p**0.4


class Avoiding(Drawing):
    def changed(self, p, written):
        return p * np.where(np.isin(np.arange(len(p)), written), np.exp(-2.0), 1.0)


class Another(Drawing):
    def changed(self, p, written):
        return np.roll(p, 1)


@pytest.mark.parametrize("by_text", [False, True])
@pytest.mark.parametrize(
    "teacher, told",
    [
        (Drawing, "it draws greedily"),
        (Cold, "a lower temperature"),
        (Cool, "a lower temperature"),
        (Nucleus, "only from the best"),
        (Hot, "a higher temperature"),
        (Avoiding, "a repetition penalty"),
        (Another, "from something else"),
    ],
)
def test_draws_that_are_not_from_what_is_reported(chat, teacher, told, by_text):
    backend = "openai" if by_text else "vllm"
    words = "mean negative logprob", told
    refused(teacher(by_text=by_text), chat, *words, backend=backend, top_k=20)


def test_a_run_whose_text_is_greedy_takes_a_greedy_server(chat):
    server, _ = examined(Drawing(), chat, sampling=SamplingParams(20, temperature=0.0, top_p=1.0))
    assert server.findings.scores


class Processed(FakeTeacher):
    """Tells the logprobs that it draws with; greedy answers have raw ones."""

    def _choice(self, index, ids, body):
        raw, temperature = self.logprob_table, body.get("temperature") or 1.0
        if "prompt_logprobs" not in body:
            logits = raw / temperature
            norm = np.log(np.exp(logits).sum(axis=1, keepdims=True))
            self.logprob_table = logits - norm
        choice = super()._choice(index, ids, body)
        self.logprob_table = raw
        return choice


def test_logprobs_after_temperature_are_not_those_before(chat):
    refused(Processed(), chat, "rollout.temperature=0.8", "raw_logprobs")
    server, _ = examined(Processed(by_text=True), chat, "openai")
    assert server.findings.dialect == "chat_by_id"  # that route tells raw ones


def test_a_route_that_is_not_for_everybody_may_fail_as_it_likes(chat):
    teacher = FakeTeacher()
    for reply in (
        Reply(status=500),
        Reply(b"<html>"),
        Reply({"tokens": []}),  # llama-server's, where it does not find the text
        Reply(silent=True),
    ):

        def without(request, reply=reply):
            return reply if request.path == "/tokenize" else teacher(request)

        server, requests = examined(without, chat)
        assert "not compared" in server.findings.tokenizer
        assert sum(request.path == "/tokenize" for request in requests) == 2


def test_an_address_of_something_else(chat):
    refused(script(Reply(b"<html>welcome")), chat, "<html>welcome", "config.teacher.api_base")


def test_another_tokenizer(chat):
    class Other(FakeTeacher):
        def _tokenize(self, body):
            return Reply({"tokens": super()._tokenize(body).body["tokens"][::-1]})

    refused(Other(), chat, "the tokenizer of bigram", "config.teacher.tokenizer")


def test_the_model_by_its_name(chat):
    refused(FakeTeacher(), chat, "'bigam'", "did you mean 'bigram'", model="bigam")
    teacher = FakeTeacher()

    def two(request):
        if request.path == "/v1/models":
            return Reply({"data": [{"id": MODEL}, {"id": "other"}]})
        return teacher(request)

    refused(two, chat, "['bigram', 'other']", "config.teacher.api_model")
    server, _ = examined(two, chat, model=MODEL)
    assert server.findings.context_length is None


ADAPTER = {"id": MODEL, "max_model_len": None, "parent": "base"}


def _info(*lengths):
    return [{"model_name": MODEL, "model_info": {"max_input_tokens": n}} for n in lengths]


@pytest.mark.parametrize(
    "how, length, source",
    [
        ({}, 511, f"max_model_len=512 of {MODEL} in /v1/models"),
        # vLLM's entry of a LoRA leaves it to the model that it is for
        (
            {"entries": [{"id": "base", "max_model_len": 99}, ADAPTER]},
            98,
            "max_model_len=99 of base in /v1/models",
        ),
        ({"entries": [ADAPTER | {"parent": MODEL}], "tells": True}, 511, "in /tokenize"),
        ({"entries": [ADAPTER], "tells": True, "window": 300}, 299, "max_model_len=300 of"),
        ({"entries": [{"id": MODEL, "max_input_tokens": 80}]}, 80, f"=80 of {MODEL} in /v1/models"),
        ({"entries": [{"id": MODEL}], "proxied": _info(70, None, 60)}, 60, "max_input_tokens=60"),
        ({"entries": [{"id": MODEL}], "proxied": [{"model_name": "other"}, 3]}, None, ""),
        ({"entries": [{"id": MODEL}]}, None, ""),
    ],
)
def test_how_much_it_reads_and_who_says_so(chat, how, length, source):
    found = examined(FakeTeacher(**how), chat, model=MODEL)[0].findings
    assert found.context_length == length
    assert found.context_written == (
        length + 1 if "max_model_len" in found.context_source else None
    )
    assert source in found.context_source and bool(found.context_source) == bool(source)


def test_a_host_that_lists_no_models_is_told_which(chat):
    teacher = FakeTeacher()

    def unlisted(request):
        return Reply(status=404) if request.path == "/v1/models" else teacher(request)

    with pytest.raises(TeacherRefused):
        examined(unlisted, chat)
    server, _ = examined(unlisted, chat, model="mine")
    assert server.findings.model == "mine"


def test_the_key_is_wrong(chat):
    refused(script(Reply({"error": {"message": "no such key"}}, status=401)), chat, "no such key")


def test_no_padding_and_no_unknown_id_is_sent(chat):
    _, requests = examined(FakeTeacher(), chat)
    sent = [r.body["prompt"] for r in requests if r.path == "/v1/completions"]
    flat = [i for prompt in sent for i in (prompt[0] if isinstance(prompt[0], list) else prompt)]
    assert min(flat) >= 0 and max(flat) < VOCAB
    assert chat.pad_id not in flat
