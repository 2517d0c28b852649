"""The teacher's answers under other prefixes than the one that it read."""

import numpy as np
import pytest
from small_runs import ConstantTeacher, small

from gkdjax import config
from gkdjax.data.chat_template import load_chat
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import ViewRules
from gkdjax.evaluation.texts import Texts
from gkdjax.parallel.mesh import make_mesh
from gkdjax.types import Completion, Example, Message


class TalkativeTeacher(ConstantTeacher):
    """Writes 20 tokens."""

    def sample(self, prompts, seeds, sampling):
        return [Completion(np.arange(50, 70, dtype=np.int32), False) for _ in prompts]


@pytest.mark.parametrize("length", [1, 30, 40])
def test_another_prefix_is_read_before_the_same_targets_as_far_as_it_leaves_room(student, length):
    """The baked prefix leaves room for a part of the answer, a shorter one for more of it."""
    c = config.parse(small(student, eval__max_new_tokens=20, data__bucket_lengths=()))
    chat = load_chat(student)
    rules = ViewRules(chat, chat, 0, TargetRules(("assistant",)), 64, "drop")
    baked, turns = (Message("system", "x" * 35),), (Message("user", "q"),)
    examples = [Example("data:0", 0, baked, turns, None, None)]
    texts = Texts(c, rules, TalkativeTeacher(), examples, make_mesh())
    ((batch, targets),) = texts.teacher_text.batches
    ((under, same_targets),) = texts.under_prefix((Message("system", "x" * length),)).batches
    assert same_targets is targets
    counts = [int(each.target_mask_BN.sum()) for each in (batch, under)]
    assert counts[0] < 20 and counts[1] == counts[0] - max(0, length - 35)
    mask_BN, at_BN = under.target_mask_BN, under.student_at_BN
    assert mask_BN.shape == at_BN.shape == batch.target_mask_BN.shape
    read = np.take_along_axis(under.student_tokens_BS, at_BN + 1, axis=1)
    np.testing.assert_array_equal(read[mask_BN], batch.target_ids_BN[mask_BN])
    assert chat.decode(under.student_tokens_BS[0]).count("x") == length
