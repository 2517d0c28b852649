"""What a run writes of each step, and what a resumed run drops."""

import contextlib

import pytest

from gkdjax.train.metrics import MetricsWriter
from gkdjax.utils.files import read_lines

REST = {"divergence": "mixed", "on_policy_rows": 0, "tokens": 8, "compilations": 0}


def write(workdir, first_step: int, steps, tensorboard: bool = False) -> None:
    path = workdir / "metrics.jsonl"
    with contextlib.closing(MetricsWriter(path, first_step, tensorboard)) as writer:
        for count, step in enumerate(steps, 1):
            writer.write(step, {"loss": first_step + step / 8, **REST})
            assert len(read_lines(path)) == first_step + count  # on disk at once


@pytest.mark.parametrize(
    ("first_step", "cut"),
    [
        (3, 0),  # steps that the checkpoint does not know are dropped
        (2, 4),  # and so is a line that a crash has cut
        (0, 0),
    ],
)
def test_a_line_a_step_and_a_resumed_run_drops_what_its_checkpoint_does_not_know(
    tmp_path, first_step, cut
):
    write(tmp_path, 0, range(3 if cut else 5))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[: -cut or None])
    write(tmp_path, first_step, range(first_step, 6))
    begun = [0] * first_step + [first_step] * (6 - first_step)
    assert read_lines(path) == [
        {"step": step, "loss": first + step / 8, **REST} for step, first in enumerate(begun)
    ]
    assert not list(tmp_path.glob("*.part"))


def test_tensorboard_gets_the_numbers_only(tmp_path):
    write(tmp_path, 0, range(2), tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"loss") >= 2 and b"divergence" not in content
