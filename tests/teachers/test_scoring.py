"""What is known of a batch is not asked again, wherever the teacher works."""

import builders
import numpy as np
import pytest

from gkdjax.data.batching import CachedTargets
from gkdjax.losses import TopKLogprobs
from gkdjax.losses.objective import TopKTargets
from gkdjax.parallel import mesh
from gkdjax.teachers.base import Capabilities, RemoteTeacher
from gkdjax.teachers.scoring import request_targets

MESH = mesh.make_mesh()
BATCH = builders.batch((2, 3, 1, 2))
B, N = BATCH.target_mask_BN.shape
K = 2
NAMES = [f"rows.jsonl:{i}" for i in range(B)]


def targets(fill: int) -> TopKTargets:
    """Every number in it says where it comes from."""
    topk = TopKLogprobs(
        np.full((B, N, K), fill, np.int32),
        np.full((B, N, K), -fill, np.float32),
        np.full((B, N), -fill, np.float32),
    )
    return TopKTargets(topk, np.full((B, N), -fill, np.float32))


class Here:
    capabilities = Capabilities(max_top_k=2, dense=False, samples=False, temperature=False)
    chat = None
    description = "here"

    def __init__(self):
        self.heard = []

    def targets(self, batch):
        self.heard.append(batch.target_mask_BN)
        return targets(7)

    def sample(self, prompts, seeds, sampling):
        raise NotImplementedError


class Elsewhere(Here):
    def ask(self, batch, names):
        assert names == NAMES
        self.heard.append(batch.target_mask_BN)
        return lambda: targets(7)


@pytest.mark.parametrize("make", [Here, Elsewhere])
@pytest.mark.parametrize("known", [None, (True, False, True, False), (True,) * 4])
def test_only_what_is_not_known_is_asked(make, known):
    teacher = make()
    kept = None if known is None else CachedTargets(targets(3), np.asarray(known))
    found = request_targets(teacher, BATCH, NAMES, kept, MESH)()
    from_kept_B = np.asarray(known or (False,) * B)
    wanted = np.where(from_kept_B, 3, 7)
    for leaf, sign in (
        (found.topk.ids, 1),
        (found.topk.logprobs, -1),
        (found.target_logprob_BN, -1),
    ):
        assert (np.asarray(leaf).reshape(B, -1) == sign * wanted[:, None]).all()
    if known == (True,) * B:
        assert teacher.heard == []
    else:
        (mask_BN,) = teacher.heard
        assert (mask_BN == BATCH.target_mask_BN & ~from_kept_B[:, None]).all()


def test_a_teacher_elsewhere_is_asked_at_once_and_one_here_when_its_turn_comes():
    for make, asked in ((Here, 0), (Elsewhere, 1)):
        teacher = make()
        assert isinstance(teacher, RemoteTeacher) == bool(asked)
        wait = request_targets(teacher, BATCH, NAMES, None, MESH)
        assert len(teacher.heard) == asked
        wait()
        assert len(teacher.heard) == 1
