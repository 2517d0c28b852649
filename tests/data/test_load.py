"""Which rows are trained, held back and asked, and which sets must not meet."""

import contextlib
import logging
import shutil

import pytest
from small_runs import PREFIX, small

from gkdjax import config
from gkdjax.data import load
from gkdjax.train import setup
from gkdjax.utils.errors import UserError

OTHER = [{"role": "system", "content": "be long"}]


def read(**changes):
    return load.load_examples(config.parse(small("student", **changes)))


def rows(*prompts, **more):
    return [{"prompt": prompt, **more} for prompt in prompts]


def asked(examples) -> list[str]:
    return [example.turns[-1].content for example in examples]


def test_a_share_of_the_rows_is_taken_out_for_validation_and_stays_the_same():
    whole = asked(read().train)
    found = [read(data__validation=0.34, train__seed=seed) for seed in (0, 1)]
    for examples in found:
        assert len(examples.validation) == 2
        assert sorted(asked(examples.train) + asked(examples.validation)) == sorted(whole)
        assert asked(examples.train) == [p for p in whole if p in asked(examples.train)]
        assert {e.prefix[0].content for e in examples.validation} == {"be brief"}
    # Whatever the seed: so that runs can be compared.
    assert asked(found[0].validation) == asked(found[1].validation)
    for share in (0.01, 0.99):  # each side has a row
        examples = read(data__validation=share)
        assert min(len(examples.train), len(examples.validation)) == 1


def test_a_conversation_is_not_divided_between_training_and_validation():
    roles = ("user", "assistant") * 2
    talks = [[{"role": r, "content": f"{i}{j}"} for j, r in enumerate(roles)] for i in range(6)]
    history = {"context__prefix_messages": (), "context__history_as_prefix": True}
    train = [{"messages": talk} for talk in talks]
    examples = read(data__train=train, data__validation=0.5, **history)
    of_train, of_validation = (
        {row.turns[0].content[0] for row in side} for side in (examples.train, examples.validation)
    )
    assert len(of_train) == len(of_validation) == 3 and not of_train & of_validation
    assert len(examples.validation) == 6  # two turns each, with their history


def test_validation_rows_that_are_trained_are_named(caplog):
    caplog.set_level(logging.WARNING, "absl")
    read(data__validation=rows("new"))
    assert caplog.text == ""
    examples = read(data__validation=rows("ask 3", "new"))
    assert "data.validation: 1 rows ask what a row of data.train asks" in caplog.text
    assert "data.validation:0" in caplog.text
    assert asked(examples.validation) == ["ask 3", "new"]


ASKED_UNDER_IT = {"messages": [*PREFIX, {"role": "user", "content": "q"}], "answer": "x"}
TALK = {"messages": [{"role": r, "content": r} for r in ("user", "tool", "assistant")]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"data__train": rows("one"), "data__validation": 0.5},
            r"data\.validation = 0\.5: data\.train has a single row",
        ),
        ({"eval__questions": rows("q")}, r"eval\.questions:0: .* needs an 'answer'.*eval\.prompts"),
        ({"eval__heldout": rows("q")}, r"eval\.heldout:0: .* needs an 'answer'"),
        ({"eval__retention": {"sort": rows("q")}}, r"eval\.retention\.sort:0: .* an 'answer'"),
        (
            {"eval__heldout": rows("new", "ask 2", answer="x")},
            r"eval\.heldout:1: .* is a row of data\.train as well \(data\.train:2\)",
        ),
        (
            {name: rows("q", answer="x") for name in ("eval__questions", "eval__heldout")},
            r"eval\.heldout:0: .* is a row of eval\.questions as well \(eval\.questions:0\)",
        ),
        (
            {"eval__retention": {"sort": rows("q", answer="x", prefix_messages=PREFIX)}},
            r"eval\.retention\.sort:0: a question of a retention set carries the prefix",
        ),
        (
            {"eval__retention": {"sort": [ASKED_UNDER_IT]}},
            r"eval\.retention\.sort:0: a question of a retention set carries the prefix",
        ),
        (
            {"eval__retention": {"sort": rows("ask 1", answer="x")}},
            r"eval\.retention\.sort:0: .* is a row of data\.train as well",
        ),
        (
            {"eval__side_effects": rows("q", prefix_messages=PREFIX)},
            r"eval\.side_effects:0: a prompt for side effects carries the prefix",
        ),
        (  # the prefix of a single row is baked too
            {
                "data__train": [*rows("a", prefix_messages=OTHER), *rows("b")],
                "eval__retention": {"sort": rows("q", answer="x", prefix_messages=OTHER)},
            },
            "carries the prefix that is being baked",
        ),
        *(
            ({"context__target_roles": (role,)}, rf"names '{role}', which rows are read as 'assis")
            for role in ("gpt", "model", "Assistant")
        ),
        (
            {"data__train": [TALK], "context__target_roles": ("assistant", "tool")},
            r"target_roles names 'tool': results of tools are never",
        ),
    ],
)
def test_sets_that_do_not_show_what_they_are_for_are_refused(changes, expected):
    with pytest.raises(UserError, match=expected):
        read(**changes)


def test_sets_that_are_not_named_are_taken_from_others():
    retention = {
        "a": rows("a 0", "a 1", "a 2", answer="y", prefix_messages=OTHER),
        "b": rows("b 0", answer="y"),
    }
    examples = read(eval__questions=rows("q", answer="x"), eval__retention=retention)
    assert examples.prompts is examples.questions
    assert asked(examples.side_effects) == ["a 0", "b 0", "a 1", "a 2"]  # of every set in turn
    assert [turn.content for turn in examples.side_effects[0].turns] == ["be long", "a 0"]
    assert examples.retention["a"][0].prefix == ()
    examples = read(eval__prompts=rows("p"), eval__side_effects=rows("s"))
    assert (asked(examples.prompts), asked(examples.side_effects)) == (["p"], ["s"])
    assert examples.prompts[0].expected is None


def test_runs_are_comparable_by_what_is_asked_and_not_by_where_it_stands(tmp_path):
    def task(**changes):
        return load.fingerprints(read(**{"eval__questions": rows("q", answer="x")} | changes))

    (tmp_path / "q.json").write_text('[{"prompt": "q", "answer": "x"}]')
    here = task()
    assert here == task(eval__questions=str(tmp_path / "q.json"))
    assert set(here) == {"questions"} and here["questions"]["rows"] == 1
    for changes in (
        {"eval__questions": rows("q", answer="z")},
        {"eval__questions": rows("q", answer="x", match="exact")},
        {"eval__questions": rows("other", answer="x")},
        {"context__prefix_messages": OTHER},
    ):
        assert task(**changes) != here
    more = task(eval__retention={"sort": rows("r", answer="y")})
    assert set(more) == {"questions", "retention.sort"}
    other = {"eval__prompts": rows("p"), "eval__side_effects": rows("s"), "eval__questions": None}
    names = {"prompts", "side_effects", "validation"}
    assert set(task(**other, data__validation=rows("v"))) == names


@pytest.fixture
def rendered(tmp_path):
    """rendered(changes) -> the inputs of a run whose chat template does not take "no"."""
    student = tmp_path / "student"
    shutil.copytree(config.ASSETS / "quickstart/student", student)
    with (student / "chat_template.jinja").open("a") as template:
        template.write("{% for m in messages if 'no' in m.content %}")
        template.write("{{ raise_exception('not that') }}{% endfor %}")

    def read(**changes):
        parsed = config.parse(small(str(student), **changes))
        with contextlib.ExitStack() as connections:
            return setup.read(parsed, tmp_path, None, connections)

    return read


def test_rows_that_cannot_be_read_or_rendered_are_named_before_anything_is_written(rendered):
    weightless = {"role": "assistant", "content": "yo", "weight": 0}
    sets = {
        "data__train": [
            *rows("no", "fine", "no"),
            *rows("fine", response="no"),
            {"messages": [{"role": "user", "content": "hi"}, weightless]},
            *rows("good", response="yo"),
        ],
        "data__validation": rows("v", "no v"),
        "eval__questions": rows("q", "no q", answer="x"),
        "eval__retention": {"sort": rows("r", "no r", answer="x")},
        "anchor__data": rows("a", "no a"),
    }
    with pytest.raises(
        UserError, match=r"^eval\.questions:1, .* not that.*; data\.bad_rows='drop'"
    ):
        rendered(**sets)
    with pytest.raises(UserError) as caught:
        rendered(data__train=sets["data__train"])
    told = str(caught.value)
    assert told.startswith("data.train: 4 rows cannot be used; data.bad_rows='drop' would")
    assert told.count("not that") == 2 and "data.train:0, " in told and "1 more: data.tra" in told
    assert "data.train:4: no target tokens: it has no message of" in told and "'weight': 0" in told
    sets["data__train"] += rows("")  # cannot be read
    found = rendered(data__bad_rows="drop", **sets)
    dropped = {"data.train": [f"data.train:{i}" for i in (6, 0, 2, 3, 4)]}
    assert found.dataset.report()["unusable"] == dropped["data.train"]
    for key in ("data.validation", "eval.questions", "eval.retention.sort", "anchor.data"):
        dropped[key] = [f"{key}:1"]
    assert found.examples.dropped == dropped
    assert asked(found.examples.train) == ["fine", "good"]
    assert asked(found.examples.questions) == asked(found.examples.prompts) == ["q"]
    assert asked(found.examples.side_effects) == ["r"]
