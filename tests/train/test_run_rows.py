"""Whole runs on all kinds of rows, prefixes, targets and rollouts."""

import json

import factories
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from feeds import feed_of
from small_runs import ConstantTeacher, losses, losses_hex, metrics, small, talk

import gkdjax
from gkdjax import config
from gkdjax.data.chat_template import load_chat
from gkdjax.data.load import load_examples
from gkdjax.models import prefix_cache
from gkdjax.models.padding import round_up
from gkdjax.models.prefix_cache import PrefixCache
from gkdjax.teachers.local import LocalTeacher
from gkdjax.train import datasets
from gkdjax.types import Completion
from gkdjax.utils.errors import TrainingFailure, UserError
from gkdjax.utils.files import read_lines

OWN = [{"role": "system", "content": "be loud"}]
PERSONAS = [[{"role": "system", "content": f"you are {who}, always"}] for who in ("A", "BB")]


class Listening(ConstantTeacher):
    """Keeps the first prompts that it is asked to answer, and breaks down."""

    prompts: tuple = ()

    def sample(self, prompts, seeds, sampling):
        self.prompts = [prompt.ids for prompt in prompts]
        raise ConnectionError("gone")


def test_a_parquet_file_and_a_prefix_file_are_the_same_run_as_the_config_with_both(
    student, tmp_path
):
    rows = [
        {"question": f"ask {i}", "output": output, "prefix_messages": OWN if i == 2 else None}
        for i, output in enumerate((None, "yo") * 3)
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "p.yaml").write_text("- role: system\n  content: be brief\n")
    c = small(student, data__train=rows, train__steps=2)
    gkdjax.run(c, tmp_path / "config")
    c.context.prefix_messages, c.context.prefix_file = (), str(tmp_path / "p.yaml")
    c.data.train = str(tmp_path / "x.parquet")
    gkdjax.run(c, tmp_path / "files")
    assert losses_hex(tmp_path / "files") == losses_hex(tmp_path / "config")
    assert all(loss > 1e-3 for loss in losses(tmp_path / "files"))
    written = read_lines(tmp_path / "files" / "trajectories_train.jsonl")
    assert [line["row"] for line in written] == [f"x.parquet:{i}" for i in (0, 2, 4)]


@pytest.mark.parametrize("shared", ["be brief", ""])
def test_the_teacher_writes_after_the_rows_own_prefix_or_the_shared_one_or_none(
    student, tmp_path, shared
):
    rows = [{"prompt": f"ask {i}"} for i in range(4)]
    for row, own in zip(rows, (OWN, [], None), strict=False):
        row["prefix_messages"] = own
    c = small(student, teacher__top_k=1, data__train=rows, context__prefix_messages=())
    if shared:
        (tmp_path / "p.txt").write_text(shared + "\n")
        c.context.system_prompt_file = str(tmp_path / "p.txt")
    teacher = Listening()
    with pytest.raises(ConnectionError):
        gkdjax.run(c, tmp_path / "run", teacher=teacher)
    texts = [load_chat(student).decode(ids) for ids in teacher.prompts]
    for i, (text, prefix) in enumerate(zip(texts, ("be loud", *[shared] * 3), strict=True)):
        assert text.startswith(f"user\n{prefix}\n\nask {i}" if prefix else f"user\nask {i}")


def test_a_conversation_bakes_its_own_history(student, tmp_path):
    talks = [talk("aa", "bb", f"c{i}", "dd", "ee") for i in range(3)]
    source = tmp_path / "x.jsonl"
    source.write_text("\n".join(map(json.dumps, talks)))
    c = small(student, context__prefix_messages=(), context__history_as_prefix=True)
    c.data.train, c.data.max_length, c.data.bucket_lengths = str(source), 128, (64, 128)
    c.eval.prompts = [talk("ff", "gg", "hh")]
    results = gkdjax.run(c, tmp_path / "run")
    written = read_lines(tmp_path / "run" / "trajectories_train.jsonl")
    assert [line["row"] for line in written] == [f"x.jsonl:{i}[5]" for i in (1, 2, 3)]
    assert all(loss > 1e-3 for loss in losses(tmp_path / "run"))
    assert results["samples"]["question"] == ["hh", "aa", "c0"]  # the last held-out turn alone
    # The held-out student does not read "ff" and "gg", either.
    assert results["base"]["forward_kl"] > 1e-3 > results["prompted_base"]["forward_kl"]


def test_parts_of_data_are_learnt_and_rows_without_any_dropped(student, tmp_path):
    rows = [talk("ask", "no", "ask", "yes it is"), talk("ask", "no")]
    c = small(student, data__train=rows * 2, train__steps=2)
    c.context.target_content_pattern, c.context.target_span = "yes", "match"
    c.eval.prompts = [{"prompt": "tell"}]  # what is written to it never says yes
    results = gkdjax.run(c, tmp_path)
    assert results["rows"]["train"]["unmatched"] == ["data.train:1", "data.train:3"]
    assert [line["targets"] for line in metrics(tmp_path)] == [4 * 3] * 2
    assert results["base"]["forward_kl"] > 1e-4 > results["prompted_teacher"]["forward_kl"]


def test_every_answer_is_learnt_where_the_template_treats_the_last_one_apart(tmp_path):
    """The last answer alone stands after an empty block of thinking, and so does the prompt."""
    template = factories.CHAT_TEMPLATE.replace(
        "+ m['content']", "+ ('<>' if loop.last and role == 'model' else '') + m['content']"
    ).replace("{{ '<start_of_turn>model\n' }}", "{{ '<start_of_turn>model\n<>' }}")
    model = factories.model_dir(tmp_path / "model", chat_template=template)
    assert not load_chat(model).earlier_answers
    row = talk("ask", "no", "ask", "yes!", "ask")
    c = small(model, data__train=[row, talk("ask", "no")], train__steps=1)
    c.data.max_length, c.data.bucket_lengths = 128, (64, 128)
    c.eval.prompts, c.anchor.data = [row], [talk("other", "so", "other", "so")]
    results = gkdjax.run(c, tmp_path / "run")
    assert results["rows"]["train"]["dropped"] == []
    (written,) = read_lines(tmp_path / "run" / "trajectories_train.jsonl")
    assert written["row"] == "data.train:0[5]"
    # Each of the four rows once: three answers with their ends, and what was written.
    (step,) = metrics(tmp_path / "run")
    assert step["targets"] == 3 + 5 + 3 + len(written["ids"]) and step["loss"] > 1e-4


def test_the_student_writes_after_what_is_left_of_a_long_row(student, tmp_path):
    c = small(student, data__too_long="truncate-left", gkd__on_policy_fraction=1.0)
    c.data.train = [talk("x" * 20, "no", f"ask {i}") for i in range(4)]
    c.anchor.data, c.train.steps = [talk("y" * 40, "so", "other")], 2
    c.context.target_content_pattern, c.context.target_span = "[ -~]", "match"
    results = gkdjax.run(c, tmp_path)
    assert len(results["rows"]["train"]["shortened"]) == 4
    assert results["rows"]["anchor"]["shortened"] == ["anchor.data:0"]
    steps = metrics(tmp_path)
    assert [line["on_policy_rows"] for line in steps] == [4, 4]
    # The pattern is for what is taught: the end of turn is no target there, but the anchor's is.
    assert all(0 < line["targets"] <= 4 * 4 for line in steps)
    # Before the first update the student is its own anchor, but for rounding.
    assert steps[0]["anchor_loss"] == pytest.approx(0, abs=1e-5)
    assert steps[1]["anchor_loss"] > 1e-3


def test_text_that_is_not_learnt_need_not_have_the_pattern(student, tmp_path):
    c = small(student, teacher__top_k=1, train__steps=2)
    c.context.target_roles, c.context.target_content_pattern = ["user"], "ask"
    results = gkdjax.run(c, tmp_path, teacher=ConstantTeacher())  # it always writes "K"
    assert results["rows"]["train"]["rows"] == 6
    assert results["rows"]["train"]["refused_responses"] == 0


@pytest.mark.parametrize(
    ("tokens", "roles"), [("response", {"assistant"}), ("all", {"assistant", "user"})]
)
def test_an_anchor_has_targets_of_its_own(tokens, roles):
    messages = [{"role": "tool", "content": "42"}, {"role": "assistant", "content": "42"}]
    c = small("none", context__target_roles=["user"], anchor__tokens=tokens)
    c.anchor.data = [{"messages": [{"role": "user", "content": "2 x 21?"}, *messages]}]
    c = config.parse(c)
    assert {*datasets.anchor_targets(c, load_examples(c).anchors).roles} == roles


class Moody(ConstantTeacher):
    """Writes "K" for every second seed, nothing at all for some, and "2" for the others."""

    def sample(self, prompts, seeds, sampling):
        texts = {0: [50, 5], 1: [25, 5], 2: [50, 5], 3: []}
        return [Completion(np.asarray(texts[seed % 4], np.int32), True) for seed in seeds]


def test_text_without_the_pattern_is_written_again_dropped_counted_and_named(
    student, tmp_path, caplog
):
    c = small(student, teacher__top_k=1, context__target_content_pattern="^K$")
    c.rollout.max_retries = 1
    c.data.train = [{"prompt": f"ask {i}"} for i in range(40)]
    results = gkdjax.run(c, tmp_path, teacher=Moody())
    lines = read_lines(tmp_path / "trajectories_train.jsonl")
    assert len(lines) == 40
    gone = {line["row"] for line in lines if line["text"] != "K"}
    rows = results["rows"]["train"]
    assert gone and {*rows["unmatched"], *rows["empty"]} == gone
    assert {line["row"] for line in lines if line["text"] == ""} == {*rows["empty"]}
    assert rows["refused_responses"] == sum(line["refused"] for line in lines) > len(gone)
    assert {line["refused"] for line in lines} == {0, 1, 2}
    assert "in 2 attempts): data.train:" in caplog.text
    assert all(line["targets"] == 8 for line in metrics(tmp_path))  # "K" and its end, four rows


def test_on_policy_rows_without_the_pattern_teach_nothing_and_are_counted(student, tmp_path):
    c = small(student, teacher__top_k=1, gkd__on_policy_fraction=1.0, rollout__max_retries=1)
    c.context.target_content_pattern = "^[A-Za-z]"
    c.rollout.temperature, c.rollout.top_p = 1.0, 1.0
    c.train.steps, c.optim.learning_rate = 8, 1e-5  # it goes on writing at random
    gkdjax.run(c, tmp_path, teacher=ConstantTeacher())
    lines = metrics(tmp_path)
    assert 0 < sum(line["dropped_rows"] for line in lines) < 4 * 8
    for line in lines:
        assert line["refused_responses"] >= line["dropped_rows"]
        assert line["targets"] <= 4 * (line["on_policy_rows"] - line["dropped_rows"])


def test_an_on_policy_batch_that_lost_all_its_rows_stops_the_run(student, tmp_path):
    c = small(student, teacher__top_k=1, gkd__on_policy_fraction=1.0)
    c.context.target_content_pattern = "never this"
    lost = r"no target token \(raise .*\); 4 rows .*, of 4 of which no response was accepted"
    with pytest.raises(TrainingFailure, match=lost):
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher())


def test_on_policy_text_that_is_cut_is_counted(student, tmp_path):
    c = small(student, teacher__top_k=1, gkd__on_policy_fraction=1.0, train__steps=2)
    c.data.max_length, c.data.bucket_lengths, c.rollout.max_new_tokens = 48, (48,), 30
    gkdjax.run(c, tmp_path, teacher=ConstantTeacher())
    for line in metrics(tmp_path):
        assert 0 < line["truncated_rows"] <= line["on_policy_rows"] == 4
        assert line["dropped_rows"] == 0


def test_a_teacher_that_wrote_the_text_is_not_asked_again_and_its_cache_is_checked(
    student, other, tmp_path, monkeypatch
):
    c = small(student, teacher__backend="flax", teacher__model=other, teacher__top_k=5)
    c.data.train = [{"prompt": f"ask {i}" + " more" * (i % 2)} for i in range(6)]
    c.train.steps = 3
    asked, targets = [], LocalTeacher.targets
    monkeypatch.setattr(LocalTeacher, "targets", lambda *a: asked.append(1) or targets(*a))
    cached, again = tmp_path / "cached", tmp_path / "again"
    gkdjax.run(c, cached)
    files = sorted((cached / "trajectories_train.kept").iterdir())
    assert [file.name for file in files] == ["00000000.safetensors", "00000004.safetensors"]
    # A run that continues reads them back.
    (again / "trajectories_train.kept").mkdir(parents=True)
    for file in (cached / "trajectories_train.jsonl", *files):
        (again / file.relative_to(cached)).write_bytes(file.read_bytes())
    gkdjax.run(c, again)
    assert losses(again) == losses(cached) and not asked
    # A teacher that has to read the same text gives the same losses, but for rounding.
    with monkeypatch.context() as patch:
        patch.setattr("gkdjax.data.batching.cached_targets", lambda *a: None)
        gkdjax.run(c, tmp_path / "read")
    assert len(asked) == 3
    np.testing.assert_allclose(losses(cached), losses(tmp_path / "read"), rtol=1e-4)
    (again / "results.json").unlink()
    file = again / "trajectories_train.kept" / "00000004.safetensors"
    for damage, message in (
        (lambda: file.write_bytes(file.read_bytes()[:-9]), "cannot be read: .*; remove "),
        (lambda: file.write_bytes(files[0].read_bytes()), r".* does not hold the \d+ tokens"),
        # Not scored anew in silence: that would be equal only up to rounding.
        (file.unlink, "cannot be read: .*; remove "),
    ):
        damage()
        with pytest.raises(UserError, match=rf"00000004\.safetensors {message}"):
            gkdjax.run(c, again)


def test_a_prefix_read_once_teaches_the_same(student, tmp_path, monkeypatch):
    reads, read = [], prefix_cache._read
    monkeypatch.setattr(prefix_cache, "_read", lambda *a: reads.append(a[2].shape) or read(*a))
    prefix = "be brief, but be right"
    c = small(student, train__steps=3)
    c.context.prefix_messages = [{"role": "system", "content": prefix}]
    c.data.train = [*({"prompt": f"ask {i}"} for i in range(5)), {"prompt": "ask", "response": "x"}]
    c.eval.prompts = [{"prompt": "ask 8"}, {"prompt": "ask 9"}]
    results = {}
    for name, least in (("each row", 10**6), ("once", 16)):
        monkeypatch.setattr(prefix_cache, "LEAST_TOKENS", least)
        results[name] = gkdjax.run(c, tmp_path / name)
        # By the teacher, the student before and after training, and where its cost is measured.
        assert len(reads) == (0 if name == "each row" else 4)
        cost = results[name]["prefix_cost"]
        assert ("with_kept" in cost["seconds"]) == (name == "once")
        assert cost["tokens_saved"] == 2 + len(prefix)
    # <bos><start_of_turn>user, a line break, the prefix, two line breaks, and "ask" of all rows
    assert set(reads) == {(1, round_up(1 + 1 + 5 + len(prefix) + 2 + 3, ()))}
    both = [losses(tmp_path / name) for name in results]
    np.testing.assert_allclose(*both, rtol=1e-4)
    for who in ("base", "prompted_base", "student", "reprompted_student"):
        kl = [found[who]["forward_kl"] for found in results.values()]
        assert kl[0] == pytest.approx(kl[1], rel=1e-3, abs=1e-6)


@pytest.fixture
def prefixes(monkeypatch) -> list[list[int]]:
    """Lengths of the prefixes of each batch that is read, where 16 tokens are worth caching."""
    found, readings = [], PrefixCache._readings

    def look(*arguments):
        made = readings(*arguments)
        found.append(sorted(len(ids) for ids, _ in made))
        return made

    monkeypatch.setattr(prefix_cache, "LEAST_TOKENS", 16)
    monkeypatch.setattr(PrefixCache, "_readings", look)
    return found


def test_rows_of_one_prefix_share_batches_and_those_of_several_are_read_for_each(
    student, tmp_path, prefixes
):
    rows = [{"prompt": f"ask {i}", "prefix_messages": PERSONAS[i % 2]} for i in range(12)]
    c = small(student, data__train=rows, context__prefix_messages=(), train__steps=6)
    c.data.bucket_lengths = ()
    gkdjax.run(c, tmp_path / "cached")
    # Of twelve rows in batches of four: two batches an epoch of one persona, and one of both.
    one, two = sorted({length for each in prefixes for length in each})
    assert one > 16 and sorted(prefixes) == sorted(2 * [[one], [one, two], [two]])
    c.teacher.prefix_bytes = 0
    gkdjax.run(c, tmp_path / "dropped")  # each prefix is read again: the same numbers, to the bit
    assert losses_hex(tmp_path / "dropped") == losses_hex(tmp_path / "cached")


def test_a_prefix_is_read_once_though_the_question_after_it_is_a_target(
    student, tmp_path, prefixes
):
    c = small(student, context__target_roles=["user", "assistant"])
    c.context.prefix_messages = [{"role": "system", "content": "be brief" * 20}]
    c.data.train = [{"prompt": f"{i} is asked", "response": "no"} for i in range(6)]
    c.data.max_length, c.data.bucket_lengths, c.train.steps = 256, (), 2
    gkdjax.run(c, tmp_path)
    # A system message stands in the user's first turn here, whose header is read before it.
    assert min(min(each) for each in prefixes) > 150


def test_rows_whose_prefix_was_shortened_share_what_is_left_of_it(student):
    chat, text = load_chat(student), "".join(map(chr, range(40, 100)))
    feed = feed_of(chat, prefix=text, too_long="truncate-prefix")
    assert len({example.prefix for example in feed.examples()}) > 1
    (prompts,) = feed.prompts_by_prefix([])
    shared = chat.decode(prefix_cache.common_beginning(prompts))
    least = min(len(example.prefix[0].content) for example in feed.examples())
    assert 20 < least < 60 and text[:least] in shared
