"""The sampler against torch's generate, and what it keeps against an uncached forward."""

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
from gkdjax.models import sampler
from gkdjax.models.decoder import Decoder
from gkdjax.models.sampler import Keep, Program, sample
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.types import SamplingParams
from tests.models.model_cases import pair

N, P = 14, 9  # past the window of 5 with prompts of all lengths
GREEDY = SamplingParams(N, temperature=0.0, top_p=1.0)
WARM = SamplingParams(N, temperature=1.0, top_p=0.9)
NEVER = (-1, -2)
PROMPTS = [
    np.random.default_rng(i).integers(3, 120, n).astype(np.int32) for i, n in enumerate((9, 4, 1))
]
UNTIED = {"tie_word_embeddings": False}  # tied random models write one token over and over
FAMILIES = {
    "gemma3": {"rope_parameters": factories.rope_parameters(8.0)},
    "qwen3": {},
    "qwen2": {},
    "llama": {"rope_parameters": factories.LLAMA3_ROPE},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(decoder, params) of a tiny Gemma 3."""
    return pair(tmp_path_factory.mktemp("sampler"), **UNTIED)[1:]


@pytest.fixture(scope="module")
def run(model):
    """run(prompts, seeds, sampling, stops, **how) in batches of three, all in one shape."""

    def run(prompts=PROMPTS, seeds=(1, 2, 3), sampling=GREEDY, stops=NEVER, params=model[1], **how):
        return sample(
            *(model[0], params, prompts, seeds, sampling),
            **{"stop_ids": stops, "batch_size": 3, "lengths": (P,)} | how,
        )

    return run


def ids(completions) -> list[list[int]]:
    return [completion.ids.tolist() for completion in completions]


@pytest.fixture(scope="module")
def greedy(run):
    return ids(run())


def until(row, stops):
    """(a text up to its first stop id, whether it has one)."""
    at = next((i for i, token in enumerate(row) if token in stops), None)
    return (row, False) if at is None else (row[: at + 1], True)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_torchs(family, tmp_path):
    model, decoder, params = pair(tmp_path, family, **UNTIED, **FAMILIES[family])
    tokens_BP, mask_BP = sampler._left_pad(PROMPTS, (P,))
    wanted = model.generate(
        torch.tensor(tokens_BP).long(),
        attention_mask=torch.tensor(mask_BP).long(),
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=None,
        pad_token_id=0,
    )[:, P:].tolist()
    assert min(len(set(row)) for row in wanted) > 5  # it does not repeat itself
    how = {"batch_size": 3, "lengths": (12,)}
    # A stop id as the last token that fits is no text that is cut off.
    for stops in (NEVER, (wanted[0][20], wanted[1][63])):
        sampling = SamplingParams(64, 0.0, 1.0)
        got = sample(decoder, params, PROMPTS, range(3), sampling, stop_ids=stops, **how)
        assert [(t.ids.tolist(), t.finished) for t in got] == [until(row, stops) for row in wanted]


def test_ids_that_another_model_lacks_are_not_sampled(run, greedy):
    assert max(max(row) for row in greedy) >= 60
    for sampling in (GREEDY, WARM):
        assert max(max(row) for row in ids(run(sampling=sampling, vocab_size=60))) < 60


def test_the_loop_ends_with_the_last_row_and_reads_no_last_token(monkeypatch):
    sampled, read = [], []

    class Counted(Decoder):
        def extend(self, *args):
            jax.debug.callback(lambda: read.append(1))
            return super().extend(*args)

    def counted(logits_BV, keys_B, temperature, top_k, top_p):
        jax.debug.callback(lambda: sampled.append(1))
        return jnp.where(jnp.arange(2) == 0, 5, 6) + 0 * logits_BV[:, 0].astype(jnp.int32)

    monkeypatch.setattr(sampler, "sample_token", counted)
    decoder, params = builders.small_model()
    program = Program(Counted(decoder.spec), 40, None, None, None, None)
    tokens_BP = np.full((2, 3), 7, np.int32)
    rows = (tokens_BP, tokens_BP > 0, np.arange(2, dtype=np.uint32))
    for stops, steps in (((5, 6), 1), ((5, 9), 40)):
        sampled.clear(), read.clear()
        _, length_B, done_B, _ = program.run(params, rows, (np.asarray(stops), 1.0, 1.0), None)
        jax.effects_barrier()
        assert len(sampled) == len(read) + 1 == steps  # the prompt is prefilled
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


def test_prompts_are_padded_to_the_shortest_length_that_fits(run):
    tokens_BP, mask_BP = sampler._left_pad([np.array([5, 6, 7]), np.array([8])], (16, 4, 3, 2))
    assert tokens_BP.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask_BP.tolist() == [[1, 1, 1], [0, 0, 1]]
    for lengths, wanted in (((0,), "no tokens"), ((3, 10), "10 tokens")):
        with pytest.raises(ValueError, match=wanted):
            run(prompts=[np.ones(n, np.int32) for n in lengths])


TOP, TOP_SHARED, HIDDEN = KEEPS = (Keep(5, 2.0), Keep(7, 0.5, vocab_size=100), Keep(None, 1.0))


@pytest.fixture(scope="module")
def written(run):
    """(stop ids, the text with them): rows of 5 tokens, of more, and one that is cut off."""
    free = ids(run(sampling=WARM))
    stops = (free[0][4], next(i for i in free[1][8:] if i not in free[2]))
    text = run(sampling=WARM, stops=stops)
    assert len({len(t.ids) for t in text}) == 3
    assert {t.finished for t in text} == {True, False}
    return stops, text


def leaves(text) -> list[np.ndarray]:
    """All arrays that were kept."""
    return jax.tree.leaves([vars(t.cached) for t in text])


def assert_same(text, others, atol=1e-5):
    assert ids(text) == ids(others)
    for a, b in zip(leaves(text), leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@functools.partial(jax.jit, static_argnums=0)
def _forward(decoder, params, tokens_BT, mask_BT):
    hidden = decoder.apply({"params": params}, tokens_BT, mask_BT)
    return hidden, decoder.apply({"params": params}, hidden, method="unembed")


@pytest.mark.parametrize("keep", KEEPS)
def test_kept_predictions_are_those_of_an_uncached_forward(model, run, written, keep):
    stops, text = written
    got = run(sampling=WARM, stops=stops, keep=keep)
    assert ids(got) == ids(text)
    # Padded on the right, to one shape.
    rows = [[*prompt, *t.ids] for prompt, t in zip(PROMPTS, text, strict=True)]
    tokens_BT = np.stack([np.pad(row, (0, P + N - len(row))) for row in rows]).astype(np.int32)
    mask_BT = np.arange(P + N)[None, :] < np.array([[len(row)] for row in rows])
    hidden_BTE, logits_BTV = jax.device_get(_forward(*model, tokens_BT, mask_BT))
    at = [slice(len(row) - len(t.ids) - 1, len(row) - 1) for row, t in zip(rows, text, strict=True)]
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    assert all(array.flags.owndata for array in leaves(got))  # no more than its own row is held
    if keep is HIDDEN:
        for row, t in enumerate(got):
            assert isinstance(t.cached, TokenHidden)
            close(t.cached.hidden, hidden_BTE[row, at[row]])
        return
    vocab_size = keep.vocab_size or 128
    logits_BTV = np.where(np.arange(128) < vocab_size, logits_BTV, -np.inf)
    wanted = top_k_logprobs(jnp.asarray(logits_BTV), keep.top_k, keep.temperature)
    logprobs_BTV = np.asarray(jax.nn.log_softmax(logits_BTV / keep.temperature))
    for row, t in enumerate(got):
        topk, logprobs_NV = t.cached.topk, logprobs_BTV[row, at[row]]
        assert (topk.temperature, topk.ids.dtype) == (keep.temperature, np.int32)
        close(topk.logprobs, wanted.logprobs[row, at[row]])
        close(topk.tail_logprob, wanted.tail_logprob[row, at[row]])
        # The ids by their worth: two that are equal up to rounding may change places.
        close(topk.logprobs, np.take_along_axis(logprobs_NV, topk.ids, axis=-1))
        close(t.cached.target_logprob, logprobs_NV[np.arange(len(t.ids)), t.ids])
    beyond = [t.ids[t.cached.target_logprob == -np.inf].tolist() for t in got]
    assert beyond == [[i for i in t.ids if i >= vocab_size] for t in text]
    assert any(beyond) == (keep is TOP_SHARED)


def test_what_is_kept_depends_on_neither_sampling_nor_neighbours_nor_mesh(model, run, written):
    greedy, compiled = run(keep=TOP), Program.run._cache_size()
    for how in ((1e-4, 1.0), (1.0, 1e-9)):  # the same tokens
        assert_same(run(sampling=SamplingParams(N, *how), keep=TOP), greedy, atol=0)
    assert Program.run._cache_size() == compiled  # temperature and top_p make no program
    warm = {"sampling": WARM, "stops": written[0], "keep": TOP_SHARED}
    wanted = run(**warm)
    assert_same(run(PROMPTS[1:2], (2,), **warm), wanted[1:2])
    assert_same(run(PROMPTS[::-1], (3, 2, 1), **warm, batch_size=2)[::-1], wanted)
    mesh = parallel_mesh.make_mesh()
    on_all = {"params": parallel_mesh.replicate(mesh, model[1]), "mesh": mesh, "batch_size": 4}
    assert_same(run(PROMPTS * 2, (1, 2, 3) * 2, **warm, **on_all), wanted * 2)


def traced(keep, mesh=None, dtype=jnp.float32):
    """`Program.run` for four rows."""
    decoder, params = builders.small_model()
    tokens_BP = np.full((4, 3), 7, np.int32)
    rows = (tokens_BP, tokens_BP > 0, np.arange(4, dtype=np.uint32))
    if mesh is not None:
        params, rows = parallel_mesh.replicate(mesh, params), parallel_mesh.shard_rows(mesh, rows)
    program = Program(decoder.clone(compute_dtype=dtype), 6, None, keep, None, mesh)
    how = (np.array([1]), np.float32(1), np.float32(1))
    return Program.run.trace(program, params, rows, how, None)


def test_what_is_not_asked_for_is_neither_computed_nor_stored(written):
    assert all(t.cached is None for t in written[1])
    programs = [traced(keep) for keep in (None, *KEEPS)]
    assert ["top_k" in str(program.jaxpr) for program in programs] == [0, 1, 1, 0]
    stored = [jax.tree.leaves(program.out_info)[3:] for program in programs]
    assert [len(leaves) for leaves in stored] == [0, 4, 4, 1]
    hidden = traced(HIDDEN, dtype=jnp.bfloat16).out_info[3]
    assert (hidden.shape, hidden.dtype) == ((4, 6, 16), jnp.bfloat16)
    for keep, wanted in ((Keep(101, 1.0, 100), "k must"), (Keep(4, 0), "temper")):
        with pytest.raises(ValueError, match=wanted):
            traced(keep)


def test_devices_do_not_talk_while_they_write():
    text = traced(TOP, parallel_mesh.make_mesh()).lower().compile().as_text()
    assert 'custom_call_target="TopK"' in text
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all") if word in text]
