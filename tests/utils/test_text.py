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


def test_only_what_is_hidden_is_escaped_and_only_what_is_long_is_cut():
    for fine in ("Grüße, 日本語\n\ttab", "👩\u200d🔬", "می\u200cخواهم"):
        assert text.visible(fine) == fine
    assert text.visible("\r\x85\u2028\ufeff\U000e0001") == r"\x0d\x85\u2028\ufeff\U000e0001"
    assert text.cut("abc", 3) == "abc"
    assert text.cut("abcd" * 500, 3) == "abc... (2,000 characters in all)"
