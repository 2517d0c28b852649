"""Every slow test is in one of the parts, and the parts take about as long."""

import collections
import pathlib

import pytest
import slices


class Item:
    """A test, as far as its marks and its place go."""

    def __init__(self, nodeid: str, *marks):
        self.nodeid, self.path, self.marks = nodeid, pathlib.Path(nodeid.split("::")[0]), marks

    def iter_markers(self):
        return iter([mark.mark for mark in self.marks])


ITEMS = [
    *(Item(f"{name}.py::{i}", pytest.mark.slow(40)) for name in "abcd" for i in range(3)),
    *(Item(f"e.py::[{i}]", pytest.mark.slow(30, apart=True)) for i in range(6)),
    *(Item(f"{name}.py::test", pytest.mark.integration) for name in "fg"),
    *(Item(f"{name}.py::fast", pytest.mark.drawn) for name in "abcxyz"),
]


def test_the_parts_are_apart_all_of_the_slow_ones_and_alike():
    slow = [item for item in ITEMS if "fast" not in item.nodeid]
    runs, seconds = collections.Counter(), []
    for part in range(4):
        left_out = slices.left_out(ITEMS, part, 4)
        assert left_out == slices.left_out(ITEMS[::-1], part, 4) <= {*slow}
        mine = [item for item in slow if item not in left_out]
        runs.update(item.nodeid for item in mine)
        files = {item.path for item in mine if item.path.name != "e.py"}
        assert not files & {item.path for item in left_out}
        apart = sum(item.path.name == "e.py" for item in mine)
        seconds.append(sum(60 if path.stem in "fg" else 40 for path in files) + 30 * apart)
    assert runs == {item.nodeid: 1 for item in slow}
    assert max(seconds) - min(seconds) <= 30


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b"])
def test_a_part_that_there_is_not_is_refused(text):
    assert slices.parse("2/4") == (1, 4)
    with pytest.raises(pytest.UsageError, match="the K-th of N parts"):
        slices.parse(text)
