"""Which answers are right, and what of them is compared."""

import pytest

from gkdjax.data.answer_matching import check_patterns, is_right, without_thoughts
from gkdjax.types import Expected
from gkdjax.utils.errors import UserError


@pytest.mark.parametrize(
    ("match", "any_of", "answer", "right"),
    [
        ("keywords", ["paris"], "It is PARIS, of course.", True),
        ("keywords", ["PARIS"], "it is paris", True),
        ("keywords", ["Lyon", "paris"], "Paris", True),
        ("keywords", ["paris"], "Lyon", False),
        ("keywords", ["paris"], "", False),
        ("keywords", ["paris"], "<think>Paris?</think>Lyon", False),
        ("exact", ["Paris"], " Paris\n", True),
        ("exact", [" Paris "], "Paris", True),
        ("exact", ["Paris"], "paris", False),
        ("exact", ["Paris"], "Paris.", False),
        ("exact", ["Lyon", "Paris"], "Paris", True),
        ("exact", ["Paris"], "<think>Lyon?</think>\nParis", True),
        ("regex", [r"^Answer: 7\b"], "Answer: 7 apples", True),
        ("regex", [r"^Answer: 7\b"], "3 + 4 = 7\nAnswer: 7", False),
        ("regex", [r"(?m)^Answer: 7\b"], "3 + 4 = 7\nAnswer: 7", True),
        ("regex", [r"(?m)^Answer: 7$", "seven"], "it is seven", True),
        ("regex", ["Seven"], "it is seven", False),
    ],
)
def test_the_three_ways(match, any_of, answer, right):
    expected = Expected(match, tuple(any_of))
    check_patterns(expected, "x")
    assert is_right(answer, expected) is right


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("<think>Lyon?\nNo.</think>Paris", "Paris"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("Well, <think>it is Lyon, or", "Well, "),  # cut off
        ("it is Lyon?\n</think>\nParis", "\nParis"),  # the template began the thoughts
    ],
)
def test_thoughts_are_no_answer(answer, left):
    assert without_thoughts(answer) == left


def test_a_pattern_is_checked_where_it_is_read():
    check_patterns(Expected("keywords", ("(",)), "x")
    with pytest.raises(UserError, match=r"^here: '\(' is no regular expression: missing \)"):
        check_patterns(Expected("regex", ("a", "(")), "here")
