"""The sampler against argmax by hand, torch's generate, and the distribution it has to follow."""

import functools
import types

import builders
import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gkdjax import hf, lora, sampler
from gkdjax.sampler import Sampling, sample

N, P = 14, 9  # past the window of 5 with prompts of all lengths
GREEDY = Sampling(N, temperature=0.0, top_p=1.0)
WARM = Sampling(N, temperature=1.0, top_p=0.9)
NEVER = (-1, -2)
PROMPTS = [
    np.random.default_rng(i).integers(3, 120, n).astype(np.int32) for i, n in enumerate((9, 4, 1))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(decoder, params, torch's model) with the same weights."""
    untied = {"tie_word_embeddings": False}  # tied random models say one thing over and over
    directory = factories.model_dir(tmp_path_factory.mktemp("sampler"), **untied)
    return *hf.load_pretrained(directory), factories.torch_model(**untied)


@pytest.fixture(scope="module")
def run(model):
    """run(prompts, seeds, sampling, stops) in batches of three, all in one shape."""

    def run(prompts=PROMPTS, seeds=(1, 2, 3), sampling=GREEDY, stops=NEVER, params=model[1]):
        return sample(
            *(model[0], params, prompts, seeds, sampling),
            **{"stop_ids": stops, "batch_size": 3, "lengths": (P,)},
        )

    return run


@functools.partial(jax.jit, static_argnums=0)
def _all_logits(decoder, params, tokens_BT, mask_BT):
    hidden = decoder.apply({"params": params}, tokens_BT, mask_BT)
    return decoder.apply({"params": params}, hidden, method="unembed")


def argmax_by_hand(decoder, params, prompts, steps: int) -> np.ndarray:
    """Reads all of it anew for each token, right-padded to one shape: no cache, no left padding."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(steps):
        tokens_BT = np.zeros((len(rows), P + N), np.int32)
        for row, ids in enumerate(rows):
            tokens_BT[row, : len(ids)] = ids
        mask_BT = np.arange(P + N)[None, :] < np.array([len(ids) for ids in rows])[:, None]
        logits = np.asarray(_all_logits(decoder, params, tokens_BT, mask_BT))
        for row, ids in enumerate(rows):
            ids.append(int(logits[row, len(ids) - 1].argmax()))
    return np.array([ids[-steps:] for ids in rows])


def ids(trajectories) -> list[list[int]]:
    return [trajectory.ids.tolist() for trajectory in trajectories]


@pytest.fixture(scope="module")
def greedy(run):
    return ids(run())


def test_greedy_is_the_argmax_of_the_uncached_forward(model, greedy):
    assert greedy == argmax_by_hand(*model[:2], PROMPTS, N).tolist()
    assert len({token for row in greedy for token in row}) > 8  # a text, not one token forever


def stops_in(greedy) -> tuple[int, int]:
    """One id that row 0 meets early and one that row 1 meets later; the last row may meet none."""
    return greedy[0][4], greedy[1][6]


def until(row, stops):
    at = next((i for i, token in enumerate(row) if token in stops), None)
    return (row, False) if at is None else (row[: at + 1], True)


def test_stop_ids_end_rows_and_belong_to_them(run, greedy):
    stops = stops_in(greedy)
    got = run(stops=stops)
    assert [(t.ids.tolist(), t.finished) for t in got] == [until(row, stops) for row in greedy]
    assert {t.finished for t in run(stops=stops)} >= {True}
    assert all(not t.finished and len(t.ids) == N for t in run())  # cut off
    # A stop id as the last token that fits is a finished row, not one cut off.
    last = run(prompts=PROMPTS[:1], stops=(-1, greedy[0][-1]))[0]
    assert last.finished


def test_greedy_equals_torchs_generate(model, greedy):
    stops = stops_in(greedy)
    tokens_BP, mask_BP = sampler._left_pad(PROMPTS, (P,))
    out = model[2].generate(
        input_ids=torch.tensor(tokens_BP).long(),
        attention_mask=torch.tensor(mask_BP).long(),
        do_sample=False,
        max_new_tokens=N,
        eos_token_id=list(stops),
        pad_token_id=0,
    )
    for got, row in zip(greedy, out[:, P:].tolist(), strict=True):
        assert until(row, stops) == until(got, stops)


def test_the_loop_ends_with_the_last_row(model, monkeypatch):
    drawn = []

    def counted(logits_BV, keys_B, temperature, top_p):
        jax.debug.callback(lambda: drawn.append(1))
        return jnp.where(jnp.arange(2) == 0, 5, 6) + 0 * logits_BV[:, 0].astype(jnp.int32)

    monkeypatch.setattr(sampler, "_draw", counted)
    decoder, params = builders.small_model()
    generate = jax.jit(sampler._generate.__wrapped__, static_argnums=(0, 8))
    tokens_BP = np.full((2, 3), 7, np.int32)
    args = (decoder, params, tokens_BP, tokens_BP > 0, np.arange(2, dtype=np.uint32))
    for stops, steps in (((5, 6), 1), ((5, 9), 40)):
        drawn.clear()
        _, length_B, done_B = generate(*args, np.asarray(stops), 1.0, 1.0, 40)
        jax.effects_barrier()
        assert len(drawn) == steps
        assert (length_B.tolist(), done_B.tolist()) == ([1, steps], [True, steps == 1])


def test_a_row_depends_on_its_seed_and_prompt_alone(run):
    together = ids(run(seeds=(7, 8, 9), sampling=WARM))
    assert ids(run(seeds=(7, 8, 9), sampling=WARM)) == together
    turned = run(prompts=PROMPTS[::-1], seeds=(9, 8, 7), sampling=WARM)
    assert ids(turned)[::-1] == together
    # Alone in a batch, and in a run of two batches of which the second one is filled up.
    assert ids(run(prompts=PROMPTS[1:2], seeds=(8,), sampling=WARM)) == together[1:2]
    many = run(prompts=[*PROMPTS, *PROMPTS[1:]], seeds=(1, 2, 3, 8, 9), sampling=WARM)
    assert ids(many)[3:] == together[1:]
    other = ids(run(seeds=(17, 18, 19), sampling=WARM))
    assert all(a != b for a, b in zip(other, together, strict=True))
    twins = ids(run(prompts=[PROMPTS[0]] * 3, seeds=(7, 7, 2**32 - 1), sampling=WARM))
    assert twins[0] == twins[1] == together[0] != twins[2]


def test_attached_adapters_are_sampled_from(model, run, greedy):
    decoder, params, _ = model
    adapters = builders.adapters(decoder)
    got = ids(run(params=lora.attach(params, adapters)))
    assert got == ids(run(params=lora.merge(params, adapters))) != greedy


@pytest.mark.parametrize("lengths, wanted", [((0,), "no tokens"), ((3, 10), "10 tokens")])
def test_prompts_that_cannot_be_read_are_refused(run, lengths, wanted):
    with pytest.raises(ValueError, match=wanted):
        run(prompts=[np.ones(n, np.int32) for n in lengths])


def test_the_shortest_length_that_fits_is_taken():
    tokens_BP, mask_BP = sampler._left_pad([np.array([5, 6, 7]), np.array([8])], (16, 4, 3, 2))
    assert tokens_BP.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask_BP.tolist() == [[1, 1, 1], [0, 0, 1]]


DRAWS, VOCAB = 8192, 12


@pytest.fixture(scope="module")
def small():
    """.frequencies(temperature, top_p) of the first tokens of 8,192 seeds, and their .logits."""
    decoder, params = builders.small_model(seed=3, vocab_size=VOCAB)
    prompt = np.array([4, 7, 9], np.int32)
    logits = _all_logits(decoder, params, prompt[None], np.ones((1, 3), bool))

    def frequencies(temperature, top_p):
        drawn = sample(
            *(decoder, params, [prompt] * DRAWS, range(DRAWS), Sampling(1, temperature, top_p)),
            **{"stop_ids": (0,), "batch_size": 2048, "lengths": (3,)},
        )
        return np.bincount([int(t.ids[0]) for t in drawn], minlength=VOCAB) / DRAWS

    return types.SimpleNamespace(
        frequencies=frequencies, logits=np.asarray(logits[0, -1], np.float64)
    )


def probabilities(logits, temperature, top_p):
    p = np.exp(logits / temperature - np.max(logits / temperature))
    p /= p.sum()
    order = np.argsort(-p)
    size = np.searchsorted(np.cumsum(p[order]), top_p) + 1  # the first sum that reaches top_p
    kept = np.zeros_like(p)
    kept[order[:size]] = p[order[:size]]
    return kept / kept.sum()


def test_draws_follow_temperature_and_nucleus_without_compiling_again(small):
    seen, compiled = [], None
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.6), (2.0, 0.8)):
        got = small.frequencies(temperature, top_p)
        wanted = probabilities(small.logits, temperature, top_p)
        possible = wanted > 0
        assert possible.sum() == VOCAB if top_p == 1 else 2 <= possible.sum() < VOCAB
        assert not got[~possible].any()
        chi = DRAWS * ((got - wanted)[possible] ** 2 / wanted[possible]).sum()
        assert chi < 33, (temperature, top_p)  # 11 degrees of freedom: p < 0.001 at 31.3
        assert all(np.abs(got - other).sum() > 0.15 for other in seen)
        seen.append(got)
        compiled = compiled or sampler._generate._cache_size()
    for temperature, top_p in ((0.0, 1.0), (1e-3, 0.5), (1.0, 1e-9)):  # all of them greedy
        assert small.frequencies(temperature, top_p)[small.logits.argmax()] == 1.0
    assert sampler._generate._cache_size() == compiled


def test_inversion_never_gives_a_token_of_probability_zero():
    probs_BV = jnp.asarray([[0.0, 0.3, 0.0, 0.7, 0.0]] * 4, jnp.float32)
    ends_B = jnp.asarray([0.0, 0.299, 0.301, np.nextafter(np.float32(1), np.float32(0))])
    assert sampler._invert(probs_BV, ends_B).tolist() == [1, 1, 3, 3]
