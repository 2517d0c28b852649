"""What a real vLLM says, beside what our own forward pass says of the same weights."""

import json
import shutil

import numpy as np
import pytest
from small_runs import small
from vllm_server import connected

from gkdjax import config
from gkdjax.teachers.server import connect
from gkdjax.teachers.server.answers import ScoreRequest
from gkdjax.tools import check_teacher
from gkdjax.types import Prompt, SamplingParams
from gkdjax.utils.errors import UserError

pytestmark = pytest.mark.integration
NATS = 1e-4  # a logprob here and there
PREFIXES = ["be brief", "answer as if every word of yours had to be paid for", "no"]
ROWS = [
    {
        "prompt": f"what is {i}",
        "response": "it is a number" * (1 + i % 2),
        "prefix_messages": [{"role": "system", "content": prefix}],
    }
    for i, prefix in enumerate([*PREFIXES, PREFIXES[0]])
]


def asking(server, student=None, **changes):
    """A config whose teacher is the server's model."""
    c = small(student or server.model, teacher__backend="vllm", teacher__api_base=server.base)
    c.teacher.top_k, c.teacher.store = 20, None
    c.context.prefix_messages = []
    c.data.train, c.data.max_length, c.data.bucket_lengths = ROWS, 128, (128,)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return config.parse(c)


def of_targets(targets, mask_BN):
    """NumPy, of the places where there is a target: (ids, logprobs, tail, target's)."""
    topk = targets.topk
    arrays = (topk.ids, topk.logprobs, topk.tail_logprob, targets.target_logprob_BN)
    return [np.asarray(array)[mask_BN] for array in arrays]


@pytest.mark.parametrize("dialect", ["prompt_logprobs", "echo"])
def test_scores_are_those_of_our_own_forward_pass(server, dialect, tmp_path, monkeypatch):
    monkeypatch.setitem(connect.DIALECTS, "vllm", {dialect: connect.DIALECTS["vllm"][dialect]})
    with connected(asking(server), tmp_path) as (rows, local):
        batch, _ = rows.dataset.with_rollouts({}).batch(0)
        wanted = local.targets(batch)
        got = rows.teacher.targets(batch)
    lengths = batch.teacher_mask_BT.sum(axis=1)
    assert len({*lengths.tolist()}) > 2 and lengths.max() < batch.teacher_mask_BT.shape[1]
    mask_BN = batch.target_mask_BN
    ids, logprobs, tail, target = of_targets(got, mask_BN)
    own_ids, own_logprobs, own_tail, own_target = of_targets(wanted, mask_BN)
    np.testing.assert_allclose(logprobs, own_logprobs, atol=NATS)
    np.testing.assert_allclose(tail, own_tail, atol=NATS)
    np.testing.assert_allclose(target, own_target, atol=NATS)
    gaps = -np.diff(own_logprobs, axis=-1)
    # Of the last one nobody knows how near the next is.
    clear = np.minimum(gaps, np.pad(gaps, ((0, 0), (1, 0)), constant_values=1.0)[:, :-1]) > 2 * NATS
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ids[:, :-1][clear], own_ids[:, :-1][clear])


def test_the_table_of_check_teacher(server, tmp_path):
    found = dict(check_teacher.rows(asking(server), server.model))
    assert found["model"] == server.name and found["dialect"] == "vllm, prompt_logprobs"
    assert found["tokenizer"].startswith("the same ")
    assert found["longest view"].startswith("511 tokens (max_model_len=512 of ")
    assert found["logprobs of a token"] == "20"
    assert found["scores given ids"].startswith("yes")
    assert found["on-policy, rows with a response"] == "yes"
    assert "tokens/s" in found["scoring, 16 at a time"]
    apart = found[f"logprobs beside those of {server.model}"]
    assert float(apart.split()[2]) < NATS, apart
    assert float(found["forward KL, server to local"].split()[0]) < NATS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher__api_model": "gema"}, r"'gema'.* did you mean 'gemma3'"),
        ({"teacher__top_k": 65}, r"cannot be used.*65.*64"),
    ],
)
def test_what_the_server_does_not_have(gemma, change, message):
    with pytest.raises(UserError, match=message):
        list(check_teacher.rows(asking(gemma, **change), None))


def test_another_tokenizer(gemma, tmp_path):
    student = shutil.copytree(gemma.model, tmp_path / "student")
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["e"], ids["o"] = ids["o"], ids["e"]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the tokenizer of gemma3 is not that of"):
        list(check_teacher.rows(asking(gemma, str(student)), None))


def scored_again(teacher, prompts, written) -> list:
    """What the server says of its own text when it is sent."""
    requests = []
    for prompt, completion in zip(prompts, written, strict=True):
        ids, n = np.concatenate([prompt.ids, completion.ids]), len(completion.ids)
        at = np.arange(n, dtype=np.int32) + len(prompt.ids) - 1
        requests.append(ScoreRequest(prompt.name, ids, at, 20))
    return teacher.pool.scores(requests)()


DRAWN = {
    "at 1": SamplingParams(48, temperature=1.0, top_p=1.0),
    "cut": SamplingParams(48, temperature=1.5, top_p=0.9, top_k=30),
}
GREEDY = {
    "at 0": SamplingParams(16, temperature=0.0, top_p=1.0),
    "the best": SamplingParams(16, temperature=1.5, top_p=1.0, top_k=1),
    "the nucleus": SamplingParams(16, temperature=1.5, top_p=1e-3),
}


@pytest.mark.parametrize("how", [*DRAWN, *GREEDY])
def test_what_comes_with_its_text_is_what_it_says_of_the_text(server, how, tmp_path):
    sampling = (DRAWN | GREEDY)[how]
    with connected(asking(server), tmp_path) as (rows, local):
        chat = rows.sources.teacher_chat
        examples = rows.examples.train
        ids = [rows.rules.prompts(example)[1] for example in examples] * 4
        prompts = [Prompt(f"prompt {i}", ids[i], ()) for i in range(len(ids))]
        seeds = list(range(len(prompts)))
        written = rows.teacher.sample(prompts, seeds, sampling)
        again = rows.teacher.sample(prompts, seeds, sampling)
        others = rows.teacher.sample(prompts, [seed + 100 for seed in seeds], sampling)
        scored = scored_again(rows.teacher, prompts, written)
        greedy = local.sample(prompts, seeds, GREEDY["at 0"]) if how in GREEDY else None
    texts = [[t.ids.tolist() for t in drawn] for drawn in (written, again, others)]
    assert texts[0] == texts[1]
    if greedy is not None:
        assert texts[0] == texts[2] == [t.ids.tolist() for t in greedy]
    else:
        assert texts[0] != texts[2]
        assert any(t.finished for t in written)
    for completion, answer in zip(written, scored, strict=True):
        assert completion.finished == (int(completion.ids[-1]) in chat.stop_ids)
        assert completion.finished or len(completion.ids) == sampling.max_new_tokens
        cached, other = completion.cached, answer
        np.testing.assert_allclose(cached.target_logprob, other.target_logprob, atol=NATS)
        np.testing.assert_allclose(cached.topk.logprobs, other.topk.logprobs, atol=NATS)
        np.testing.assert_allclose(cached.topk.tail_logprob, other.topk.tail_logprob, atol=NATS)
