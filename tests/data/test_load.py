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


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_each_side_of_the_share_has_a_row(share):
    examples = read(data__validation=share)
    assert min(len(examples.train), len(examples.validation)) == 1


def test_a_conversation_is_not_divided_between_training_and_validation():
    talks = [
        {
            "messages": [
                {"role": r, "content": f"{i}{j}"} for j, r in enumerate(("user", "assistant") * 2)
            ]
        }
        for i in range(6)
    ]
    examples = read(
        data__train=talks,
        data__validation=0.5,
        context__prefix_messages=(),
        context__history_as_prefix=True,
    )
    of_train, of_validation = (
        {row.turns[0].content[0] for row in side} for side in (examples.train, examples.validation)
    )
    assert len(of_train) == len(of_validation) == 3 and not of_train & of_validation
    assert len(examples.validation) == 6  # two turns each, with their history


def test_validation_rows_that_are_trained_are_told(caplog):
    caplog.set_level(logging.WARNING, "absl")
    read(data__validation=rows("new"))
    assert caplog.text == ""
    examples = read(data__validation=rows("ask 3", "new"))
    assert "data.validation: 1 rows ask what a row of data.train asks" in caplog.text
    assert "data.validation:0" in caplog.text
    assert asked(examples.validation) == ["ask 3", "new"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"data__train": rows("one"), "data__validation": 0.5},
            r"data\.validation = 0\.5: data\.train has a single row",
        ),
        ({"eval__questions": rows("q")}, r"eval\.questions:0: .* needs an 'answer'.*eval\.prompts"),
        ({"eval__heldout": rows("q")}, r"eval\.heldout:0: .* needs an 'answer'"),
        (
            {"eval__retention": {"sort": rows("q")}},
            r"eval\.retention\.sort:0: .* needs an 'answer'",
        ),
        (
            {"eval__heldout": rows("new", "ask 2", answer="x")},
            r"eval\.heldout:1: .* is a row of data\.train as well \(data\.train:2\)",
        ),
        (
            {
                "eval__questions": rows("q", answer="x"),
                "eval__heldout": rows("q", answer="y"),
            },
            r"eval\.heldout:0: .* is a row of eval\.questions as well \(eval\.questions:0\)",
        ),
        (
            {"eval__retention": {"sort": rows("q", answer="x", prefix_messages=PREFIX)}},
            r"eval\.retention\.sort:0: a question of a retention set carries the prefix",
        ),
        (
            {
                "eval__retention": {
                    "sort": [
                        {"messages": [*PREFIX, {"role": "user", "content": "q"}], "answer": "x"}
                    ]
                }
            },
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
    ],
)
def test_sets_that_do_not_measure_what_they_are_for_are_refused(changes, told):
    with pytest.raises(UserError, match=told):
        read(**changes)


def test_the_prefix_of_a_single_row_is_baked_too():
    trained = [{"prompt": "a", "prefix_messages": OTHER}, {"prompt": "b"}]
    retention = {"sort": rows("q", answer="x", prefix_messages=OTHER)}
    assert read(eval__retention=retention).retention["sort"][0].prefix == ()
    with pytest.raises(UserError, match="carries the prefix that is being baked"):
        read(data__train=trained, eval__retention=retention)


def test_what_is_not_named_is_taken_from_what_is():
    questions, retention = rows("q", answer="x"), rows("r", answer="y", prefix_messages=OTHER)
    examples = read(eval__questions=questions, eval__retention={"sort": retention})
    assert examples.prompts is examples.questions
    assert asked(examples.side_effects) == ["r"]
    assert [turn.content for turn in examples.side_effects[0].turns] == ["be long", "r"]
    examples = read(eval__prompts=rows("p"), eval__side_effects=rows("s"))
    assert (asked(examples.prompts), asked(examples.side_effects)) == (["p"], ["s"])
    assert examples.prompts[0].expected is None


def test_the_first_prompts_for_side_effects_are_of_every_retention_set():
    sets = {
        name: rows(*(f"{name} {i}" for i in range(n)), answer="x")
        for name, n in (("a", 3), ("b", 1))
    }
    examples = read(eval__retention=sets)
    assert asked(examples.side_effects) == ["a 0", "b 0", "a 1", "a 2"]


def test_runs_are_comparable_by_what_is_asked_and_not_by_where_it_stands(tmp_path):
    def task(**changes):
        return load.fingerprints(read(**changes))

    (tmp_path / "q.json").write_text('[{"prompt": "q", "answer": "x"}]')
    here, there = (
        task(eval__questions=q) for q in (rows("q", answer="x"), str(tmp_path / "q.json"))
    )
    assert here == there and here["questions"]["rows"] == 1
    assert set(here) == {"questions"}
    for changes in (
        {"eval__questions": rows("q", answer="z")},
        {"eval__questions": rows("q", answer="x", match="exact")},
        {"eval__questions": rows("other", answer="x")},
        {"context__prefix_messages": OTHER},
    ):
        assert task(**{"eval__questions": rows("q", answer="x")} | changes) != here
    more = task(
        eval__questions=rows("q", answer="x"), eval__retention={"sort": rows("r", answer="y")}
    )
    assert set(more) == {"questions", "retention.sort"}
    other = {"eval__prompts": rows("p"), "eval__side_effects": rows("s")}
    assert set(task(**other, data__validation=rows("v"))) == {
        *("prompts", "side_effects", "validation")
    }


@pytest.fixture
def rendered(tmp_path):
    """rendered(changes) -> the Rows of a run whose chat template does not take "no"."""
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


def test_rows_that_cannot_be_rendered_are_told_before_anything_is_written(rendered):
    weightless = {"role": "assistant", "content": "yo", "weight": 0}
    sets = {
        "data__train": [
            *rows("no", "fine", "no"),
            *rows("fine", response="no"),
            {"messages": [{"role": "user", "content": "hi"}, weightless]},
            *rows("good", response="yo"),
        ],
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
    found = rendered(data__bad_rows="drop", **sets)
    dropped = [f"data.train:{i}" for i in (0, 2, 3, 4)]
    assert found.dataset.report()["unusable"] == dropped
    assert found.examples.dropped == {
        "data.train": dropped,
        **{key: [f"{key}:1"] for key in ("eval.questions", "eval.retention.sort", "anchor.data")},
    }
    assert asked(found.examples.train) == ["fine", "good"]
    assert asked(found.examples.questions) == asked(found.examples.prompts) == ["q"]
    assert asked(found.examples.side_effects) == ["r"]


@pytest.mark.parametrize("role", ["gpt", "model", "Assistant"])
def test_a_role_to_be_trained_has_the_name_that_rows_are_read_with(role):
    talk = [{"from": "human", "value": "hi"}, {"from": role, "value": "yo"}]
    with pytest.raises(UserError, match=rf"names '{role}', which rows are read as 'assistant': wr"):
        read(data__train=[{"messages": talk}], context__target_roles=("assistant", role))


def test_the_roles_of_tools_are_never_learnt():
    talk = [{"role": role, "content": role} for role in ("user", "tool", "assistant")]
    with pytest.raises(UserError, match=r"target_roles names 'tool': results of tools are never"):
        read(data__train=[{"messages": talk}], context__target_roles=("assistant", "tool"))
    assert [turn.role for turn in read(data__train=[{"messages": talk}]).train[0].turns] == [
        *("user", "tool")
    ]


def test_empty_rows_are_dropped_of_every_set_if_wanted():
    sets = {
        "data__train": rows("a", ""),
        "data__validation": rows("", "b"),
        "eval__questions": rows("q", "", answer="x"),
    }
    with pytest.raises(UserError, match=r"^data\.train:1: prompt is empty; data\.bad_rows='drop'"):
        read(**sets)
    examples = read(data__bad_rows="drop", **sets)
    assert examples.dropped == {
        "data.train": ["data.train:1"],
        "data.validation": ["data.validation:0"],
        "eval.questions": ["eval.questions:1"],
    }
    assert asked(examples.train) + asked(examples.questions) == ["a", "q"]
