"""Which rows share a batch, how much of it is padding, and whose completions they have."""

import logging

import numpy as np
from feeds import feed_of

from gkdjax.data import dataset
from gkdjax.data.chat_template import load_chat
from gkdjax.types import Completion


def test_rows_of_similar_length_share_batches_if_others_would_be_padding(
    student, caplog, monkeypatch
):
    chat, many = load_chat(student), {"rows": 160, "longest": 40, "max_length": 256}
    with caplog.at_level(logging.INFO, "absl"):
        grouped = feed_of(chat, **many)
    assert "160 rows; padded shapes" in caplog.text and "% of the student" in caplog.text
    few = feed_of(chat, rows=40)
    monkeypatch.setattr(dataset, "_MOST_PADDING", 1.0)
    by_chance = feed_of(chat, **many)
    assert by_chance.padding["student"] > 0.25 > 0.2 > grouped.padding["student"] > 0
    for feed in (grouped, by_chance):
        rows = np.concatenate([feed.batch_rows(step) for step in range(40)])
        assert sorted(rows) == list(range(160))
        padded = [feed.batch(step)[0].student_mask_BS for step in range(40)]
        share = 1 - sum(mask.sum() for mask in padded) / sum(mask.size for mask in padded)
        np.testing.assert_allclose(share, feed.padding["student"])
        assert len({mask.shape for mask in padded}) <= 4
    lengths = [grouped.batch(step)[0].student_mask_BS.shape[1] for step in range(40)]
    assert lengths not in (sorted(lengths), sorted(lengths)[::-1])
    # Rows that differ little stay in their random order.
    assert max(few.padding[view] for view in ("student", "teacher")) < 0.2
    by_chance = feed_of(chat, rows=40)
    assert all((few.batch_rows(s) == by_chance.batch_rows(s)).all() for s in range(9))


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
    assert [one.report()["refused_responses"] for one in (bare, less)] == [0, 8]


def test_a_prompt_and_the_views_that_it_begins_share_their_memory(student):
    feed = feed_of(load_chat(student), prefix="p" * 30)
    for row, pair in enumerate(feed.first_pairs):
        for who, view in (("student", pair.student), ("teacher", pair.teacher)):
            assert np.shares_memory(feed.prompt(row, who).ids, view.ids)


def test_rows_that_are_cut_or_dropped_are_named(student, caplog):
    chat, long = load_chat(student), {"rows": 4, "prefix": "p" * 30, "max_length": 50}
    whole = feed_of(chat, too_long="truncate-prefix", **(long | {"max_length": 256}))
    assert whole.report()["dropped"] == [] and "shortened" not in whole.report()
    cut = feed_of(chat, too_long="truncate-prefix", **long)
    names = cut.report()["shortened"]
    assert names and cut.report()["dropped"] == []
    assert f"{len(names)} rows longer than data.max_length=50 lost" in caplog.text
    assert f"(truncate-prefix): {names[0]}" in caplog.text
    assert cut.fingerprint() != whole.fingerprint()
