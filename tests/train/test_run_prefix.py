"""Whole runs whose teacher reads the prefix once, against those where each row reads it."""

import numpy as np
import pytest
from feeds import feed_of

import gkdjax
from gkdjax.data.chat_template import load_chat
from gkdjax.models import prefix_cache
from gkdjax.models.padding import round_up
from gkdjax.models.prefix_cache import PrefixCache
from tests.small_runs import metrics, small


def test_a_prefix_read_once_teaches_the_same(student, tmp_path, monkeypatch):
    reads, read = [], prefix_cache._read
    monkeypatch.setattr(prefix_cache, "_read", lambda *a: reads.append(a[2].shape) or read(*a))
    c = small(student, train__steps=3)
    c.context.prefix_messages = [{"role": "system", "content": "be brief, but be right"}]
    c.data.train = [*({"prompt": f"ask {i}"} for i in range(5)), {"prompt": "ask", "response": "x"}]
    c.eval.prompts = [{"prompt": "ask 8"}, {"prompt": "ask 9"}]
    found, results = {}, {}
    for name, least in (("each row", 10**6), ("once", 16)):
        monkeypatch.setattr(prefix_cache, "LEAST_TOKENS", least)
        results[name] = gkdjax.run(c, tmp_path / name)
        found[name] = [line["loss"] for line in metrics(tmp_path / name)]
        # By the teacher, the student before and after training, and where its cost is measured.
        assert len(reads) == (0 if name == "each row" else 4)
        assert ("with_kept" in results[name]["prefix_cost"]["seconds"]) == (name == "once")
    # <bos><start_of_turn>user, a line break, the prefix, two line breaks, and "ask" of all rows
    assert set(reads) == {(1, round_up(1 + 1 + 5 + len("be brief, but be right") + 2 + 3, ()))}
    np.testing.assert_allclose(found["once"], found["each row"], rtol=1e-4)
    for who in ("base", "prompted_base", "student", "reprompted_student"):
        kl = [results[name][who]["forward_kl"] for name in found]
        assert kl[0] == pytest.approx(kl[1], rel=1e-3, abs=1e-6)
    told = [results[name]["prefix_cost"]["tokens_saved"] for name in found]
    assert told == [2 + len("be brief, but be right")] * 2


def test_rows_of_one_prefix_share_batches_and_those_of_several_are_read_for_each(
    student, tmp_path, monkeypatch
):
    monkeypatch.setattr(prefix_cache, "LEAST_TOKENS", 16)
    seen, readings = [], PrefixCache._readings
    monkeypatch.setattr(PrefixCache, "_readings", lambda *a: seen.append(readings(*a)) or seen[-1])
    personas = [[{"role": "system", "content": f"you are {who}, always"}] for who in ("A", "BB")]
    rows = [{"prompt": f"ask {i}", "prefix_messages": personas[i % 2]} for i in range(12)]
    c = small(student, data__train=rows, context__prefix_messages=(), train__steps=6)
    c.data.bucket_lengths = ()
    gkdjax.run(c, tmp_path)
    prefixes = [sorted(len(ids) for ids, _ in one) for one in seen]
    # Of twelve rows in batches of four: two batches an epoch of one persona, and one of both.
    one, other = sorted({prefix for each in prefixes for prefix in each})
    assert one > 16
    assert sorted(prefixes) == sorted(2 * [[one], [one, other], [other]])


def test_rows_whose_prefix_was_shortened_share_what_is_left_of_it(student):
    chat, text = load_chat(student), "".join(map(chr, range(40, 100)))
    feed = feed_of(chat, prefix=text, too_long="truncate-prefix")
    assert len({example.prefix for example in feed.examples()}) > 1
    (prompts,) = feed.prompts_by_prefix([])
    shared = chat.decode(prefix_cache.common_beginning(prompts))
    least = min(len(example.prefix[0].content) for example in feed.examples())
    assert 20 < least < 60 and text[:least] in shared


def test_rows_with_prefixes_of_their_own(student, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_cache, "LEAST_TOKENS", 16)
    personas = [[{"role": "system", "content": f"you are {who}, always"}] for who in ("A", "BB")]
    rows = [{"prompt": f"ask {i}", "prefix_messages": personas[i % 2]} for i in range(8)]
    found = []
    for name, most in (("kept", 2**30), ("dropped", 0)):
        c = small(student, data__train=rows, context__prefix_messages=(), train__steps=1)
        c.teacher.prefix_bytes = most
        gkdjax.run(c, tmp_path / name)
        found.append([line["loss"].hex() for line in metrics(tmp_path / name)])
    assert found[0] == found[1]  # reading a prefix again gives the same numbers, to the bit
