"""The preflight meets what real servers answered."""

import dataclasses

import numpy as np
import pytest
from recorded_answers import VOCAB_SIZE, byte_level, load, texts

from gkdjax.teachers.server import preflight
from gkdjax.teachers.server.answers import SampleRequest, TeacherAnswer
from gkdjax.teachers.server.dialects import openai, vllm
from gkdjax.types import SamplingParams
from gkdjax.utils.errors import WrongAnswer


@dataclasses.dataclass
class Replay:
    """A transport whose server gives one answer to `echo` and another to all else."""

    echoed: dict
    written: dict
    root = "http://127.0.0.1:1"

    def get(self, path, once=False):
        return {"data": [{"id": "qwen3-tiny"}]}

    def post(self, path, body, *, max_bytes, once=False, most_same=0):
        if path == "/tokenize":
            return {"tokens": []}  # as llama-server answers to a text in another field
        return self.echoed if "echo" in body else self.written


@dataclasses.dataclass
class RecordedChat:
    """Whose tokenizer knows the recorded prompt."""

    ids: list[int]
    directory: str = "qwen3-tiny"
    stop_ids: tuple[int, ...] = (1,)

    def tokenizer(self, text, add_special_tokens=True):
        return {"input_ids": self.ids}


def text(ids, drawn: TeacherAnswer) -> preflight.Text:
    """What was drawn after `ids`."""
    top_k = drawn.top_ids.shape[1]
    request = SampleRequest("m", ids, (), SamplingParams(8, 0.0, 1.0), 0, (1,), top_k)
    return preflight.Text(request, drawn)


def test_llama_server_ignores_echo_and_may_only_write(monkeypatch):
    monkeypatch.setattr(preflight, "_TEXTS", 1)  # one prompt was recorded
    written = load("llama-server-v1")["response"]
    written["choices"][0]["finish_reason"] = "stop"  # it was asked for one token, and here for more
    echoed = load("llama-server-echo")["response"]
    echoed["usage"]["prompt_tokens"] += 1  # the token that was drawn is scored as well
    replay = Replay(echoed, written)
    ids = load("vllm-qwen3-tiny-plp")["request"]["prompt"]  # it was asked the same

    def completions(model, vocab_size, _):
        return openai.Completions(model, vocab_size, byte_level(texts("vllm-qwen3-tiny-plp")))

    top_k = len(written["choices"][0]["logprobs"]["content"][0]["top_logprobs"])
    examined = {"chat": RecordedChat(ids), "vocab_size": VOCAB_SIZE, "top_k": top_k}
    examined["sampling"] = SamplingParams(8, temperature=0.8, top_p=0.9)
    dialects = {"completions": completions}
    server = preflight.examine(replay, "", dialects, **examined, must_score=False)
    assert not server.findings.scores
    assert "ignores 'echo'" in server.findings.limits
    assert server.probe.target_ids.tolist() == [2969]
    with pytest.raises(ValueError, match="ignores 'echo'"):
        preflight.examine(replay, "", dialects, **examined, must_score=True)


def test_llama_cpp_pythons_scores_are_off_by_one():
    answer = load("llama-cpp-python-echo")["response"]
    logprobs = answer["choices"][0]["logprobs"]
    answer["usage"]["prompt_tokens"] = len(logprobs["tokens"])  # as many as were kept
    strings = [*logprobs["tokens"], *(key for row in logprobs["top_logprobs"][1:] for key in row)]
    for row in logprobs["top_logprobs"][1:]:  # two parts of characters are one "", and one is gone
        row |= {} if len(row) >= 20 else {"\ufffd": -9.0}
    names = {200 + i: string for i, string in enumerate(dict.fromkeys(strings))}
    by_name = {string: i for i, string in names.items()}
    ids = np.asarray([by_name[token] for token in logprobs["tokens"]], np.int32)
    dialect = openai.Completions("m", VOCAB_SIZE, byte_level(names))
    # A greedy answer has likely tokens, whatever these were.
    rows = np.full((4, 20), -8.0, np.float32)
    rows[:, 0] = -1.0
    tops = np.zeros((4, 20), np.int32)
    drawn = TeacherAnswer(ids[-4:], rows[:, 0], tops, rows, np.full(4, -0.5, np.float32))
    trial = preflight.Trial(Replay(answer, {}), dialect, RecordedChat(ids.tolist()), 20)
    with pytest.raises(WrongAnswer, match=r"and then -1[01]\.\d+: .*: it shifts positions"):
        trial.score([text(ids[:-4], drawn)])


def test_the_same_scores_pass_if_they_are_those_it_drew_with():
    """So it is the numbers that the one above is refused for."""
    recorded = load("vllm-qwen3-tiny-plp")
    ids = np.asarray(recorded["request"]["prompt"], np.int32)
    dialect = vllm.PromptLogprobs("m", VOCAB_SIZE)
    said = recorded["response"]["choices"][0]["prompt_logprobs"]
    own = [said[t][str(ids[t])]["logprob"] for t in range(len(ids) - 4, len(ids))]
    rows = np.asarray([[p, -9.0, -9.0] for p in own], np.float32)
    drawn = TeacherAnswer(
        ids[-4:], rows[:, 0], np.zeros((4, 3), np.int32), rows, np.zeros(4, np.float32)
    )
    replay = Replay({}, recorded["response"])
    trial = preflight.Trial(replay, dialect, RecordedChat(ids.tolist()), 3)
    scored, apart = trial.score([text(ids[:-4], drawn)])
    assert apart < 1e-6
    assert len(scored.target_ids) == len(ids) - 1
    shifted = dataclasses.replace(drawn, target_logprob=np.roll(drawn.target_logprob, 1))
    with pytest.raises(WrongAnswer, match="shifts positions"):
        trial.score([text(ids[:-4], shifted)])
