"""The training objective: a teacher's targets, and the student's weighted divergence from them."""

import dataclasses

import jax
from jax import Array

from gkdjax.losses.fused import fused_dense_divergence, fused_topk_divergence
from gkdjax.losses.masking import example_weights
from gkdjax.losses.topk import TopKLogprobs, within

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseTargets:
    """Exact targets of an in-process teacher: softcapped `hidden_BNE @ unembedding_VE.T`."""

    hidden_BNE: Array  # at the N predicting positions
    unembedding_VE: Array
    softcap: float | None = dataclasses.field(metadata=_STATIC)  # None: no cap
    shared: int | None = dataclasses.field(default=None, metadata=_STATIC)  # as in TopKTargets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopKTargets:
    """The K best tokens of a server, a store, or an in-process teacher on request."""

    topk: TopKLogprobs  # [B,N,K], natural logs under the teacher's whole vocabulary
    target_logprob_BN: Array  # float32, the target token's own logprob
    # Ids below it are the student's and the teacher's; None: all that both tables have.
    shared: int | None = dataclasses.field(default=None, metadata=_STATIC)


TeacherTargets = DenseTargets | TopKTargets


def weighted_divergence(
    hidden_BND: Array,
    unembedding_VD: Array,
    softcap: float | None,
    targets: TeacherTargets,
    weights_BN: Array,
    divergence: str,
    *,
    tail: str,
    **options,
) -> tuple[Array, Array]:
    """The student's divergence from the targets -> (weighted sum, per token [B,N]).

    `options` are those of `fused_topk_divergence`: beta, temperature, chunk_size, and the axes of a
    mesh.

    The models are compared on the ids v < S that both have: those below `targets.shared`, or all
    rows of the smaller table. The student is q_v = exp(z_v) / sum_{u < S} exp(z_u) for every
    teacher, and so is a dense teacher. A top-k teacher keeps p_v under its whole vocabulary: its K
    are those below S, and its tail 1 - P holds its mass on tokens that the student lacks, see
    `losses.within`. If it has no such tokens, K = S is the dense case.
    """
    options |= {"divergence": divergence, "softcap": softcap}
    if isinstance(targets, DenseTargets):
        shared = shared_ids(unembedding_VD, targets)
        return fused_dense_divergence(
            hidden_BND,
            unembedding_VD[:shared],
            targets.hidden_BNE,
            targets.unembedding_VE[:shared],
            weights_BN,
            teacher_softcap=targets.softcap,
            **options,
        )
    topk = within(targets.topk, targets.shared)
    table = unembedding_VD[: targets.shared]
    return fused_topk_divergence(hidden_BND, table, topk, weights_BN, tail=tail, **options)


def shared_ids(unembedding_VD: Array, targets: DenseTargets) -> int:
    """How many ids of the student's and a dense teacher's tables are compared."""
    rows = unembedding_VD.shape[0], targets.unembedding_VE.shape[0]
    return min(rows if targets.shared is None else (*rows, targets.shared))


def token_weights(mask_BN: Array, reduction: str) -> Array:
    """The weight of each target for the reduction "token" or "example"."""
    return mask_BN if reduction == "token" else example_weights(mask_BN)
