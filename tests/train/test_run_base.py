"""A full fine-tuning lets go of the untrained parameters when nobody reads them any more."""

import gc
import weakref

import jax
import pytest
from small_runs import small

import gkdjax
from gkdjax.evaluation.evaluate import Evaluation
from gkdjax.train import run


def test_nothing_holds_the_untrained_parameters_while_all_are_trained(
    student, other, tmp_path, monkeypatch
):
    held = []

    def train(parts, workdir, shared):
        leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(parts.base)]
        assert not parts.keeps_base and len(leaves) > 5
        parts.base = None  # as the real one does
        gc.collect()
        held.append(sum(leaf() is not None for leaf in leaves))
        raise InterruptedError

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(Evaluation, "before", lambda self, base: {"answers": []})
    c = small(student, teacher__backend="flax", teacher__model=other, student__adapter="none")
    with pytest.raises(InterruptedError):
        gkdjax.run(c, tmp_path / "run")
    assert held == [0]
