"""Tables and progress for people."""

from gkdjax.utils import text


def test_the_table_aligns_names_left_and_numbers_right():
    assert text.table(["", "exact"], [["base", "0.1"], ["student", "0.985"]]) == (
        "         exact\n-------  -----\nbase       0.1\nstudent  0.985"
    )


def test_the_bar_may_be_hidden_and_may_start_late(capfd):
    for shown, text_shown in ((False, ""), (True, "3/4")):
        with text.bar(4, "train", start=2, shown=shown) as bar:
            bar.update(1)
        err = capfd.readouterr().err
        assert text_shown in err and bool(err) == shown
