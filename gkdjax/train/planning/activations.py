"""Counts what the student's forward pass leaves for its backward pass, off the traced program.

Nothing is computed and no weights are needed: `jax.vjp` is traced with shapes alone, and what comes
out of it that did not go in is what lies in memory between the two passes. That follows the decoder
whatever becomes of it; XLA may keep less (it drops what it can make again for nothing), not more.
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
    one_layer: int  # what recomputing one layer brings back; 0 if none is recomputed
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
    """Fresh adapters as `jax.ShapeDtypeStruct`.

    Raises:
      UserError: a target that matches no kernel.
    """
    base = abstract_params(spec, jnp.dtype(dtype))
    try:
        return jax.eval_shape(lambda: lora.init(jax.random.key(0), base, rules))
    except ValueError as error:
        raise UserError(f"config.student.lora.targets: {error}") from error


@functools.cache
def kept(of: Pass, remat: bool) -> Kept:
    """Counts what `of` leaves, with or without `train.remat`."""
    whole = _residuals(of, False)
    largest = max(whole.layers) // of.spec.num_layers
    if not remat:
        return Kept(sum(whole.layers) + whole.rest, 0, largest)
    less = _residuals(of, True)
    return Kept(sum(less.layers) + less.rest, whole.one_layer + _random_words(of), largest)


class _Residuals(NamedTuple):
    layers: list[int]  # bytes of each array that has an axis for the layers
    one_layer: int  # bytes of what one layer adds to them, if nothing is copied there
    rest: int


def _residuals(of: Pass, remat: bool) -> _Residuals:
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
    came_in = set(jaxpr.invars)
    left = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - came_in
    layers, rest = [], 0
    for variable in left:
        aval = variable.aval
        if aval.ndim > 1 and aval.shape[0] == of.spec.num_layers:
            layers.append(_nbytes(aval))
        else:
            rest += _nbytes(aval)
    return _Residuals(layers, _within_a_layer(jaxpr, left), rest)


# Operations that give an array another shape or name, and no memory of its own.
_SAME_MEMORY = ("reshape", "squeeze", "name", "reduce_precision")


def _within_a_layer(jaxpr, left: set) -> int:
    """Bytes of the distinct arrays of a loop's body that become part of what is left."""
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
    return sum(_nbytes(variable.aval) for variable in found)


def _random_words(of: Pass) -> int:
    """Two of 32 bits for each number that dropout may drop; XLA keeps them, and not the mask."""
    if of.rules is None or of.rules.dropout == 0:
        return 0
    inputs = sum(a.a.shape[1] for a in adapters(of.spec, of.dtype, of.rules).values())
    return 8 * of.rows * of.length * inputs


def _nbytes(aval) -> int:
    """Keys of random draws, which have no itemsize of their own, are too small to count."""
    return 0 if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key) else aval.size * aval.dtype.itemsize
