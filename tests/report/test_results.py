"""What a run found: the content of results.json, and the tables that show it."""

import json

import made_up_runs as made
import pytest
import scipy.stats

from gkdjax import report
from gkdjax.report import results, tables, terminal
from gkdjax.report.tables import Table
from gkdjax.utils import text

ROW = {"train": {"rows": 8, "refused_responses": 0, "padding": {}, "dropped": []}}


def table(title: str, found: dict | None = None) -> dict[str, dict[str, str]]:
    """Row -> column -> cell of one of the tables."""
    shown = {t.title: t for t in tables.tables(made.full_results() if found is None else found)}
    of = shown[title]
    return {row[0]: dict(zip(of.header[1:], row[1:], strict=True)) for row in of.rows}


def titles(found: dict) -> list[str]:
    return [t.title for t in tables.tables(found)]


def test_a_finished_run_has_what_its_parts_say():
    before, after, lines = made.before(), made.after(), [made.full_evaluation(s) for s in (0, 5, 9)]
    training = made.training(made.three_phases(6))
    found = report.collect(before, lines, after, ROW, training)
    for name in made.CONDITIONS:
        assert found[name] == (before | after)[name]
    assert found["held_out"] == {"before": lines[0], "after": lines[-1]}
    assert found["retention"] == {
        "sort": {"before": 0.99, "after": 0.98},
        "reverse": {"before": 0.5, "after": 0.53},
    }
    assert found["recovery"] == pytest.approx((0.962 - 0.031) / (0.984 - 0.031))
    assert found["heldout_recovery"] == pytest.approx((0.953 - 0.027) / (0.98 - 0.027))
    for name in ("task", "unavailable", "counts"):
        assert found[name] == before[name]
    for name in ("side_effects", "prefix_cost"):
        assert found[name] == after[name]
    assert found["samples"] == before["samples"] | after["samples"]
    assert found["rows"] == ROW and training.items() <= found.items()
    assert found["versions"]["python"].startswith("3.") and found["versions"]["jax"]
    assert json.loads(json.dumps(found)) == found


def test_recovery_is_not_defined_where_the_prefix_changes_nothing():
    before = made.before()
    before["prompted_teacher"]["accuracy"] = before["base"]["accuracy"]
    found = report.collect(before, [], made.after(), ROW, {})
    assert found["recovery"] is None and found["heldout_recovery"] > 0.9
    of = table("Recovery of the prefix", found)
    assert of["questions"] == {"recovery": "not defined"}
    assert of["held-out questions"] == {"recovery": "0.972"}


def test_a_run_without_questions_has_no_shares_and_no_recovery():
    before, after = made.before(), made.after()
    for who in made.CONDITIONS:
        of = (before | after)[who]
        del of["accuracy"], of["heldout_accuracy"]
    found = report.collect(before, [], after, ROW, {})
    assert not {"recovery", "heldout_recovery", "held_out"} & found.keys()
    assert "Right answers" not in titles(found) and "Recovery of the prefix" not in titles(found)
    assert table("Distance to the prompted teacher", found)["student"]["forward KL"] == "0.0400"


def test_a_run_that_measures_nothing_has_its_rows_and_samples():
    samples = {"question": ["Why?"], "base": ["So."]}
    before = {"abilities": {}, "samples": samples, "task": {}, "unavailable": {}, "counts": {}}
    after = {"abilities": {}, "samples": {"student": ["Thus."]}}
    training = {"steps": 3, "tokens": 50, "loss": 0.5, "seconds": 2.0, "exports": []}
    found = report.collect(before, [], after, ROW, training)
    assert titles(found) == ["Training", "Rows"]
    assert "Why?\n  base: So.\n  student: Thus.\n" in report.render(found, made.pathlib.Path("x"))


def test_so_far_has_what_was_asked_before_training():
    lines = [made.full_evaluation(s) for s in (0, 5)]
    found = results.so_far(made.before(), lines)
    assert found["base"] == made.condition(0) and found["task"] == made.TASK
    assert found["held_out"] == {"before": lines[0], "after": lines[1]}
    assert not {"student", "recovery", "retention", "abilities"} & found.keys()
    assert results.so_far({}, []) == {}


def test_the_lines_of_training_add_up():
    metrics = made.three_phases(9)
    assert results.training(metrics) == {
        **{"steps": 9, "tokens": 180, "on_policy_steps": 3, "compilations": 1},
        "loss": metrics[-1]["loss"],
    }


def test_the_conditions_say_who_answers_and_what_is_read():
    of = table("Right answers")
    assert list(of) == [name.replace("_", " ") for name in made.CONDITIONS]
    assert of["student"] == {
        "who answers": "student, trained",
        "what it reads": "the student's view",
        "accuracy": "96.2% [94.2, 97.5]",
        "held-out": "95.3% [92.0, 97.3]",
    }
    assert of["prompted teacher"]["who answers"] == "teacher"
    assert of["student other prefix"]["what it reads"] == "another prefix and turns"
    assert table("Distance to the prompted teacher")["base"] == {
        **{"forward KL": "0.9000", "reverse KL": "0.4500", "top-1 agreement": "95.50%"},
        **{"acceptance rate": "96.25%", "perplexity": "3.70"},
    }


def test_a_measure_that_one_condition_lacks_is_a_dash_and_one_that_all_lack_no_column():
    found = made.full_results(student={"accuracy": 0.5}, prompted_teacher={"perplexity": 2.0})
    assert table("Right answers", found)["student"]["held-out"] == "-"
    assert table("Right answers", found)["prompted teacher"]["accuracy"] == "-"
    distances = table("Distance to the prompted teacher", found)
    assert "student" not in distances
    assert distances["prompted teacher"]["forward KL"] == "-"
    for who in made.CONDITIONS:
        found[who] = {"accuracy": 0.5}
    assert "held-out" not in table("Right answers", found)["base"]


def test_shares_have_an_interval_only_where_it_is_known_of_how_many():
    found = made.full_results(counts={"questions": 100, "sort": 0})
    of = table("Right answers", found)["student"]
    assert of["accuracy"] == "96.2% [90.4, 98.5]" and of["held-out"] == "95.3%"
    assert table("Kept abilities", found)["sort"]["before"] == "99.0%"


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (50, 100), (1, 2000), (1, 1)])
def test_wilsons_interval(right, count):
    wanted = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert tables.wilson(right / count, count) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_both_ends_of_the_schedule():
    of = table("Before and after training")
    assert of["forward KL"] == {
        **{"teacher's text, before": "0.9000", "teacher's text, after": "0.0692"},
        **{"student's text, before": "0.6750", "student's text, after": "0.0675"},
    }
    assert "loss" not in of and len(of) == len(made.MEASURES)
    assert table("Validation")["loss"] == {
        "validation, before": "1.1000",
        "validation, after": "0.1000",
    }
    (shown,) = (t for t in tables.tables(made.full_results()) if t.title == "Validation")
    assert shown.note.endswith("Before: step 0; after: step 60")


def test_a_text_that_one_end_lacks_is_left_out():
    ends = made.evaluation(0, texts=("teacher_text",)), made.evaluation(9)
    found = results.so_far({}, ends)
    assert titles(found) == ["Before and after training"]
    assert list(table("Before and after training", found)["perplexity"]) == [
        "teacher's text, before",
        "teacher's text, after",
    ]


def test_abilities_side_effects_and_the_cost_of_the_prefix():
    assert table("Kept abilities")["reverse"] == {
        **{"before": "50.0% [38.1, 61.9]", "after": "53.0% [41.0, 64.7]", "change": "+3.0%"},
    }
    side_effects = table("Side effects")
    assert side_effects["forward KL"] == {"value": "0.0600"}
    assert not [name for name in side_effects if "mass" in name]  # no teacher is in it
    cost = table("Cost of the prefix")
    assert cost == {
        "tokens saved a prompt": {"value": "1,041.2"},
        "seconds without it": {"value": "0.800"},
        "seconds with it": {"value": "2.000 (2.50x)"},
        "seconds with it, kept in memory": {"value": "1.000 (1.25x)"},
    }
    found = made.full_results()
    del found["prefix_cost"]["seconds"]["with_kept"]
    assert list(table("Cost of the prefix", found)) == [*cost][:3]


def test_what_became_of_the_rows_and_what_a_server_was_asked():
    assert table("Rows")["train"] == {
        **{"trained": "2000", "lost or cut": "1 dropped", "refused responses": "3"},
        "padding of the views": "60%, 30%",
    }
    assert table("Rows")["anchor chat"]["lost or cut"] == "-"
    assert table("Rows", made.full_results(rows=ROW))["train"]["padding of the views"] == "-"
    assert table("The teacher at its server")["requests"] == {"value": "1,234"}
    found = made.full_results()
    del found["teacher"]
    assert "The teacher at its server" not in titles(found)


def test_the_terminal_shows_every_table_within_120_columns(tmp_path):
    found = made.full_results()
    shown = report.render(found, tmp_path)
    assert max(map(len, shown.splitlines()[:-1])) <= 120
    for each in tables.tables(found):
        assert f"\n{each.title}\n" in f"\n{shown}"
        for cell in (cell for row in each.rows for cell in row):
            assert " ".join(cell.split()) in " ".join(shown.split())
    for question in made.QUESTIONS:
        assert f"\n{question}\n  base: base thinks" in shown
    written = "results.json, metrics.jsonl, report.png, report.html, merged/"
    assert shown.endswith(f"{tmp_path}: {written}")


def test_a_long_reason_is_wrapped_and_a_very_long_answer_cut():
    reason = "because " * 40
    shown = terminal.as_text(Table("Title", (), [("measure", reason)], prose=True))
    assert shown.count("because") == 40 and max(map(len, shown.splitlines())) <= 110
    shown = terminal.as_text(Table("Title", (), [("student", "long\n\n" * 500)], prose=True))
    assert shown.count("long") == 80 and "(2,499 characters in all)" in " ".join(shown.split())


def test_text_of_models_cannot_steer_a_terminal(tmp_path):
    found = made.full_results()
    found["samples"]["student"] = ["\x1b[2J\x00done\ud800", "right\u202eleft", "tab\there"]
    found["samples"]["question"][0] = "\x1b]0;title\x07?"
    found["unavailable"] = {"measure\x1b": "why\x9b"}
    shown = report.render(found, tmp_path)
    shown.encode("utf-8")
    assert r"\x1b[2J\x00done\ud800" in shown and r"right\u202eleft" in shown
    assert r"\x1b]0;title\x07?" in shown and r"measure\x1b: why\x9b" in shown
    assert not [c for c in shown if ord(c) < 32 and c != "\n"]


def test_harmless_text_stays_as_it_is():
    for fine in ("Grüße, 日本語\n\ttab", "👩\u200d🔬", "می\u200cخواهم"):
        assert text.visible(fine) == fine
    assert text.visible("\r\x85\u2028\ufeff\U000e0001") == r"\x0d\x85\u2028\ufeff\U000e0001"
    assert text.cut("abc", 3) == "abc"
    assert text.cut("abcd" * 500, 3) == "abc... (2,000 characters in all)"


def test_every_number_has_a_name_of_its_own():
    shown = tables.tables(made.full_results())
    found = list(tables.cells(shown))
    assert len(dict(found)) == len(found)
    assert dict(found)["Right answers", "student, accuracy"] == "96.2% [94.2, 97.5]"
    assert dict(found)["Side effects", "forward KL"] == "0.0600"
    assert not [title for (title, _), _ in found if title == "Not measured, and why"]
    assert not [cell for _, cell in found if cell in ("teacher", "prefix and turns")]
