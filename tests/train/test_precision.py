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
FLOAT32, BFLOAT16 = np.dtype("float32"), jnp.dtype("bfloat16")


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


def float_dtypes(arrays) -> set:
    return {x.dtype for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)}


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
    given = frozen, mesh.shard_rows(MESH, BATCH), builders.dense_targets(BATCH), {}
    traced = run.trace(state, *given, divergence="forward_kl")
    after, sums = run(state, *given, divergence="forward_kl")
    return before, after, sums, list(equations(traced.jaxpr.jaxpr))


def test_masters_adapters_and_optimizer_are_float32(step):
    before, after, sums, _ = step
    for tree in (before, after, sums):
        assert float_dtypes(jax.tree.leaves(tree)) == {FLOAT32}
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))


def test_norms_softmax_log_sum_exp_and_losses_are_float32(step):
    seen = set()
    for equation in step[3]:
        name, floats = equation.primitive.name, float_dtypes(v.aval for v in equation.invars)
        # Gradients of a broadcast are sums, too; in bfloat16 they are those of activations.
        of_broadcast = name == "reduce_sum" and "transpose" in str(equation.source_info.name_stack)
        if name in SENSITIVE and floats and not of_broadcast:
            assert floats == {FLOAT32}, equation
            seen.add(name)
    assert seen >= {"exp", "log", "rsqrt", "reduce_sum", "reduce_max"}


def test_products_are_bfloat16_where_asked(step):
    products = [e for e in step[3] if e.primitive.name == "dot_general"]
    low = [e for e in products if {v.aval.dtype for v in e.invars} == {BFLOAT16}]
    assert len(low) > 0.8 * len(products)  # the rest: gradients of attention's float32 scores


@pytest.mark.parametrize(
    ("param_dtype", "compute_dtype"), [("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_a_frozen_base_keeps_its_dtype_and_computes_in_another(param_dtype, compute_dtype):
    decoder, params = model(param_dtype, compute_dtype)
    variables = {"params": student_params(params, builders.adapters(decoder))}
    assert variables["params"]["layers"]["q_proj"].w.dtype == jnp.dtype(param_dtype)
    hidden = decoder.apply(variables, BATCH.student_tokens_BS, BATCH.student_mask_BS)
    assert hidden.dtype == jnp.dtype(compute_dtype)
    assert decoder.apply(variables, hidden, method="unembed").dtype == jnp.float32
