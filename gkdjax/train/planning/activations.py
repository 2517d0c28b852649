"""Counts what the student's forward pass keeps for its backward pass, from the traced program.

Nothing is computed and no weights are needed: `jax.vjp` is traced with shapes alone, and its
outputs that are not its inputs lie in memory between the two passes. XLA may keep less (it
recomputes what is cheap), not more.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from gkdjax.config import Lora
from gkdjax.models import lora
from gkdjax.models.decoder import Decoder, abstract_params
from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.utils.errors import UserError


class Kept(NamedTuple):
    """Bytes on one device, between the forward and the backward pass of some rows."""

    all_layers: int
    one_layer: int  # what recomputing one layer brings back; 0 without remat
    largest: int  # one layer's largest array, which has a gradient in the backward pass


class Pass(NamedTuple):
    """A forward pass that is differentiated; hashable."""

    spec: DecoderConfig
    dtype: str  # of the parameters
    compute_dtype: str
    rules: Lora | None  # None: all parameters are trained
    rows: int
    length: int  # positions of a row


def adapters(spec: DecoderConfig, dtype: str, rules: Lora) -> dict:
    """Returns fresh adapters as `jax.ShapeDtypeStruct`; UserError for unknown targets."""
    base = abstract_params(spec, jnp.dtype(dtype))
    try:
        return jax.eval_shape(lambda: lora.init(jax.random.key(0), base, rules))
    except ValueError as error:
        raise UserError(f"config.student.lora.targets: {error}") from error


@functools.cache
def kept(of: Pass, remat: bool) -> Kept:
    """Counts the residuals of a pass, with or without `train.remat`."""
    layers, rest, one_layer = _residuals(of, False)
    largest = max(layers) // of.spec.num_layers
    if not remat:
        return Kept(sum(layers) + rest, 0, largest)
    layers, rest, _ = _residuals(of, True)
    if of.rules is not None and of.rules.dropout > 0:
        # Two random words of 32 bits for each number that dropout may drop; XLA keeps them, and
        # not the mask.
        inputs = sum(a.a.shape[1] for a in adapters(of.spec, of.dtype, of.rules).values())
        one_layer += 8 * of.rows * of.length * inputs
    return Kept(sum(layers) + rest, one_layer, largest)


def _residuals(of: Pass, remat: bool) -> tuple[list[int], int, int]:
    """Returns bytes of each array that is stacked over layers, of the others, and of one layer."""
    decoder = Decoder(of.spec, compute_dtype=jnp.dtype(of.compute_dtype), remat=remat)
    base = abstract_params(of.spec, jnp.dtype(of.dtype))
    trainable = base if of.rules is None else adapters(of.spec, of.dtype, of.rules)

    def backward(base, trainable, tokens, mask, key):
        def hidden(trainable):
            params = trainable if of.rules is None else lora.attach(base, trainable, key)
            return decoder.apply({"params": params}, tokens, mask)

        return jax.vjp(hidden, trainable)[1]

    shape = of.rows, of.length
    tokens, mask = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, bool))
    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(backward)(base, trainable, tokens, mask, key).jaxpr
    left = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - set(jaxpr.invars)
    stacked = {v for v in left if v.aval.ndim > 1 and v.aval.shape[0] == of.spec.num_layers}
    layers = [_nbytes(v) for v in stacked]
    return layers, sum(map(_nbytes, left - stacked)), _within_a_layer(jaxpr, left)


# Operations that give an array another shape or name, and no memory of its own.
_SAME_MEMORY = ("reshape", "squeeze", "name", "reduce_precision")


def _within_a_layer(jaxpr, left: set) -> int:
    """Counts the distinct arrays of a loop's body that become part of what is left."""
    found = set()
    for loop in (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"):
        body = loop.params["jaxpr"].jaxpr
        made_by = {out: eqn for eqn in body.eqns for out in eqn.outvars}
        for outside, inside in zip(loop.outvars, body.outvars, strict=True):
            if outside not in left or isinstance(inside, Literal):
                continue
            while inside in made_by and made_by[inside].primitive.name in _SAME_MEMORY:
                inside = made_by[inside].invars[0]
            found.add(inside)
    return sum(map(_nbytes, found))


def _nbytes(variable) -> int:
    """Returns the bytes of an array; random keys, which have no itemsize, count 0."""
    aval = variable.aval
    return 0 if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key) else aval.size * aval.dtype.itemsize
