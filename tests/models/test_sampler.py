"""The sampler against argmax by hand, torch's generate, and the distribution it has to follow.

What it keeps is tested against an uncached forward over what it wrote.
"""

import functools

import builders
import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gkdjax.losses import top_k_logprobs
from gkdjax.losses.topk import TokenHidden
from gkdjax.models import lora, sampler
from gkdjax.models import sampling as models_sampling
from gkdjax.models.decoder import Decoder
from gkdjax.models.hf import load
from gkdjax.models.sampler import Keep, sample
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.types import SamplingParams

N, P = 14, 9  # past the window of 5 with prompts of all lengths
GREEDY = SamplingParams(N, temperature=0.0, top_p=1.0)
WARM = SamplingParams(N, temperature=1.0, top_p=0.9)
NEVER = (-1, -2)
PROMPTS = [
    np.random.default_rng(i).integers(3, 120, n).astype(np.int32) for i, n in enumerate((9, 4, 1))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(decoder, params, torch's model) with the same weights."""
    untied = {"tie_word_embeddings": False}  # tied random models say one thing over and over
    directory = factories.model_dir(tmp_path_factory.mktemp("sampler"), **untied)
    return *load.load_pretrained(directory), factories.torch_model(**untied)


@pytest.fixture(scope="module")
def run(model):
    """run(prompts, seeds, sampling, stops, **how) in batches of three, all in one shape."""

    def run(prompts=PROMPTS, seeds=(1, 2, 3), sampling=GREEDY, stops=NEVER, params=model[1], **how):
        return sample(
            *(model[0], params, prompts, seeds, sampling),
            **{"stop_ids": stops, "batch_size": 3, "lengths": (P,)} | how,
        )

    return run


@functools.partial(jax.jit, static_argnums=0)
def _forward(decoder, params, tokens_BT, mask_BT):
    hidden = decoder.apply({"params": params}, tokens_BT, mask_BT)
    return hidden, decoder.apply({"params": params}, hidden, method="unembed")


def uncached(decoder, params, rows) -> tuple[np.ndarray, np.ndarray]:
    """(hidden, logits) of whole rows, right-padded to one shape: no cache, no left padding."""
    tokens_BT = np.zeros((len(rows), P + N), np.int32)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = ids
    mask_BT = np.arange(P + N)[None, :] < np.array([len(ids) for ids in rows])[:, None]
    return jax.device_get(_forward(decoder, params, tokens_BT, mask_BT))


def argmax_by_hand(decoder, params, prompts, steps: int) -> np.ndarray:
    """Reads all of it anew for each token."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(steps):
        _, logits = uncached(decoder, params, rows)
        for row, ids in enumerate(rows):
            ids.append(int(logits[row, len(ids) - 1].argmax()))
    return np.array([ids[-steps:] for ids in rows])


def ids(completions) -> list[list[int]]:
    return [completion.ids.tolist() for completion in completions]


@pytest.fixture(scope="module")
def greedy(run):
    return ids(run())


def test_greedy_is_the_argmax_of_the_uncached_forward(model, greedy):
    assert greedy == argmax_by_hand(*model[:2], PROMPTS, N).tolist()
    assert len({token for row in greedy for token in row}) > 8  # a text, not one token forever


def test_ids_that_another_model_lacks_are_not_drawn(run):
    free, limited = run(), run(vocab_size=60)
    assert max(max(row) for row in ids(free)) >= 60 > max(max(row) for row in ids(limited))
    assert max(max(row) for row in ids(run(sampling=WARM, vocab_size=60))) < 60


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


def test_the_loop_ends_with_the_last_row_and_reads_no_last_token(monkeypatch):
    drawn, read = [], []

    class Counted(Decoder):
        def extend(self, *args):
            jax.debug.callback(lambda: read.append(1))
            return super().extend(*args)

    def counted(logits_BV, keys_B, temperature, top_k, top_p):
        jax.debug.callback(lambda: drawn.append(1))
        return jnp.where(jnp.arange(2) == 0, 5, 6) + 0 * logits_BV[:, 0].astype(jnp.int32)

    monkeypatch.setattr(models_sampling, "sample_token", counted)
    decoder, params = builders.small_model()
    generate = jax.jit(sampler._generate.__wrapped__, static_argnums=(0, 6, 7))
    tokens_BP = np.full((2, 3), 7, np.int32)
    rows = (tokens_BP, tokens_BP > 0, np.arange(2, dtype=np.uint32))
    for stops, steps in (((5, 6), 1), ((5, 9), 40)):
        drawn.clear(), read.clear()
        _, length_B, done_B, _ = generate(
            *(Counted(decoder.spec), params, rows, np.asarray(stops)),
            *(1.0, 1.0, None, 40, None, None, None, None),
        )
        jax.effects_barrier()
        assert len(drawn) == len(read) + 1 == steps  # the prompt is prefilled
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


TOP, TOP_SHARED, HIDDEN = KEEPS = (Keep(5, 2.0), Keep(7, 0.5, vocab_size=100), Keep(None, 1.0))


@pytest.fixture(scope="module")
def written(run):
    """(stop ids, what is drawn with them): rows of 5 tokens, of more, and one that is cut off."""
    free = ids(run(sampling=WARM))
    stops = (free[0][4], next(i for i in free[1][8:] if i not in free[2]))
    drawn = run(sampling=WARM, stops=stops)
    assert len({len(t.ids) for t in drawn}) == 3
    assert {t.finished for t in drawn} == {True, False}
    return stops, drawn


def leaves(drawn) -> list[np.ndarray]:
    """All arrays that were kept."""
    return jax.tree.leaves([vars(t.kept) for t in drawn])


def assert_same(drawn, others, atol=1e-5):
    assert ids(drawn) == ids(others)
    for a, b in zip(leaves(drawn), leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def predictions(model, drawn):
    """(hidden [B,T,E], logits [B,T,V], each row's positions that predict its tokens)."""
    rows = [[*prompt, *t.ids] for prompt, t in zip(PROMPTS, drawn, strict=True)]
    at = [
        slice(len(row) - len(t.ids) - 1, len(row) - 1) for row, t in zip(rows, drawn, strict=True)
    ]
    return *uncached(*model[:2], rows), at


def test_kept_hidden_states_are_those_of_an_uncached_forward(model, run, written):
    stops, drawn = written
    got = run(sampling=WARM, stops=stops, keep=HIDDEN)
    assert ids(got) == ids(drawn)
    hidden_BTE, _, at = predictions(model, drawn)
    for row, t in enumerate(got):
        assert isinstance(t.kept, TokenHidden)
        assert t.kept.hidden.flags.owndata  # it holds on to no more than its own row
        np.testing.assert_allclose(t.kept.hidden, hidden_BTE[row, at[row]], atol=1e-5)


@pytest.mark.parametrize("keep", (TOP, TOP_SHARED))
def test_kept_top_k_is_that_of_an_uncached_forward(model, run, written, keep):
    stops, drawn = written
    got = run(sampling=WARM, stops=stops, keep=keep)
    assert ids(got) == ids(drawn)
    _, logits_BTV, at = predictions(model, drawn)
    vocab_size = keep.vocab_size or 128
    logits_BTV = np.where(np.arange(128) < vocab_size, logits_BTV, -np.inf)
    wanted = top_k_logprobs(jnp.asarray(logits_BTV), keep.top_k, keep.temperature)
    logprobs_BTV = np.asarray(jax.nn.log_softmax(logits_BTV / keep.temperature))
    for row, t in enumerate(got):
        topk, logprobs_NV = t.kept.topk, logprobs_BTV[row, at[row]]
        assert (topk.temperature, topk.ids.dtype) == (keep.temperature, np.int32)
        assert all(array.flags.owndata for array in leaves([t]))
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
        close(topk.logprobs, wanted.logprobs[row, at[row]])
        close(topk.tail_logprob, wanted.tail_logprob[row, at[row]])
        # The ids by their worth: two that are equal up to rounding may change places.
        close(topk.logprobs, np.take_along_axis(logprobs_NV, topk.ids, axis=-1))
        close(t.kept.target_logprob, logprobs_NV[np.arange(len(t.ids)), t.ids])
    beyond = [t.ids[t.kept.target_logprob == -np.inf].tolist() for t in got]
    assert beyond == [[i for i in t.ids if i >= vocab_size] for t in drawn]
    assert any(beyond) == (keep is TOP_SHARED)


def test_how_tokens_are_drawn_does_not_change_what_is_kept(run):
    greedy = run(keep=TOP)
    for sampling in (SamplingParams(N, 1e-4, 1.0), SamplingParams(N, 1.0, 1e-9)):  # the same tokens
        assert_same(run(sampling=sampling, keep=TOP), greedy, atol=0)


def test_neighbours_batch_size_and_mesh_do_not_change_what_is_kept(model, run, written):
    warm = {"sampling": WARM, "stops": written[0], "keep": TOP_SHARED}
    wanted = run(**warm)
    assert_same(run(PROMPTS[1:2], (2,), **warm), wanted[1:2])
    assert_same(run(PROMPTS[::-1], (3, 2, 1), **warm, batch_size=2)[::-1], wanted)
    mesh = parallel_mesh.make_mesh()
    on_all = {"params": parallel_mesh.replicate(mesh, model[1]), "mesh": mesh, "batch_size": 4}
    assert_same(run(PROMPTS * 2, (1, 2, 3) * 2, **warm, **on_all), wanted * 2)


def program(keep, mesh=None, dtype=jnp.float32):
    """`_generate` as traced for four rows."""
    decoder, params = builders.small_model()
    tokens_BP = np.full((4, 3), 7, np.int32)
    rows = (tokens_BP, tokens_BP > 0, np.arange(4, dtype=np.uint32))
    if mesh is not None:
        params, rows = parallel_mesh.replicate(mesh, params), parallel_mesh.shard_rows(mesh, rows)
    how = (np.array([1]), np.float32(1), np.float32(1), None, 6, keep, mesh, None, None)
    return sampler._generate.trace(decoder.clone(compute_dtype=dtype), params, rows, *how)


def test_what_is_not_asked_for_is_neither_computed_nor_stored(written):
    assert all(t.kept is None for t in written[1])
    assert ["top_k" in str(program(keep).jaxpr) for keep in (None, *KEEPS)] == [0, 1, 1, 0]
    stored = [jax.tree.leaves(program(keep).out_info)[3:] for keep in (None, *KEEPS)]
    assert [len(leaves) for leaves in stored] == [0, 4, 4, 1]
    hidden = program(HIDDEN, dtype=jnp.bfloat16).out_info[3]
    assert (hidden.shape, hidden.dtype) == ((4, 6, 16), jnp.bfloat16)


def test_devices_do_not_talk_while_they_write():
    text = program(TOP, parallel_mesh.make_mesh()).lower().compile().as_text()
    assert 'custom_call_target="TopK"' in text
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all") if word in text]


@pytest.mark.parametrize("keep, wanted", [(Keep(101, 1.0, 100), "k must"), (Keep(4, 0), "temper")])
def test_what_cannot_be_kept_is_refused(keep, wanted):
    with pytest.raises(ValueError, match=wanted):
        program(keep)
