"""The table of precisions in the README of models, row by row."""

import builders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkdjax.config import Config, Gkd
from gkdjax.models.lora import student_params
from gkdjax.parallel import mesh
from gkdjax.train.step import init_state, make_train_step

MESH = mesh.make_mesh()
BATCH = builders.batch((2, 2, 1, 2))
# What must not be done in bfloat16: its 8 bits lose a sum and a small difference.
SENSITIVE = {"exp", "log", "log1p", "rsqrt", "cumsum", "reduce_sum", "reduce_max", "argmax"}


def model(param_dtype, compute_dtype):
    decoder, params = builders.small_model(final_logit_softcapping=3.0)
    params = jax.tree.map(lambda x: x.astype(param_dtype), params)
    return decoder.clone(compute_dtype=jnp.dtype(compute_dtype)), params


def equations(jaxpr):
    """All of a program, those of its loops and branches too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def float_dtypes(equation) -> set:
    dtypes = {v.aval.dtype for v in equation.invars}
    return {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}


@pytest.fixture(scope="module", params=["lora", "full"])
def step(request):
    """(state before, state after, sums, the step's equations) in bfloat16 compute."""
    decoder, params = model("bfloat16", "bfloat16")
    frozen, trainable = params, builders.adapters(decoder)
    if request.param == "full":
        frozen, trainable = None, jax.tree.map(lambda x: x.astype(jnp.float32), params)
    optimizer = optax.adamw(1e-2)
    run = make_train_step(decoder, optimizer, lambda _: 1e-2, Config(gkd=Gkd("mixed")), MESH)
    state = mesh.replicate(MESH, init_state(trainable, optimizer))
    before = jax.device_get(state)
    targets = builders.dense_targets(BATCH)
    batch = mesh.shard_rows(MESH, BATCH)
    traced = run.trace(state, frozen, batch, targets, {}, divergence="forward_kl")
    after, sums = run(state, frozen, batch, targets, {}, divergence="forward_kl")
    return before, after, sums, list(equations(traced.jaxpr.jaxpr))


def test_masters_adapters_and_optimizer_are_float32(step):
    before, after, sums, _ = step
    for tree in (before, after, sums):
        floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert floating and {x.dtype for x in floating} == {np.dtype("float32")}
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))


def test_norms_softmax_log_sum_exp_and_losses_are_float32(step):
    seen = set()
    for equation in step[3]:
        name = equation.primitive.name
        floats = float_dtypes(equation)
        if name in SENSITIVE and floats:
            # Gradients of a broadcast are sums, too; in bfloat16 they are those of activations.
            if name == "reduce_sum" and "transpose" in str(equation.source_info.name_stack):
                continue
            assert floats == {np.dtype("float32")}, equation
            seen.add(name)
    assert seen >= {"exp", "log", "rsqrt", "reduce_sum", "reduce_max"}


def test_products_are_bfloat16_where_asked(step):
    products = [e for e in step[3] if e.primitive.name == "dot_general"]
    operands = [{v.aval.dtype for v in e.invars} for e in products]
    low = [dtypes for dtypes in operands if dtypes == {jnp.dtype("bfloat16")}]
    assert len(low) > 0.8 * len(products)  # the rest: gradients of attention's float32 scores


def test_a_frozen_base_keeps_its_dtype_and_computes_in_another():
    for param_dtype, compute_dtype in (("bfloat16", "float32"), ("float16", "bfloat16")):
        decoder, params = model(param_dtype, compute_dtype)
        attached = student_params(params, builders.adapters(decoder))
        assert attached["layers"]["q_proj"].w.dtype == jnp.dtype(param_dtype)
        hidden = decoder.apply({"params": attached}, BATCH.student_tokens_BS, BATCH.student_mask_BS)
        assert hidden.dtype == jnp.dtype(compute_dtype)
        logits = decoder.apply({"params": attached}, hidden, method="unembed")
        assert logits.dtype == jnp.float32
