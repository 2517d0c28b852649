"""What a run found: the content of results.json, and the tables that show it."""

import json

import made_up_runs as made
import pytest
import scipy.stats

from gkdjax import report
from gkdjax.report import results, tables, terminal
from gkdjax.report.tables import Table

ROW = {"train": {"rows": 8, "refused_responses": 0, "padding": {}, "dropped": []}}


def shown(found: dict | None = None) -> dict[str, dict[str, dict[str, str]]]:
    """Title -> row -> column -> cell."""
    return {
        table.title: {
            row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows
        }
        for table in tables.tables(made.full_results() if found is None else found)
    }


def test_a_finished_run_has_what_its_parts_say():
    before, after, lines = made.before(), made.after(), [made.full_evaluation(s) for s in (0, 5, 9)]
    training = made.training(made.three_phases(6))
    found = report.collect(before, lines, after, ROW, training)
    wanted = {name: (before | after)[name] for name in made.CONDITIONS}
    wanted |= {name: before[name] for name in ("task", "unavailable", "counts")}
    wanted |= {name: after[name] for name in ("side_effects", "prefix_cost")}
    wanted |= {"held_out": {"before": lines[0], "after": lines[-1]}, "rows": ROW, **training}
    wanted["samples"] = before["samples"] | after["samples"]
    wanted["retention"] = {
        "sort": {"before": 0.99, "after": 0.98},
        "reverse": {"before": 0.5, "after": 0.53},
    }
    wanted["recovery"] = (0.962 - 0.031) / (0.984 - 0.031)
    wanted["heldout_recovery"] = (0.953 - 0.027) / (0.98 - 0.027)
    assert wanted | {"versions": found["versions"]} == found
    assert found["versions"]["python"].startswith("3.") and found["versions"]["jax"]
    assert json.loads(json.dumps(found)) == found
    assert results.training(made.three_phases(9)) == {
        **{"steps": 9, "tokens": 180, "on_policy_steps": 3, "compilations": 1},
        "loss": made.three_phases(9)[-1]["loss"],
    }


def test_so_far_has_what_was_asked_before_training():
    lines = [made.full_evaluation(s) for s in (0, 5)]
    found = results.so_far(made.before(), lines)
    assert found["base"] == made.condition(0) and found["task"] == made.TASK
    assert found["held_out"] == {"before": lines[0], "after": lines[1]}
    assert not {"student", "recovery", "retention", "abilities"} & found.keys()
    assert results.so_far({}, []) == {}


def test_recovery_is_not_defined_where_the_prefix_changes_nothing():
    before = made.before()
    before["prompted_teacher"]["accuracy"] = before["base"]["accuracy"]
    found = report.collect(before, [], made.after(), ROW, {})
    assert found["recovery"] is None and found["heldout_recovery"] > 0.9
    assert shown(found)["Recovery of the prefix"] == {
        "questions": {"recovery": "not defined"},
        "held-out questions": {"recovery": "0.972"},
    }


def test_what_was_not_measured_has_no_table_no_column_or_a_dash(tmp_path):
    before, after = made.before(), made.after()
    for who in made.CONDITIONS:
        del (before | after)[who]["accuracy"], (before | after)[who]["heldout_accuracy"]
    found = report.collect(before, [], after, ROW, {})
    assert not {"recovery", "heldout_recovery", "held_out"} & found.keys()
    assert not {"Right answers", "Recovery of the prefix"} & shown(found).keys()
    found = made.full_results(student={"accuracy": 0.5}, prompted_teacher={"perplexity": 2.0})
    of = shown(found)
    assert of["Right answers"]["student"]["held-out"] == "-"
    assert of["Right answers"]["prompted teacher"]["accuracy"] == "-"
    assert "student" not in of["Distance to the prompted teacher"]
    assert of["Distance to the prompted teacher"]["prompted teacher"]["forward KL"] == "-"
    found |= {who: {"accuracy": 0.5} for who in made.CONDITIONS} | {"side_effects": {}}
    assert "held-out" not in shown(found)["Right answers"]["base"]
    # Nothing at all
    samples = {"question": ["Why?"], "base": ["So."]}
    before = {"abilities": {}, "samples": samples, "task": {}, "unavailable": {}, "counts": {}}
    after = {"abilities": {}, "samples": {"student": ["Thus."]}}
    training = {"steps": 3, "tokens": 50, "loss": 0.5, "seconds": 2.0, "exports": []}
    found = report.collect(before, [], after, ROW, training)
    assert list(shown(found)) == ["Training", "Rows"]
    assert "Why?\n  base: So.\n  student: Thus.\n" in report.render(found, tmp_path)


def test_the_tables_of_a_run_that_measured_all():
    of = shown()
    assert list(of["Right answers"]) == [name.replace("_", " ") for name in made.CONDITIONS]
    assert of["Right answers"]["student"] == {
        "who answers": "student, trained",
        "what it reads": "the student's view",
        "accuracy": "96.2% [94.2, 97.5]",
        "held-out": "95.3% [92.0, 97.3]",
    }
    assert of["Right answers"]["prompted teacher"]["who answers"] == "teacher"
    assert (
        of["Right answers"]["student other prefix"]["what it reads"] == "another prefix and turns"
    )
    assert of["Distance to the prompted teacher"]["base"] == {
        **{"forward KL": "0.9000", "reverse KL": "0.4500", "top-1 agreement": "95.50%"},
        **{"acceptance rate": "96.25%", "perplexity": "3.70"},
    }
    assert of["Before and after training"]["forward KL"] == {
        **{"teacher's text, before": "0.9000", "teacher's text, after": "0.0692"},
        **{"student's text, before": "0.6750", "student's text, after": "0.0675"},
    }
    assert [*of["Before and after training"]] == [
        label for key, (label, _) in tables._MEASURES.items() if key in made.MEASURES
    ]
    assert of["Validation"]["loss"] == {
        "validation, before": "1.1000",
        "validation, after": "0.1000",
    }
    (table,) = (t for t in tables.tables(made.full_results()) if t.title == "Validation")
    assert table.note.endswith("Before: step 0; after: step 60")
    assert of["Kept abilities"]["reverse"] == {
        **{"before": "50.0% [38.1, 61.9]", "after": "53.0% [41.0, 64.7]", "change": "+3.0%"},
    }
    assert of["Side effects"]["forward KL"] == {"value": "0.0600"}
    assert not [name for name in of["Side effects"] if "mass" in name]  # no teacher is in it
    assert of["Cost of the prefix"] == {
        "tokens saved a prompt": {"value": "1,041.2"},
        "seconds without it": {"value": "0.800"},
        "seconds with it": {"value": "2.000 (2.50x)"},
        "seconds with it, kept in memory": {"value": "1.000 (1.25x)"},
    }
    assert of["Training"]["on-policy steps"] == {"value": "20"}
    assert of["Rows"]["train"] == {
        **{"trained": "2000", "lost or cut": "1 dropped", "refused responses": "3"},
        "padding of the views": "60%, 30%",
    }
    assert of["Rows"]["anchor chat"]["lost or cut"] == "-"
    assert of["The teacher at its server"]["requests"] == {"value": "1,234"}


def test_parts_of_a_table_that_are_not_known():
    found = made.full_results(counts={"questions": 100, "sort": 0}, rows=ROW)
    del found["prefix_cost"]["seconds"]["with_kept"], found["teacher"]
    of = shown(found)
    # An interval only where the number of answers is known.
    assert of["Right answers"]["student"]["accuracy"] == "96.2% [90.4, 98.5]"
    assert of["Right answers"]["student"]["held-out"] == "95.3%"
    assert of["Kept abilities"]["sort"]["before"] == "99.0%"
    assert len(of["Cost of the prefix"]) == 3 and "The teacher at its server" not in of
    assert of["Rows"]["train"]["padding of the views"] == "-"
    # A text that one end lacks
    ends = made.evaluation(0, texts=("teacher_text",)), made.evaluation(9)
    of = shown(results.so_far({}, ends))
    assert list(of) == ["Before and after training"]
    assert list(of["Before and after training"]["perplexity"]) == [
        "teacher's text, before",
        "teacher's text, after",
    ]


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (50, 100), (1, 2000), (1, 1)])
def test_wilsons_interval(right, count):
    wanted = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert tables.wilson(right / count, count) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_every_number_has_a_name_of_its_own():
    found = list(tables.cells(tables.tables(made.full_results())))
    assert len(dict(found)) == len(found)
    assert dict(found)["Right answers", "student, accuracy"] == "96.2% [94.2, 97.5]"
    assert dict(found)["Side effects", "forward KL"] == "0.0600"
    assert not [title for (title, _), _ in found if title == "Not measured, and why"]
    assert not [cell for _, cell in found if cell in ("teacher", "prefix and turns")]


def test_the_terminal_shows_every_table_within_120_columns(tmp_path):
    found = made.full_results()
    text = report.render(found, tmp_path)
    assert max(map(len, text.splitlines()[:-1])) <= 120
    for each in tables.tables(found):
        assert f"\n{each.title}\n" in f"\n{text}"
        for cell in (cell for row in each.rows for cell in row):
            assert " ".join(cell.split()) in " ".join(text.split())
    for question in made.QUESTIONS:
        assert f"\n{question}\n  base: base thinks" in text
    written = "results.json, metrics.jsonl, report.png, report.html, merged/"
    assert text.endswith(f"{tmp_path}: {written}")


def test_a_long_reason_is_wrapped_and_a_very_long_answer_cut():
    text = terminal.as_text(Table("Title", (), [("measure", "because " * 40)], prose=True))
    assert text.count("because") == 40 and max(map(len, text.splitlines())) <= 110
    text = terminal.as_text(Table("Title", (), [("student", "long\n\n" * 500)], prose=True))
    assert text.count("long") == 80 and "(2,499 characters in all)" in " ".join(text.split())


def test_text_of_models_cannot_steer_a_terminal(tmp_path):
    found = made.full_results()
    found["samples"]["student"] = ["\x1b[2J\x00done\ud800", "right\u202eleft", "tab\there"]
    found["samples"]["question"][0] = "\x1b]0;title\x07?"
    found["unavailable"] = {"measure\x1b": "why\x9b"}
    text = report.render(found, tmp_path)
    text.encode("utf-8")
    assert r"\x1b[2J\x00done\ud800" in text and r"right\u202eleft" in text
    assert r"\x1b]0;title\x07?" in text and r"measure\x1b: why\x9b" in text
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
