"""The objective of distillation: what a teacher predicts, dense or its best K, and the student's
weighted divergence from it."""

import dataclasses

import jax

from gkdjax import losses
from gkdjax.losses import TopKLogprobs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseTargets:
    """An in-process teacher, exact: its logits are `hidden_BNE @ unembedding_VE.T`, softcapped."""

    hidden_BNE: jax.Array  # at the N predicting positions
    unembedding_VE: jax.Array
    softcap: float | None = dataclasses.field(metadata={"static": True})  # None: no cap
    shared: int | None = dataclasses.field(default=None, metadata={"static": True})  # see below


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopKTargets:
    """A server, a store, or an in-process teacher on request: its best K tokens."""

    topk: TopKLogprobs  # [B,N,K], natural logs under the teacher's whole vocabulary
    target_logprob_BN: jax.Array  # float32, the target token's own logprob
    # Ids below it are the student's and the teacher's; None: all that both tables have.
    shared: int | None = dataclasses.field(default=None, metadata={"static": True})


TeacherTargets = DenseTargets | TopKTargets


def weighted_divergence(
    hidden_BND: jax.Array,
    unembedding_VD: jax.Array,
    softcap: float | None,
    targets: TeacherTargets,
    weights_BN: jax.Array,
    divergence: str,
    *,
    beta: float,
    temperature: float,
    tail: str,
    chunk_size: int,
    **axes,
) -> tuple[jax.Array, jax.Array]:
    """The student's divergence from dense or top-k targets -> (weighted sum, per token [B,N]).

    Fused from hidden states, see `gkdjax.losses.fused`, which takes the `axes` of a mesh.

    Models are compared on the ids v < S that both have: those below `targets.shared`, or all rows
    of the smaller table. The student is q_v = exp(z_v) / sum_{u < S} exp(z_u), whatever the teacher
    is; rows that are no token of both are on neither side. A dense teacher is p_v so, too. A top-k
    teacher keeps p_v under its whole vocabulary: its K are those below S, and its tail 1 - P holds
    what it gives to tokens that the student lacks, see `losses.within`. Where it has no such tokens
    K = S is the dense case.
    """
    options = {
        "divergence": divergence,
        "beta": beta,
        "temperature": temperature,
        "softcap": softcap,
        "chunk_size": chunk_size,
        **axes,
    }
    if isinstance(targets, DenseTargets):
        shared = shared_ids(unembedding_VD, targets)
        return losses.fused_dense_divergence(
            hidden_BND,
            unembedding_VD[:shared],
            targets.hidden_BNE,
            targets.unembedding_VE[:shared],
            weights_BN,
            teacher_softcap=targets.softcap,
            **options,
        )
    return losses.fused_topk_divergence(
        hidden_BND,
        unembedding_VD[: targets.shared],
        losses.within(targets.topk, targets.shared),
        weights_BN,
        tail=tail,
        **options,
    )


def shared_ids(unembedding_VD: jax.Array, targets: DenseTargets) -> int:
    """How many ids of the student's table and of a dense teacher's are compared."""
    rows = unembedding_VD.shape[0], targets.unembedding_VE.shape[0]
    return min(rows if targets.shared is None else (*rows, targets.shared))


def token_weights(mask_BN: jax.Array, reduction: str) -> jax.Array:
    """What each target counts, by `reduction`: "token" or "example"."""
    return mask_BN if reduction == "token" else losses.example_weights(mask_BN)
