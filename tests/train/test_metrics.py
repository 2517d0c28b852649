"""What a run writes down of each step, and what a resumed one takes back."""

import contextlib
import json

from gkdjax.train.metrics import MetricsWriter
from gkdjax.utils import text
from gkdjax.utils.files import read_lines


def write(workdir, first_step: int, steps, tensorboard: bool = False) -> None:
    with contextlib.closing(
        MetricsWriter(workdir / "metrics.jsonl", first_step, tensorboard)
    ) as writer:
        for step in steps:
            writer.write(step, {"loss": first_step + step / 8, "divergence": "mixed"})


def test_a_line_a_step(tmp_path):
    write(tmp_path, 0, range(2))
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "loss": 0.0, "divergence": "mixed"},
        {"step": 1, "loss": 0.125, "divergence": "mixed"},
    ]


def test_lines_are_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", 0, tensorboard=False)
    writer.write(0, {"loss": 1.0})
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    writer.close()


def test_a_resumed_run_drops_what_its_checkpoint_does_not_know(tmp_path):
    write(tmp_path, 0, range(5))
    write(tmp_path, 3, range(3, 6))
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["loss"] >= 3 for line in lines] == [False] * 3 + [True] * 3


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, 0, range(3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-4])
    write(tmp_path, 2, range(2, 4))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_from_the_start_again_is_from_the_start(tmp_path):
    write(tmp_path, 0, range(3))
    write(tmp_path, 0, range(1))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0]
    assert not list(tmp_path.glob("*.part"))


def test_tensorboard_gets_the_numbers_only(tmp_path):
    write(tmp_path, 0, range(2), tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"loss") >= 2
    assert b"divergence" not in content
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])


def test_the_table_aligns_names_left_and_numbers_right():
    assert text.table(["", "exact"], [["base", "0.1"], ["student", "0.985"]]) == (
        "         exact\n-------  -----\nbase       0.1\nstudent  0.985"
    )


def test_the_bar_may_be_hidden_and_may_start_late(capfd):
    with text.bar(4, "train", start=2, shown=False) as hidden:
        hidden.update(1)
    assert capfd.readouterr().err == ""
    with text.bar(4, "train", start=2) as shown:
        shown.update(1)
    assert "3/4" in capfd.readouterr().err
