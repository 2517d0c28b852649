"""Which rows share a batch, and how much of it is padding."""

import logging

import numpy as np
from feeds import feed_of

from gkdjax.data.chat_template import load_chat
from gkdjax.types import Completion


def test_rows_of_similar_length_share_batches_where_others_would_be_padding(student, caplog):
    chat, many = load_chat(student), {"rows": 160, "longest": 40, "max_length": 256}
    with caplog.at_level(logging.INFO, "absl"):
        grouped = feed_of(chat, **many)
    assert "160 rows; padded shapes" in caplog.text and "% of the student" in caplog.text
    by_chance = feed_of(chat, most_padding=1.0, **many)
    assert by_chance.padding["student"] > 0.25 > 0.2 > grouped.padding["student"] > 0
    for feed in (grouped, by_chance):
        rows = np.concatenate([feed.batch_rows(step) for step in range(40)])
        assert sorted(rows) == list(range(160))
        padded = [feed.batch(step)[0].student_mask_BS for step in range(40)]
        share = 1 - sum(mask.sum() for mask in padded) / sum(mask.size for mask in padded)
        np.testing.assert_allclose(share, feed.padding["student"])
        assert len({mask.shape for mask in padded}) <= 4
    lengths = [
        mask.shape[1] for mask in (grouped.batch(step)[0].student_mask_BS for step in range(40))
    ]
    assert lengths not in (sorted(lengths), sorted(lengths)[::-1])


def test_rows_of_little_difference_stay_in_their_random_order(student):
    feed = feed_of(load_chat(student), rows=40)
    assert max(feed.padding[view] for view in ("student", "teacher")) < 0.2
    by_chance = feed_of(load_chat(student), rows=40, most_padding=1.0)
    assert [feed.batch_rows(s).tolist() for s in range(9)] == [
        by_chance.batch_rows(s).tolist() for s in range(9)
    ]


def test_rollouts_make_another_dataset_and_leave_the_first_as_it_was(student):
    def written(rows, *ids):
        return {i: Completion(np.array(ids, np.int32), True, refused=1) for i in rows}

    def begin(dataset):
        return [set(dataset.batch(step)[0].target_ids_BN[:, 0].tolist()) for step in (0, 1)]

    bare = feed_of(load_chat(student), rows=8, responses=False)
    assert bare.unanswered() == [*range(8)]
    first = bare.with_rollouts(written(range(8), 60, 5))
    wanted = first.unanswered([1])
    assert wanted == sorted(first.batch_rows(1))
    new, refused = (first.refreshed(written(wanted, *ids), [1], 1) for ids in ((70, 5), ()))
    assert begin(new) == [{60}, {70}] and begin(first) == begin(refused) == [{60}, {60}]
    less = bare.with_rollouts(written(range(7), 60, 5) | written([7]))
    assert len(less) == 7 and less.report()["empty"] == ["data.train:7"]
    assert len(bare) == len(first) == 8 and "empty" not in bare.report()
    assert (bare.refused, less.refused) == (0, 8)
