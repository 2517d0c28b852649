"""An honest server is refused once in a million times: a mean that is 1 by construction."""

import dataclasses

import numpy as np
import pytest

from gkdjax.teachers.server import draws
from gkdjax.teachers.server.answers import SampleRequest
from gkdjax.teachers.server.dialects.logprobs import TokenLogprobs
from gkdjax.teachers.server.dialects.vllm import PromptLogprobs
from gkdjax.types import SamplingParams

V, STOP = 40, 3
REQUEST = SampleRequest(
    "a row", np.asarray([5, 6], np.int32), (), SamplingParams(9, 1.0, 1.0), 0, (STOP,), 8
)


def reported(p_V, targets, top_k=8):
    """What a server says that draws these from `p_V`; some list the token in any case."""
    best = np.argsort(-p_V)[:top_k]
    tokens = []
    for target in targets:
        shown = best if target in best else [target, *best[:-1]]
        top = [(int(i), float(np.log(p_V[i]))) for i in shown]
        tokens.append(TokenLogprobs("here", int(target), float(np.log(p_V[target])), top))
    request = dataclasses.replace(REQUEST, top_k=top_k)
    return PromptLogprobs("m", V).collect(tokens, targets, request)


@pytest.fixture
def p_V():
    logits = 2.5 * np.random.default_rng(0).standard_normal(V)
    logits[STOP] = logits.max()
    return np.exp(logits) / np.exp(logits).sum()


def test_the_ratios_have_the_mean_one_whatever_can_be_drawn(p_V):
    """Over all tokens, a stop id among them, whose ratio is 1."""
    ratios = np.zeros(len(draws._KINDS))
    for target in range(V):
        drawn = draws.tokens_of(REQUEST, reported(p_V, [target]))
        logs = draws._log_ratios(drawn[0])[:, drawn[0].own] if drawn else 0.0
        ratios += p_V[target] * np.exp(logs)
    np.testing.assert_allclose(ratios, 1.0, atol=1e-9)


def test_what_was_read_or_written_before_counts_as_seen(p_V):
    best = int(np.argsort(-p_V)[1])
    first, second = draws.tokens_of(REQUEST, reported(p_V, [best, best]))
    assert not first.seen_C[first.own] and second.seen_C[second.own]


def test_the_mean_negative_logprob_and_the_entropy(p_V):
    targets = np.random.default_rng(1).choice(V, 1500, p=p_V).tolist()
    honest = draws.judge(draws.tokens_of(REQUEST, reported(p_V, targets)))
    assert honest.enough and not honest.caught
    assert honest.surprise == pytest.approx(honest.entropy, abs=0.2)
    few = draws.judge(draws.tokens_of(REQUEST, reported(p_V, targets[:30])))
    assert few.fine and not few.enough  # a greedy server is caught sooner than a warm one
    certain = draws.judge(draws.tokens_of(REQUEST, reported(p_V**9 / (p_V**9).sum(), targets[:1])))
    assert not certain.enough and not certain.caught


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_as_many_tokens_as_are_enough_show_a_temperature(p_V, temperature):
    """On the average, so of some servers more are needed, and no server passes by a few tokens."""
    warm_V = p_V ** (1 / temperature)
    caught = 0
    for seed in range(10):
        rng, targets = np.random.default_rng(seed), []
        while True:
            targets += rng.choice(V, 50, p=warm_V / warm_V.sum()).tolist()
            verdict = draws.judge(draws.tokens_of(REQUEST, reported(p_V, targets)))
            if verdict.caught or verdict.enough:
                break
        caught += verdict.caught
    assert caught >= 9
