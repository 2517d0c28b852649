"""The student as its own teacher: its base, adapter off, reading the prefix. One copy of it."""

from absl import logging

from gkdjax.errors import UserError


def require_longer_view(views_differ: bool) -> None:
    """Raises UserError where teacher and student would read the same: the loss would be zero."""
    if not views_differ:
        raise UserError(
            "teacher.backend='local-toggle' is the student itself, and no row gives it more to read"
            " than the student: the loss would be zero. Give a prefix (context.prefix_messages),"
            " lower context.student_retained_turns, or take another teacher"
            " (teacher.backend='flax')"
        )


def announce_second_copy(num_bytes: int, reader: str) -> None:
    """Says what a full fine-tuning costs that still needs its untrained self."""
    logging.warning(
        "student.adapter='none' trains every parameter, so %s keeps a frozen second copy of the"
        " student: %.1f MiB",
        reader,
        num_bytes / 2**20,
    )
