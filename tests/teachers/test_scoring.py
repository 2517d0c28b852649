"""What is known of a batch is not asked again, wherever the teacher works."""

import builders
import jax
import numpy as np
import pytest

from gkdjax.losses import TopKLogprobs
from gkdjax.losses.objective import TopKTargets
from gkdjax.parallel import mesh
from gkdjax.teachers.base import Capabilities
from gkdjax.teachers.scoring import request_targets

MESH = mesh.make_mesh()
BATCH = builders.batch((2, 3, 1, 2))
B, N = BATCH.target_mask_BN.shape
NAMES = [f"rows.jsonl:{i}" for i in range(B)]


def targets(fill: int) -> TopKTargets:
    """Every number in it says where it comes from."""
    logprobs = np.full((B, N), -fill, np.float32)
    ids, top = np.full((B, N, 2), fill, np.int32), np.full((B, N, 2), -fill, np.float32)
    return TopKTargets(TopKLogprobs(ids, top, logprobs), logprobs)


class Here:
    capabilities = Capabilities(max_top_k=2, dense=False, samples=False, temperature=False)
    chat, description, sample = None, "here", print

    def __init__(self):
        self.asked = []

    def targets(self, batch):
        self.asked.append(batch.target_mask_BN)
        return targets(7)


class Elsewhere(Here):
    def ask(self, batch, names):
        assert names == NAMES
        found = self.targets(batch)
        return lambda: found


@pytest.mark.parametrize("make", [Here, Elsewhere])
@pytest.mark.parametrize("known", [None, (True, False, True, False), (True,) * 4])
def test_only_what_is_not_known_is_asked(make, known):
    """A teacher elsewhere is asked at once, and one here when its turn comes."""
    teacher = make()
    cached = None if known is None else jax.tree.map(np.array, targets(3))
    if known is not None:
        cached.topk.logprobs[~np.asarray(known)] = -np.inf
    wait = request_targets(teacher, BATCH, NAMES, cached, MESH)
    asks = known != (True,) * B
    assert len(teacher.asked) == (asks and make is Elsewhere)
    found = wait()
    known_B = np.asarray(known or (False,) * B)
    wanted_B1 = np.where(known_B, 3, 7)[:, None]
    assert (np.asarray(found.topk.ids).reshape(B, -1) == wanted_B1).all()
    for leaf in (found.topk.logprobs, found.topk.tail_logprob, found.target_logprob_BN):
        assert (np.asarray(leaf).reshape(B, -1) == -wanted_B1).all()
    assert len(teacher.asked) == asks
    for mask_BN in teacher.asked:
        assert (mask_BN == BATCH.target_mask_BN & ~known_B[:, None]).all()
